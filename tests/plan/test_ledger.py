from collections import Counter

import pytest
from tiny_books import ABCD, BLOCK, HOLD, already_warm, assert_sums_hold, issue, request, warm

from kvprefetch.cache.misses import Lookup
from kvprefetch.outcomes import MissReason, Outcome, Result, Use
from kvprefetch.plan.ledger import Ledger


# -- the way to a use --------------------------------------------------------------------------------------
def test_a_prefetch_that_a_request_finds_is_used_with_its_tokens() -> None:
    ledger = Ledger()
    ticket = warm(ledger)
    request(ledger, [*ABCD, b"e"], hits=4)
    assert (ticket.use, ticket.used_tokens) == (Use.USED, 16)


def test_a_request_that_turns_off_half_way_used_the_tokens_up_to_there() -> None:
    ledger = Ledger()
    ticket = warm(ledger)
    request(ledger, [b"a", b"b", b"x"], hits=2)
    assert (ticket.use, ticket.used_tokens) == (Use.USED, 8)


def test_a_request_that_found_only_what_was_there_before_used_nothing_of_it() -> None:
    ledger = Ledger()
    ticket = warm(ledger, found=2)
    request(ledger, [b"a", b"b", b"x"], hits=2)
    assert ticket.use is None
    request(ledger, ABCD, hits=3)
    assert (ticket.use, ticket.used_tokens) == (Use.USED, 12)


def test_a_request_that_names_blocks_without_finding_them_used_nothing() -> None:
    ledger = Ledger()
    ticket = warm(ledger)
    request(ledger, ABCD, hits=0)
    assert ticket.use is None


def test_what_was_clipped_is_used_by_its_prefix() -> None:
    ledger = Ledger()
    ticket = issue(ledger)
    ledger.start(ticket, ABCD, 0)
    ledger.resolve(ticket, Result(Outcome.CLIPPED, 8), 0.0, 2)
    request(ledger, ABCD, hits=2)
    assert (ticket.use, ticket.used_tokens) == (Use.USED, 8)


def test_what_was_warm_already_is_used_only_by_the_whole_of_it() -> None:
    """A shorter prefix would have been found without any hint."""
    ledger = Ledger()
    ticket = already_warm(ledger)
    request(ledger, [*ABCD[:3], b"x"], hits=3)
    assert ticket.use is None
    request(ledger, [*ABCD, b"e"], hits=4)
    assert (ticket.use, ticket.used_tokens) == (Use.USED, 16)


def test_one_request_may_use_several_prefetches() -> None:
    ledger = Ledger()
    short, whole = warm(ledger, ABCD[:2]), warm(ledger, ABCD, found=2)
    request(ledger, ABCD, hits=4)
    assert [(t.use, t.used_tokens) for t in (short, whole)] == [(Use.USED, 8), (Use.USED, 16)]


def test_a_request_that_came_first_makes_it_late() -> None:
    ledger = Ledger()
    ticket = issue(ledger)
    ledger.start(ticket, ABCD, 0)
    request(ledger, [*ABCD, b"e"], hits=1)
    assert ticket.use is None, "it has no outcome yet"
    ledger.resolve(ticket, Result(Outcome.WARM, 16), 1.0, 4)
    assert (ticket.use, ticket.used_tokens) == (Use.LATE, 0)
    request(ledger, ABCD, hits=4)
    assert ticket.use is Use.LATE


def test_a_request_for_less_than_the_context_does_not_make_it_late() -> None:
    ledger = Ledger()
    ticket = issue(ledger)
    ledger.start(ticket, ABCD, 0)
    request(ledger, ABCD[:3], hits=0)
    ledger.resolve(ticket, Result(Outcome.WARM, 16), 1.0, 4)
    assert ticket.use is None


def test_a_request_after_it_was_done_does_not_make_it_late() -> None:
    ledger = Ledger()
    first, second = issue(ledger), issue(ledger)
    ledger.start(first, ABCD, 0)
    ledger.start(second, ABCD, 0)
    ledger.resolve(first, Result(Outcome.WARM, 16), 1.0, 4)
    request(ledger, ABCD, hits=4)
    ledger.resolve(second, Result(Outcome.ALREADY_WARM, 16), 1.0, 4)
    assert (first.use, second.use) == (Use.USED, Use.LATE)


def test_it_is_evicted_when_its_last_unused_block_is_gone() -> None:
    ledger = Ledger()
    ticket = warm(ledger, found=1)
    for key in (b"d", b"c"):
        ledger.note_evicted(key)
        assert ticket.use is None
    ledger.note_evicted(b"b")
    assert ticket.use is Use.EVICTED


