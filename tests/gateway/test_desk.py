"""The books of an engine: each preload ends with one outcome, and each that left something warm with one use."""

from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvprefetch.gateway.contract import Dialect, Draft
from kvprefetch.gateway.desk import RETURN, Desk
from kvprefetch.gateway.job import WarmJob
from kvprefetch.gateway.replica import BLOCK_BYTES, BLOCK_UNITS, Replica, prompt_keys
from kvprefetch.outcomes import Outcome, Result, Use
from kvprefetch.plan.foresight import NEXT_TURN
from kvprefetch.settings import SpeculationSettings

HOLD = 300.0


class Books:
    """A desk, and what it has told."""

    def __init__(self, blocks: int | None = None, **said: Any) -> None:
        self.lost: list[str] = []
        self.results: list[Result] = []
        self.settled: list[Any] = []
        self.desk = Desk(
            SpeculationSettings(**said), None if blocks is None else blocks * BLOCK_UNITS, self.lost.append
        )
        # the same with fewer pages, so that proofs are quick
        self.desk.replica = self.desk.foresight.pool = Replica(None if blocks is None else blocks * BLOCK_UNITS, 64)
        self.desk.replica.on_evict = self.desk._evicted

    def propose(self, prompt: str, because: str = "hint", session: str = "s", now: float = 0.0, **said: Any) -> WarmJob:
        draft = Draft(Dialect.CHAT, {}, (_text(prompt),))
        return self.desk.propose(
            draft,
            _keys(prompt),
            session,
            "ann",
            because,
            now,
            resolved=self.results.append,
            settled=self.settled.append,
            **said,
        )

    def warm(self, job: WarmJob, now: float = 0.0, computed: int = 100) -> None:
        """All of it, in one piece."""
        self.desk.warmed(job, 1.0, computed, 0.01, now)
        self.desk.finished(job, now)

    def serve(self, prompt: str, session: str = "s", now: float = 1.0, cached: float | None = None) -> None:
        """A request from its coming to its end."""
        keys = _keys(prompt)
        found = self.desk.find(keys)
        self.desk.requested(session, "ann", keys, now)
        self.desk.served(session, "ann", keys, found, cached, now)
        self.desk.ended(session, "ann", "stop", keys, now)

    def check(self) -> None:
        """Law 6 and law 5."""
        stats = self.desk.ledger.stats()
        assert sum(stats["outcomes"].values()) + stats["pending"] == stats["issued"]
        resident = sum(stats["outcomes"][outcome.name] for outcome in Outcome if outcome.is_resident)
        assert sum(stats["uses"].values()) + stats["use_pending"] == resident
        assert stats["pending"] == len(self.desk.preloads.jobs)
        assert min(stats["pending"], stats["use_pending"], stats["tokens_wasted"]) >= 0
        assert len(self.results) == stats["issued"] - stats["pending"]
        assert len(self.settled) == sum(stats["uses"].values())
        lookups = self.desk.ledger.lookup_stats()
        assert lookups["hits"] + sum(lookups["misses"].values()) == lookups["blocks"]
        self.desk.replica.check()


def _text(prompt: str) -> bytes:
    return b"".join(letter.encode() * BLOCK_BYTES for letter in prompt)


def _keys(prompt: str) -> list[bytes]:
    """A block for each letter."""
    return prompt_keys(b"root", [_text(prompt)])


def _use(job: WarmJob) -> Use | None:
    return job.ticket.use


def test_a_warmed_context_that_a_request_finds_is_used() -> None:
    books = Books()
    job = books.propose("abc")
    books.warm(job)
    found = books.desk.find(_keys("abcd"))
    assert (found.blocks, found.total, found.preloaded, found.how) == (3, 4, 3, "preloaded")
    books.serve("abcd", cached=0.75)
    assert (_use(job), job.ticket.used_tokens) == (Use.USED, 3 * BLOCK_UNITS)
    assert books.desk.find(_keys("abcd")).how == "cached"
    assert books.desk.ledger.tokens_used == books.desk.ledger.tokens_computed == 3 * BLOCK_UNITS
    books.check()


def test_a_warmed_context_that_the_engine_has_lost_is_evicted_and_counted() -> None:
    books = Books()
    job = books.propose("abc")
    books.warm(job)
    books.serve("abcd", cached=0.0)
    assert (_use(job), books.desk.beaten) == (Use.EVICTED, 1)
    books.check()


def test_a_context_that_was_lost_in_part_is_used_as_far_as_it_was_there() -> None:
    books = Books()
    job = books.propose("abcdef")
    books.warm(job)
    books.serve("abcdefgh", cached=3 / 8)
    assert (_use(job), job.ticket.used_tokens, books.desk.beaten) == (Use.USED, 3 * BLOCK_UNITS, 1)
    books.check()


