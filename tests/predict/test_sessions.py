"""Who comes back, and when: short stories of turns, signals and returns."""

from math import inf, isfinite, nan

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvprefetch.predict.gaps import BINS, bin_of
from kvprefetch.predict.sessions import Sessions

HOUR = 3600.0


def rounds(sessions: Sessions, gap: float, times: int = 100, tenant: str = "ann", kept: float | None = None) -> None:
    """So many sessions end a turn, one after the other, and return after `gap`."""
    for i in range(times):
        name = f"{tenant} {gap} {i}"
        sessions.turn_ended(name, tenant, sessions.now + 1.0)
        sessions.requested(name, tenant, sessions.now + gap, kept)
        sessions.ended(name, sessions.now)


def signals(sessions: Sessions, returns: bool, times: int = 30, tenant: str = "ann") -> None:
    """So many sessions are quiet for an hour, then send a signal, and return 3 s later, or are quiet for ever."""
    for i in range(times):
        name = f"{tenant} signal {i}"
        sessions.turn_ended(name, tenant, sessions.now)
        sessions.signalled(name, tenant, sessions.now + HOUR, "typing")
        if returns:
            sessions.requested(name, tenant, sessions.now + 3.0)
        sessions.ended(name, sessions.now + HOUR)


def after_signal(sessions: Sessions) -> float:
    """P(return within 10 s) of a session that has sent a signal after an hour."""
    sessions.turn_ended("asked", "ann", sessions.now)
    sessions.signalled("asked", "ann", sessions.now + HOUR, "typing")
    within = sessions.outlook("asked", sessions.now, 1.0, hold_s=10.0).within
    sessions.ended("asked", sessions.now)
    return within


# -- gaps open and end -------------------------------------------------------------------------------------
def test_a_return_ends_the_gap_since_the_turn_and_the_gap_since_the_signal() -> None:
    sessions = Sessions()
    sessions.turn_ended("s", "ann", 100.0)
    sessions.signalled("s", "ann", 110.0, "typing")
    sessions.requested("s", "ann", 112.0)
    turn, signal = sessions.gaps.cells["turn"], sessions.gaps.cells["signal", "typing"]
    for cell, age in ((turn, 12.0), (signal, 2.0)):
        ended = bin_of(age)
        assert cell.ended == [float(k == ended) for k in range(BINS)]
        assert cell.outlived == [float(k < ended) for k in range(BINS)]


def test_open_gaps_are_counted_as_they_grow_old() -> None:
    sessions = Sessions()
    sessions.turn_ended("s", "ann", 0.0)
    sessions.turn_ended("other", "ann", 100.0)
    assert sessions.gaps.cells["turn"].outlived == [float(k < bin_of(100.0)) for k in range(BINS)]
    assert sessions.gaps.cells["turn"].gaps == 0


def test_a_session_that_returns_fast_is_worth_more_than_one_that_has_been_quiet_for_long() -> None:
    sessions = Sessions()
    rounds(sessions, 5.0)
    sessions.turn_ended("s", "ann", sessions.now)
    fresh = sessions.index("s", sessions.now)
    look = sessions.outlook("s", sessions.now, work_s=1.0)
    assert look.within > 0.9
    assert look.before_ready < 0.1
    assert look.residency == pytest.approx(5.0, abs=1.0)
    assert look.index == fresh
    assert sessions.index("s", sessions.now + HOUR) < fresh / 100


def test_a_running_request_is_held_at_any_price_and_an_unknown_session_at_none() -> None:
    sessions = Sessions()
    sessions.requested("s", "ann", 1.0)
    assert sessions.index("s", 1.0) == inf
    assert sessions.index("unknown", 1.0) == 0.0
    assert sessions.outlook("s", 1.0, 1.0).within == sessions.outlook("unknown", 1.0, 1.0).within == 0.0
    assert not sessions.is_quiet("s")
    sessions.turn_ended("s", "ann", 2.0)
    assert sessions.is_quiet("s")
    assert 0 < sessions.index("s", 2.0) < inf


def test_an_answer_that_ended_twice_counts_one_gap_from_the_later_time() -> None:
    sessions = Sessions()
    sessions.turn_ended("s", "ann", 10.0)
    sessions.turn_ended("s", "ann", 20.0)
    sessions.requested("s", "ann", 23.0)
    sessions.requested("s", "ann", 23.0)
    turn = sessions.gaps.cells["turn"]
    assert turn.gaps == 1
    assert turn.ended[bin_of(3.0)] == 1


def test_a_session_that_is_over_is_forgotten_and_counts_no_more() -> None:
    sessions = Sessions()
    sessions.turn_ended("s", "ann", 10.0)
    sessions.ended("s", 11.0)
    sessions.ended("s", 11.0)
    counted = sum(sessions.gaps.cells["turn"].outlived)
    sessions.requested("other", "ann", 1e6)
    assert sessions.index("s", 12.0) == 0.0
    assert sessions.idle("s", 12.0) == -1
    assert sum(sessions.gaps.cells["turn"].outlived) == counted == bin_of(1.0)