def test_what_was_used_before_it_was_evicted_was_used() -> None:
    ledger = Ledger()
    ticket = warm(ledger)
    request(ledger, ABCD, hits=1)
    for key in reversed(ABCD):
        ledger.note_evicted(key)
    assert ticket.use is Use.USED
    assert ledger.uses == {Use.USED: 1}


def test_what_was_warm_already_is_evicted_with_its_last_block() -> None:
    ledger = Ledger()
    ticket = already_warm(ledger)
    ledger.note_evicted(b"d")
    assert ticket.use is Use.EVICTED


def test_it_is_unused_when_its_hold_runs_out_and_not_before() -> None:
    ledger = Ledger()
    ticket = warm(ledger)
    ledger.expire_holds(HOLD - 0.1)
    assert ticket.use is None
    ledger.expire_holds(HOLD)
    assert ticket.use is Use.UNUSED


def test_a_hold_begins_when_the_prefetch_is_done() -> None:
    ledger = Ledger()
    ticket = issue(ledger, now=0.0)
    ledger.start(ticket, ABCD, 0)
    ledger.resolve(ticket, Result(Outcome.WARM, 16), 50.0, 4)
    ledger.expire_holds(50.0 + HOLD - 0.1)
    assert ticket.use is None
    ledger.expire_holds(50.0 + HOLD)
    assert ticket.use is Use.UNUSED


def test_holds_run_out_in_their_own_order() -> None:
    ledger = Ledger()
    long, short = issue(ledger, hold_s=90.0), issue(ledger, hold_s=10.0)
    for ticket in (long, short):
        ledger.start(ticket, ABCD, 0)
        ledger.resolve(ticket, Result(Outcome.WARM, 16), 0.0, 4)
    ledger.expire_holds(20.0)
    assert (long.use, short.use) == (None, Use.UNUSED)


def test_it_is_unused_when_its_session_is_over() -> None:
    ledger = Ledger()
    over, other = warm(ledger, session="over"), warm(ledger, session="other")
    ledger.end_session("over")
    assert (over.use, other.use) == (Use.UNUSED, None)


def test_a_request_after_the_hold_does_not_change_the_books() -> None:
    ledger = Ledger()
    ticket = warm(ledger)
    ledger.expire_holds(HOLD)
    request(ledger, ABCD, hits=4)
    assert ticket.use is Use.UNUSED
    assert ledger.uses == {Use.UNUSED: 1}


def test_what_was_used_stays_used_when_its_hold_runs_out_and_its_session_ends() -> None:
    ledger = Ledger()
    ticket = warm(ledger)
    request(ledger, ABCD, hits=4)
    ledger.end_session("s")
    ledger.expire_holds(HOLD)
    assert ticket.use is Use.USED
    assert ledger.uses == {Use.USED: 1}


# -- outcomes ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("outcome", [outcome for outcome in Outcome if not outcome.is_resident])
def test_what_left_nothing_resident_has_no_use(outcome: Outcome) -> None:
    ledger = Ledger()
    ticket = issue(ledger)
    ledger.start(ticket, ABCD, 0)
    ledger.resolve(ticket, Result(outcome, 0), 0.0)
    request(ledger, ABCD, hits=4)
    ledger.expire_holds(1e9)
    ledger.end_session("s")
    assert (ticket.use, ledger.uses.total()) == (None, 0)
    assert ledger.stats()["outcomes"][outcome.name] == 1
    assert_sums_hold(ledger)


def test_a_prefetch_that_never_started_may_be_rejected() -> None:
    ledger = Ledger()
    ledger.resolve(issue(ledger), Result(Outcome.REJECTED, 0, "too many"), 0.0)
    assert ledger.stats()["outcomes"]["REJECTED"] == 1
    assert_sums_hold(ledger)


def test_a_second_outcome_is_ignored() -> None:
    ledger = Ledger()
    ticket = warm(ledger)
    first = ticket.result
    ledger.resolve(ticket, Result(Outcome.CANCELLED, 0), 1.0)
    assert ticket.result is first
    assert ledger.outcomes == {Outcome.WARM: 1}
    request(ledger, ABCD, hits=4)
    assert ticket.use is Use.USED


def test_a_context_shorter_than_a_block_is_warm_already_and_of_no_use() -> None:
    ledger = Ledger()
    ticket = already_warm(ledger, [])
    assert ticket.use is Use.UNUSED
    assert ledger.open == 0