def test_an_engine_that_lost_what_nobody_had_preloaded_beats_nobody() -> None:
    books = Books()
    books.serve("abcd")
    books.serve("abcd", now=2.0, cached=0.0)
    assert books.desk.beaten == 0


def test_a_block_more_or_less_is_no_loss() -> None:
    """The engine's blocks end elsewhere."""
    books = Books()
    job = books.propose("abc")
    books.warm(job)
    books.serve("abcd", cached=0.6)
    assert (_use(job), books.desk.beaten) == (Use.USED, 0)


def test_a_request_that_overtakes_its_preload_makes_it_late() -> None:
    books = Books()
    job = books.propose("abcd")
    books.desk.warmed(job, 0.5, 100, 0.01, 0.5)
    books.serve("abcdef")
    books.warm(job, 2.0)
    assert _use(job) is Use.LATE
    books.check()


def test_a_context_that_nobody_asks_for_is_unused_when_its_hold_is_over() -> None:
    books = Books()
    job = books.propose("abc", hold_s=10.0)
    books.warm(job, 1.0)
    books.desk.next(10.9)
    assert _use(job) is None
    books.desk.next(11.0)
    assert _use(job) is Use.UNUSED
    books.check()


def test_a_newer_turn_takes_the_place_of_an_older_one() -> None:
    books = Books()
    old, other = books.propose("ab", NEXT_TURN), books.propose("xy", NEXT_TURN, session="t")
    new = books.propose("abc", RETURN)
    assert old.ticket.result == Result(Outcome.CANCELLED, 0, "a newer turn took its place")
    assert books.desk.preloads.jobs == [other, new]
    books.check()


def test_what_the_engine_is_found_to_have_already_was_not_warmed_ahead() -> None:
    books = Books()
    job = books.propose("abc")
    books.desk.warmed(job, 1.0, 0, 0.01, 0.0)
    books.desk.finished(job, 0.0)
    assert books.results == [Result(Outcome.ALREADY_WARM, 3 * BLOCK_UNITS)]
    assert books.desk.find(_keys("abcd")).how == "cached"
    books.serve("abcd", cached=0.75)
    assert _use(job) is Use.USED
    books.check()


def test_sessions_whose_context_is_evicted_are_told() -> None:
    books = Books(6)
    books.serve("abc", session="s")
    books.serve("uvwx", session="t", now=2.0)
    assert books.lost == ["s"]
    books.serve("klmno", session="u", now=3.0)
    assert set(books.lost) == {"s", "t"}


def test_who_is_told_of_a_loss_may_propose_at_once() -> None:
    books = Books(4)
    again: list[WarmJob] = []
    books.desk._lost = lambda session: again.append(books.propose("abc", RETURN, session, 2.0))
    books.serve("abc", session="s")
    books.serve("uvwx", session="t", now=2.0)
    assert [job.ticket.session for job in again] == ["s"]
    books.check()


def test_a_session_that_ends_withdraws_its_preloads() -> None:
    books = Books()
    waiting, warm, other = books.propose("ab"), books.propose("abc"), books.propose("xy", session="t")
    books.warm(warm)
    books.desk.end_session("s", 1.0)
    assert waiting.ticket.result == Result(Outcome.CANCELLED, 0, "the session ended")
    assert _use(warm) is Use.UNUSED
    assert other.ticket.result is None
    books.check()


def test_a_restarted_engine_has_nothing_and_its_waiting_preloads_begin_anew() -> None:
    books = Books()
    warm, half = books.propose("abc"), books.propose("xyz", session="t")
    books.warm(warm)
    books.desk.warmed(half, 0.5, 100, 0.01, 0.0)
    half.warm = 100
    books.desk.restarted()
    assert books.desk.find(_keys("abc")).how == "cold"
    assert _use(warm) is Use.EVICTED
    assert (half.warm, half.ticket.result) == (0, None)
    assert set(books.lost) <= {"s", "t"}  # who lost it is told
    books.check()


def test_a_context_that_the_engine_has_no_room_for_is_clipped() -> None:
    books = Books(4)
    job = books.propose("abcdef")
    books.warm(job)
    assert books.results == [Result(Outcome.CLIPPED, 4 * BLOCK_UNITS, "the engine has no room for the rest")]
    for _ in range(2):
        books.serve("uvwx", session="t", now=2.0)
    assert _use(job) is Use.EVICTED
    books.check()


def test_what_is_too_short_to_gain_anything_is_done_at_once() -> None:
    books = Books()
    books.propose("")
    assert [result.outcome for result in books.results] == [Outcome.ALREADY_WARM]
    books.check()