def test_another_run_goes_on_with_what_was_learnt_on_a_clock_of_its_own() -> None:
    sessions = Sessions()
    rounds(sessions, 5.0)
    sessions.turn_ended("s", "ann", sessions.now)
    sessions.resumed()
    assert sessions.now == 0.0
    assert not sessions.is_quiet("s")
    counted = list(sessions.gaps.cells["turn"].outlived)
    sessions.requested("s", "ann", 1000.0)
    assert sessions.gaps.cells["turn"].outlived == counted
    sessions.turn_ended("s", "ann", 1001.0)
    assert sessions.outlook("s", 1001.0, 1.0).within > 0.9


def test_a_context_of_nobody_is_worth_what_most_are_at_its_age() -> None:
    sessions = Sessions()
    rounds(sessions, 5.0)
    assert sessions.unknown_index(2.0) > 10 * sessions.unknown_index(60.0) > 0
    assert sessions.unknown_index(-1.0) == sessions.unknown_index(0.0)


# -- signals -----------------------------------------------------------------------------------------------
def test_a_signal_raises_the_index_of_a_quiet_session() -> None:
    sessions = Sessions()
    signals(sessions, returns=True)
    sessions.turn_ended("s", "ann", sessions.now)
    later = sessions.now + HOUR
    before = sessions.index("s", later)
    sessions.signalled("s", "ann", later, "typing")
    assert sessions.index("s", later) > 5 * before
    assert sessions.outlook("s", later, 1.0).within > 0.8


def test_a_signal_is_ignored_while_a_request_runs() -> None:
    sessions = Sessions()
    sessions.requested("s", "ann", 1.0)
    sessions.signalled("s", "ann", 2.0, "typing")
    sessions.turn_ended("s", "ann", 3.0)
    sessions.requested("s", "ann", 4.0)
    assert set(sessions.gaps.cells) & {("signal", "typing")} == set()


def test_a_newer_signal_is_counted_from_instead_of_the_older() -> None:
    sessions = Sessions()
    sessions.turn_ended("s", "ann", 0.0)
    sessions.signalled("s", "ann", 10.0, "typing")
    sessions.signalled("s", "ann", 20.0, "typing")
    sessions.requested("s", "ann", 21.0)
    signal = sessions.gaps.cells["signal", "typing"]
    assert signal.gaps == 1
    assert signal.ended[bin_of(1.0)] == 1


def test_a_signal_of_a_session_that_was_never_here_is_no_running_request() -> None:
    sessions = Sessions()
    sessions.signalled("s", "ann", 1.0, "typing")
    assert sessions.index("s", 1.0) < inf
    assert not sessions.is_quiet("s")
    assert not sessions.is_current("s", 1.0)


def test_false_signals_alone_lower_what_a_signal_is_believed() -> None:
    sessions = Sessions()
    signals(sessions, returns=True)
    beliefs = [after_signal(sessions)]
    for _ in range(4):
        signals(sessions, returns=False)
        beliefs.append(after_signal(sessions))
    assert beliefs[0] > 0.9
    assert max(beliefs[1:]) < 0.2


# -- what is kept ------------------------------------------------------------------------------------------
def test_how_much_is_kept_is_learnt_by_idleness() -> None:
    sessions = Sessions()
    rounds(sessions, 2.0, kept=1.0)
    rounds(sessions, HOUR, kept=0.2)
    sessions.turn_ended("s", "ann", sessions.now)
    assert sessions.kept("s", sessions.now + 2.0) > 0.9
    assert sessions.kept("s", sessions.now + HOUR) < 0.3
    assert sessions.kept("unknown", sessions.now) == 0.0
    assert sessions.idle("s", sessions.now + 2.0) < sessions.idle("s", sessions.now + HOUR)


@pytest.mark.parametrize("kept", [nan, inf, -inf, -3.0, 7.0])
def test_a_kept_share_that_cannot_be_is_bounded(kept: float) -> None:
    sessions = Sessions()
    rounds(sessions, 2.0, times=5, kept=kept)
    sessions.turn_ended("s", "ann", sessions.now)
    assert 0 <= sessions.kept("s", sessions.now + 2.0) <= 1


def test_what_an_earlier_turn_used_last_is_a_branch_that_was_left() -> None:
    sessions = Sessions()
    sessions.turn_ended("s", "ann", 10.0)
    sessions.requested("s", "ann", 20.0)
    assert not sessions.is_current("s", 20.0), "while it runs, its pages are pinned"
    sessions.turn_ended("s", "ann", 30.0)
    assert not sessions.is_current("s", 20.0)
    assert sessions.is_current("s", 30.0)
    assert not sessions.is_current("unknown", 30.0)


# -- bounds ------------------------------------------------------------------------------------------------
def test_the_longest_quiet_session_is_forgotten_first() -> None:
    sessions = Sessions(max_sessions=2)
    for session, at in (("a", 1.0), ("b", 2.0), ("a", 3.0), ("c", 4.0)):
        sessions.turn_ended(session, "ann", at)
    assert [sessions.is_quiet(s) for s in "abc"] == [True, False, True]


