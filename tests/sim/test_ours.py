"""kvprefetch's own policies on a small machine: what is foreseen is there, and what is wrong costs nobody."""

import dataclasses
import random
from functools import partial

import pytest
from test_replay import SMALL, ask, replay, trace

from kvprefetch.cache.guard import Guard
from kvprefetch.cache.spans import Span
from kvprefetch.plan.budget import Budget
from kvprefetch.sim import ours
from kvprefetch.sim.arrivals import Signals
from kvprefetch.sim.clock import VirtualClock
from kvprefetch.sim.machine import Machine
from kvprefetch.sim.ours import ByIndex, Planned
from kvprefetch.sim.report import Served
from kvprefetch.sim.trace import Request, Trace
from kvprefetch.sim.worker import Live, SimWorker

ROUNDS = 40
PERIOD = 100.0
MACHINE = dataclasses.replace(SMALL, chunk_s=0.1, block_tokens=1)
TRUE = Signals(recall=1.0, precision=1.0, lead=5.0)
FALSE = Signals(recall=1.0, precision=0.0, lead=5.0)


@pytest.fixture(autouse=True)
def small_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Credit in the proportions of the machine: that of a real one would never be used up here."""
    monkeypatch.setattr(ours, "Budget", partial(Budget, start=60.0, cap=600.0, trickle=1e-3))


def visits(name: str, number: int, at: float, count: int, rounds: int = ROUNDS) -> tuple[Request, ...]:
    """A session that is back every `PERIOD` seconds with the same context."""
    return tuple(ask(name, at + PERIOD * k, 1000 * number, count) for k in range(rounds))


def in_turn() -> Trace:
    """Two sessions for which there is no room at once: each displaces the other."""
    return trace(visits("a", 1, 0.0, 12), visits("b", 2, 50.0, 15))


def late_half(served: list[Served]) -> list[Served]:
    """What was served when there was something to learn from."""
    return [s for s in served if s.at >= PERIOD * ROUNDS / 2]


def test_a_signalled_return_is_brought_back_before_it_comes() -> None:
    _, served = replay(in_turn(), signals=TRUE).serve("kvprefetch")
    assert all((s.host, s.recomputed) == (0, 0) for s in late_half(served))
    assert all(s.ttft_s == pytest.approx(1.0) for s in late_half(served))
    _, reactive = replay(in_turn(), signals=TRUE).serve("reactive")
    assert all(s.host > 0 and s.ttft_s > 1.3 for s in late_half(reactive))


def test_what_was_brought_back_and_used_is_accounted_for() -> None:
    report, _ = replay(in_turn(), signals=TRUE).serve("kvprefetch")
    moved, useful = report["prefetch"]["moved_tokens"], report["prefetch"]["useful_tokens"]
    assert moved >= useful > ROUNDS * 5
    assert report["prefetch"]["late_share"] < 0.1


def crowd(false: int) -> Trace:
    """Six who share the GPU in turns, and eight who never come again until the end: false signals are about these."""
    regulars = [visits(f"r{n}", n, 16.0 * n, 3, false // 6 + 2) for n in range(1, 7)]
    end = PERIOD * (false // 6 + 3)
    gone = [
        (ask(f"gone{n}", n, 90_000 + 100 * n, 6), ask(f"gone{n}", end + 50 * n, 90_000 + 100 * n, 6)) for n in range(8)
    ]
    return trace(*regulars, *gone)


@pytest.mark.parametrize("policy", ["kvprefetch", "kvprefetch-inferred"])
def test_a_hundred_false_signals_leave_follow_ups_as_fast_as_they_were(policy: str) -> None:
    world = replay(crowd(100), signals=FALSE)
    report, served = world.serve(policy)
    plain, reactive = world.serve("reactive")
    for key in ("p50", "p99", "mean"):
        assert report["ttft_s"]["follow_up"][key] <= 1.01 * plain["ttft_s"]["follow_up"][key] + 0.05
    assert len(served) == len(reactive)
    assert report["prefetch"]["moved_tokens"] < 0.5 * 100 * 6  # a few were believed


def test_a_session_that_has_ended_keeps_nothing_from_others() -> None:
    """Many that never come again pass through; those that do keep their place, which LRU gives away."""
    stay = [visits(f"s{n}", n, 20.0 * n, 3) for n in range(1, 5)]
    passing = [(ask(f"once{k}", 30 + 25 * k, 50_000 + 100 * k, 4),) for k in range(4 * ROUNDS)]
    world = replay(trace(*stay, *passing))
    shares = {}
    for policy in ("reactive", "by-index"):
        late = [s for s in late_half(world.serve(policy)[1]) if s.is_follow_up]
        shares[policy] = sum(s.gpu for s in late) / sum(s.gpu + s.host + s.recomputed for s in late)
    assert shares["reactive"] < 0.5
    assert shares["by-index"] > 0.9


@pytest.mark.parametrize("policy", ["by-index", "kvprefetch", "kvprefetch-inferred"])
def test_the_same_seed_gives_the_same_report(policy: str) -> None:
    reports = [replay(crowd(60), signals=Signals(0.7, 0.5, 4), seed=5).run(policy) for _ in range(2)]
    for report in reports:
        report.pop("wall_s")
    assert reports[0] == reports[1]


def test_the_report_says_how_often_the_guard_fell_back() -> None:
    fine = replay(in_turn()).run("by-index")["guard"]
    assert fine["fallbacks"] == 0
    assert 0 <= fine["share"] <= 1
    assert "guard" not in replay(in_turn()).run("reactive")


def test_the_guard_sees_every_request_and_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str, float]] = []
    for name in ("requested", "ended"):
        monkeypatch.setattr(Guard, name, lambda guard, path, t, session, now, name=name: seen.append((name, session)))
    replay(trace((ask("a", 0, 100, 4, busy_s=30.0),), (ask("b", 10, 200, 4),))).run("by-index")
    assert seen == [("requested", "a"), ("requested", "b"), ("ended", "b"), ("ended", "a")]


def worker_of(strategy: ByIndex, machine: Machine = MACHINE) -> tuple[SimWorker, VirtualClock, list[Live]]:
    """A worker, its clock, and what it has served."""
    clock, served = VirtualClock(), list[Live]()
    return SimWorker(machine, clock, strategy, served.append), clock, served


def test_the_index_of_a_moment_is_that_of_the_predictor() -> None:
    """Whatever is remembered for the moment must be what asking again would give."""
    strategy = ByIndex()
    worker, clock, _ = worker_of(strategy)
    draw = random.Random(4)
    checked = 0

    def check(span: Span, now: float) -> None:
        nonlocal checked
        sessions = strategy.sessions
        is_current = sessions.is_current(span.session, span.last_used)
        expected = sessions.index(span.session, now) if is_current else 1e-9 / (1 + now - span.last_used)
        assert strategy._index(span, now) == expected
        checked += is_current

    def look(again: int = 4) -> None:
        """Before and after whatever happens at this moment."""
        for span in worker.gpu.spans():
            check(span, clock.now)
        if again:
            clock.at(clock.now, lambda: look(again - 1))

    for k in range(200):
        n = draw.randrange(6)
        clock.at(10.0 * k, look)
        clock.at(10.0 * k, lambda k=k, n=n: worker.arrive(ask(f"s{n}", 10.0 * k, 100 * n, 3)))
        for end in (1.0, 1.3, 4.0):
            clock.at(10.0 * k + end, look)
    clock.run()
    assert checked > 500


def test_what_is_kept_per_session_is_bounded() -> None:
    strategy = Planned(2.3, infers=True)
    strategy.sessions.max_sessions = 10
    worker, clock, served = worker_of(strategy)
    for k in range(300):
        number = k // 30 * 6 + k % 6  # six in turns, and then six others
        request = ask(f"s{number}", 20.0 * k, 100 * number, 5)
        clock.at(request.at, lambda request=request: worker.arrive(request))
        clock.at(request.at + 110, lambda request=request: strategy.signalled(request))
    clock.run()
    assert len(served) == 300
    for kept in (strategy.latest, strategy.sessions.known, strategy.accounts, strategy.brought):
        assert len(kept) <= 10
    assert strategy.accounts