@pytest.mark.parametrize("said", [{"enabled": False}, {"max_pending": 0}, {"max_open": 0}])
def test_what_may_not_wait_is_rejected(said: dict[str, Any]) -> None:
    books = Books(**said)
    books.propose("abc")
    assert [result.outcome for result in books.results] == [Outcome.REJECTED]
    books.check()


def test_misses_have_reasons() -> None:
    books = Books(4)
    books.serve("abcd")
    books.serve("abxy", now=2.0)
    books.serve("abcd", now=3.0)
    stats = books.desk.ledger.lookup_stats()
    assert stats["misses"] == {"never_seen": 4, "diverged": 2, "evicted": 2}
    assert stats["hits"] == 4


def test_the_most_wanted_is_warmed_first_and_nothing_where_all_is_there() -> None:
    books = Books()
    unlikely = books.propose("xyz", session="t", probability=0.2)
    likely = books.propose("abc", probability=0.9)
    chosen = books.desk.next(0.0)
    assert chosen is not None
    assert chosen[0] is likely
    for job in (likely, unlikely):
        books.warm(job)
    assert books.desk.next(1.0) is None
    books.check()


prompts = st.text("ab", min_size=0, max_size=7)
sessions = st.sampled_from("stu")
shares = st.sampled_from([0.0, 0.2, 0.5, 0.8, 1.0])
which = st.integers(0, 20)


class AnyOrder(RuleBasedStateMachine):
    """Whatever happens, and in whatever order."""

    @initialize(blocks=st.sampled_from([None, 2, 5, 9]), pending=st.sampled_from([2, 8]))
    def start(self, blocks: int | None, pending: int) -> None:
        self.books, self.now = Books(blocks, max_pending=pending, max_open=12), 0.0
        self.ever: list[WarmJob] = []
        self.running: list[tuple[str, list[bytes], Any]] = []

    @rule(prompt=prompts, because=st.sampled_from(["hint", NEXT_TURN, RETURN]), session=sessions, hold=st.floats(1, 50))
    def propose(self, prompt: str, because: str, session: str, hold: float) -> None:
        self.ever.append(self.books.propose(prompt, because, session, self.now, hold_s=hold))

    @precondition(lambda self: self.ever)
    @rule(at=which, share=shares, computed=st.sampled_from([0, 100]), is_last=st.booleans())
    def warm(self, at: int, share: float, computed: int, is_last: bool) -> None:
        job = self.ever[at % len(self.ever)]
        if job not in self.books.desk.preloads.jobs:
            return
        self.books.desk.warmed(job, 1.0 if is_last else share, computed, 0.01, self.now)
        if is_last and job in self.books.desk.preloads.jobs:
            self.books.desk.finished(job, self.now)

    @precondition(lambda self: self.ever)
    @rule(at=which, share=shares, fails=st.booleans())
    def engine_lacks(self, at: int, share: float, fails: bool) -> None:
        job = self.ever[at % len(self.ever)]
        self.books.desk.had(job, share)
        if fails:
            self.books.desk.failed(job, "it does not keep it", self.now)

    @rule(session=sessions, prompt=prompts)
    def ask(self, session: str, prompt: str) -> None:
        keys = _keys(prompt)
        self.running.append((session, keys, self.books.desk.find(keys)))
        self.books.desk.requested(session, "ann", keys, self.now)

    @precondition(lambda self: self.running)
    @rule(at=which, cached=st.none() | shares, is_whole=st.booleans())
    def answer(self, at: int, cached: float | None, is_whole: bool) -> None:
        session, keys, found = self.running.pop(at % len(self.running))
        if is_whole:
            self.books.desk.served(session, "ann", keys, found, cached, self.now)
        self.books.desk.ended(session, "ann", "stop" if is_whole else "cut off", keys, self.now)

    @rule(session=sessions)
    def end_session(self, session: str) -> None:
        self.books.desk.end_session(session, self.now)

    @rule()
    def restart(self) -> None:
        self.books.desk.restarted()

    @rule(seconds=st.sampled_from([0.0, 0.1, 5.0, 60.0]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        chosen = self.books.desk.next(self.now)
        assert chosen is None or chosen[0] in self.books.desk.preloads.jobs

    @invariant()
    def the_books_are_right(self) -> None:
        self.books.check()
        assert len(self.books.desk.preloads.jobs) <= self.books.desk.settings.max_pending
        assert len(self.books.desk.replica.resident) <= self.books.desk.replica.limit

    def teardown(self) -> None:
        """In the end each has an outcome, and a use where it left something."""
        self.books.desk.next(self.now + 1000.0)
        self.books.desk.next(self.now + 2000.0)
        for job in self.ever:
            result = job.ticket.result
            assert result is not None
            assert (job.ticket.use is not None) == result.outcome.is_resident


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