def test_a_clipped_preload_that_added_nothing_is_used_by_the_whole_of_what_was_there() -> None:
    ledger = Ledger()
    ticket = issue(ledger)
    ledger.start(ticket, ABCD, 2)
    ledger.resolve(ticket, Result(Outcome.CLIPPED, 8), 0.0, 2)
    request(ledger, ABCD, hits=1)
    assert ticket.use is None
    request(ledger, ABCD, hits=2)
    assert (ticket.use, ticket.used_tokens) == (Use.USED, 8)


def test_long_holds_of_used_preloads_do_not_pile_up() -> None:
    ledger = Ledger()
    for _ in range(1_000):
        warm(ledger)
        request(ledger, ABCD, hits=4)
    assert ledger.open == 0
    assert len(ledger._holds) < 100


def test_what_is_open_is_told_as_pending() -> None:
    ledger = Ledger()
    issue(ledger)
    warm(ledger)
    stats = ledger.stats()
    assert (stats["issued"], stats["pending"], stats["use_pending"]) == (2, 1, 1)
    assert stats["outcomes"] == {**dict.fromkeys((outcome.name for outcome in Outcome), 0), "WARM": 1}
    assert stats["uses"] == dict.fromkeys((use.name for use in Use), 0)


def test_lookups_are_summed_by_reason_and_rule() -> None:
    ledger = Ledger()
    misses = Counter({MissReason.EVICTED: 2, MissReason.NEVER_SEEN: 1})
    ledger.note_lookup(ABCD, Lookup(4, 1, misses, Counter(lru=2), None), BLOCK)
    request(ledger, ABCD, hits=4)
    assert ledger.lookup_stats() == {
        "count": 2,
        "blocks": 8,
        "hits": 5,
        "loaded": 0,
        "misses": {"evicted": 2, "never_seen": 1},
        "evicted_by": {"lru": 2},
    }


def test_the_books_forget_what_is_settled() -> None:
    """However a ticket ends, no key keeps it: the books of a long-lived worker stay small."""
    ledger = Ledger()
    warm(ledger)
    already_warm(ledger)
    request(ledger, ABCD, hits=4)
    late = issue(ledger)
    ledger.start(late, ABCD, 0)
    ledger.resolve(late, Result(Outcome.CANCELLED, 0), 0.0)
    ledger.expire_holds(HOLD)
    assert not ledger._waiting
    assert not ledger._resident
    assert not ledger._holds


def test_nobody_can_be_expected_to_want_it_once_its_hold_after_the_expected_use_is_over() -> None:
    ticket = Ledger().issue(
        10.0, tenant="t", session="s", probability=0.5, expected_in_s=5.0, hold_s=60.0, because="hint"
    )
    assert ticket.expires_at == 75.0


def test_blocks_to_be_loaded_are_no_misses_unless_the_load_fails() -> None:
    ledger = Ledger()
    ledger.note_lookup(ABCD, Lookup(4, 1, Counter(), Counter(), None, loaded=3), BLOCK)
    ledger.note_not_loaded(2, MissReason.CORRUPT)
    stats = ledger.lookup_stats()
    assert (stats["blocks"], stats["hits"], stats["loaded"], stats["misses"]) == (4, 1, 1, {"corrupt": 2})


def test_a_ticket_tells_when_it_has_its_use() -> None:
    ledger = Ledger()
    told: list[Use | None] = []
    ticket = issue(ledger)
    ticket.settled = lambda settled: told.append(settled.use)
    ledger.start(ticket, ABCD, 0)
    ledger.resolve(ticket, Result(Outcome.WARM, 4 * BLOCK), 1.0, resident=4)
    assert told == []
    request(ledger, ABCD, hits=4)
    assert told == [Use.USED]


def test_what_lies_in_another_tier_is_used_when_it_is_loaded_however_often_the_pool_evicts_it() -> None:
    ledger = Ledger()
    ticket = issue(ledger)
    ticket.outlives_pool = True
    ledger.start(ticket, ABCD, 0)
    ledger.resolve(ticket, Result(Outcome.WARM, 4 * BLOCK), 1.0, resident=4)
    for key in ABCD:
        ledger.note_evicted(key)
    assert ticket.use is None
    ledger.note_lookup(ABCD, Lookup(4, 0, Counter(), Counter(), None, loaded=4), BLOCK)
    assert (ticket.use, ticket.used_tokens) == (Use.USED, 4 * BLOCK)