def test_the_gap_of_a_forgotten_session_counts_no_more() -> None:
    """Also when the session comes back: then a new gap is counted, once."""
    sessions = Sessions(max_sessions=1)
    sessions.turn_ended("s", "ann", 0.0)
    sessions.requested("other", "ann", 0.0)
    sessions.requested("s", "ann", 0.1)
    sessions.turn_ended("s", "ann", 100.0)
    sessions.requested("s", "ann", 103.0)
    turn = sessions.gaps.cells["turn"]
    assert sum(turn.ended) == 1
    assert turn.outlived == [float(k < bin_of(3.0)) for k in range(BINS)]


@pytest.mark.parametrize("now", [5.0, 1e300])
def test_a_clock_that_stands_still_piles_nothing_up(now: float) -> None:
    sessions = Sessions()
    for _ in range(2000):
        sessions.turn_ended("s", "ann", now)
        sessions.signalled("s", "ann", now, "typing")
    assert len(sessions._crossings) <= 4 + 64


def test_open_gaps_go_on_while_closed_ones_are_swept_away() -> None:
    sessions = Sessions()
    sessions.turn_ended("quiet", "ann", 5.0)
    for _ in range(200):
        sessions.turn_ended("s", "ann", 5.0)
    sessions.ended("s", 5.0)
    sessions.requested("quiet", "ann", 105.0)
    assert sessions.gaps.cells["turn"].outlived == [float(k < bin_of(100.0)) for k in range(BINS)]


NAMES = st.sampled_from("stuv")
TIMES = st.sampled_from([nan, inf, -inf, -5.0, 0.0, 1e300]) | st.floats(0, 1e5) | st.floats(0, 10)
EVENTS = st.lists(st.tuples(st.sampled_from("rtse"), NAMES, st.sampled_from(["a", "b"]), TIMES), max_size=40)


def happen(sessions: Sessions, what: str, session: str, tenant: str, at: float) -> None:
    if what == "r":
        sessions.requested(session, tenant, at, at)
    elif what == "t":
        sessions.turn_ended(session, tenant, at, "stop", 20_000)
    elif what == "s":
        sessions.signalled(session, tenant, at, "typing")
    else:
        sessions.ended(session, at)


@settings(max_examples=60, deadline=None)
@given(EVENTS)
def test_any_events_at_any_times_in_any_order(events: list[tuple[str, str, str, float]]) -> None:
    sessions, before = Sessions(max_sessions=3), 0.0
    for what, session, tenant, at in events:
        for _ in range(1 + (session == "s")):  # some come twice
            happen(sessions, what, session, tenant, at)
        assert before <= sessions.now < inf
        before = sessions.now
        assert len(sessions.known) <= 3
        assert len(sessions._crossings) <= 4 * 3 + 64
        for now in (sessions.now, at, sessions.now + 1.0):
            look = sessions.outlook(session, now, 2.0)
            assert 0 <= look.before_ready <= look.within <= 1 + 1e-9
            assert 0 <= look.residency <= look.hold_s + 1e-6
            assert isfinite(look.hold_s)
            assert look.index >= 0
            assert 0 <= sessions.kept(session, now) <= 1
    assert all(0 <= hazard < 1 for cell in sessions.gaps.cells.values() for hazard in cell.refresh().hazard)


@settings(max_examples=40, deadline=None)
@given(EVENTS)
def test_a_tenants_sessions_are_changed_by_none_of_another(events: list[tuple[str, str, str, float]]) -> None:
    """All that they share is how often gaps end and how much is kept; the sessions of each go on as if alone."""

    def ann(with_others: bool) -> list[object]:
        sessions, clock = Sessions(), 0.0
        for what, session, tenant, at in events:
            clock += at if 0 <= at < 1e6 else 0.0
            if tenant == "a" or with_others:
                happen(sessions, what, tenant + session, tenant, clock)
        return [
            (q.session, q.tenant, q.tokens, q.longest, q.turn_at, q.turn and q.turn.since, q.signal and q.signal.since)
            for q in sessions.known.values()
            if q.tenant == "a"
        ]

    assert ann(with_others=True) == ann(with_others=False)


def test_a_new_tenant_starts_from_what_is_common_and_soon_speaks_for_itself() -> None:
    sessions = Sessions()
    rounds(sessions, 5.0, times=200)
    sessions.turn_ended("bob's", "bob", sessions.now)
    assert sessions.outlook("bob's", sessions.now, 1.0, hold_s=6.0).within > 0.9
    rounds(sessions, 600.0, times=100, tenant="bob")
    for session, tenant in (("bob's", "bob"), ("ann's", "ann")):
        sessions.turn_ended(session, tenant, sessions.now)
    bob, ann = (sessions.outlook(s, sessions.now, 1.0, hold_s=6.0).within for s in ("bob's", "ann's"))
    assert bob < 0.3
    assert bob < ann / 2
