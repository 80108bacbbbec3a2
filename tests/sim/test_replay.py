"""Short traces on a small machine, replayed."""

import dataclasses

import pytest

from kvprefetch.errors import InvalidRequest
from kvprefetch.sim.arrivals import Signals, draw_signals, place
from kvprefetch.sim.machine import Machine
from kvprefetch.sim.policies import make_strategy
from kvprefetch.sim.replay import Experiment, Replay
from kvprefetch.sim.trace import Request, Trace

SMALL = Machine(
    gpu_tokens=20, host_tokens=200, kv_bytes_per_token=1e9, reload_gbps=10, prefill_tflops=1e-3, params=5e8,
    layers=0, slice_s=None,
)  # fmt: skip
"""One token: 1 s of prefill, 0.1 s of loading."""


def ask(session: str, at: float, first: int, count: int, busy_s: float | None = None) -> Request:
    return Request(session, "ann", at, count + 1, 0, busy_s, ((first, count),), stop="end_turn")


def trace(*sessions: tuple[Request, ...]) -> Trace:
    return Trace(1, sessions, is_placed=True)


def replay(trace: Trace, **fixed: object) -> Replay:
    return Replay(trace, dataclasses.replace(Experiment(dataclasses.replace(SMALL, chunk_s=0.1)), **fixed))


AWAY = trace(
    (ask("a", 0, 100, 10), ask("a", 1000, 100, 11)),
    (ask("b", 400, 200, 15), ask("b", 500, 200, 16)),
)
"""b displaces half of a, which comes back after a while."""


@pytest.mark.parametrize(
    ("policy", "ttft"),
    [("gpu-lru", 7.0), ("reactive", 2.6), ("oracle:2", 2.0), ("oracle:0.3", 2.4), ("belady", 2.6)],
)
def test_a_return_costs_what_is_missing(policy: str, ttft: float) -> None:
    """12 tokens: 1 is the question, 1 a new block, 10 known, of which 4 or 5 were kept."""
    _, served = replay(AWAY).serve(policy)
    back = next(s for s in served if s.at > 900)
    if policy == "gpu-lru":
        assert back.gpu + back.recomputed == 10
        assert back.ttft_s == pytest.approx(2 + back.recomputed)
    elif policy == "reactive":
        assert back.ttft_s == pytest.approx(2 + back.host / 10)
        assert back.host == 6
    else:
        assert back.ttft_s == pytest.approx(ttft, abs=0.11)


def test_demand_is_never_behind_more_than_one_chunk_of_speculation() -> None:
    busy = trace(AWAY.sessions[0], AWAY.sessions[1], (ask("c", 300, 300, 4), ask("c", 998.05, 300, 4)))
    _, served = replay(busy).serve("oracle:2")
    back = next(s for s in served if 998 < s.at < 999)
    assert back.ttft_s <= 1 + 0.4 + 0.1 + 1e-9


def test_fifo_makes_the_short_wait_for_the_long_and_slices_do_not() -> None:
    both = trace((ask("long", 0, 100, 15),), (ask("short", 0.5, 200, 1),))
    waits = {}
    for slice_s in (None, 1.0):
        machine = dataclasses.replace(SMALL, slice_s=slice_s)
        _, served = Replay(both, Experiment(machine)).serve("reactive")
        waits[slice_s] = next(s.ttft_s for s in served if s.at == 0.5)
    assert waits[None] > 15
    assert waits[1.0] < 5


def test_running_requests_pin_what_they_use() -> None:
    crowd = trace((ask("a", 0, 100, 12, busy_s=50.0),), (ask("b", 1, 200, 12),))
    _, served = replay(crowd).serve("reactive")
    assert served[1].ttft_s == pytest.approx(49 + 13)


@pytest.mark.parametrize("workers", [1, 2])
def test_sessions_stay_with_their_worker(workers: int) -> None:
    report = replay(AWAY, workers=workers).run("gpu-lru")
    found = report["prefix_tokens"]
    assert sum(found.values()) == 25
    assert (found["gpu"] == 25) is (workers == 2)


def test_reports_add_up_and_repeat() -> None:
    first, second = (replay(AWAY, signals=Signals(0.5, 0.5, 1), seed=3).run("trigger") for _ in range(2))
    for report in (first, second):
        report.pop("wall_s")
    assert first == second
    assert first["prefetch"]["useful_tokens"] <= first["prefetch"]["moved_tokens"]
    assert first["ttft_s"]["return_5min"]["n"] == 1


def test_signals_are_as_good_as_asked() -> None:
    many = trace(*(tuple(ask(f"s{n}", n + 10.0 * k, 1000 * n, 2) for k in range(20)) for n in range(50)))
    signals = draw_signals(many, Signals(recall=0.5, precision=0.25, lead=3), seed=0)
    returns = {(r.session, r.at - 3) for s in many.sessions for r in s[1:]}
    true = [s for s in signals if (s.latest.session, s.at) in returns]
    assert len(true) == pytest.approx(0.5 * 950, rel=0.1)
    assert len(true) / len(signals) == pytest.approx(0.25, abs=0.01)
    assert all(s.latest.at <= s.at for s in signals)
    assert not any((s.latest.session, s.at) in returns for s in draw_signals(many, Signals(1, 0, 3), seed=0))


def test_sessions_arrive_so_that_the_asked_number_is_alive() -> None:
    still = tuple((ask(f"s{n}", 0, 10 * n, 1), ask(f"s{n}", 100, 10 * n, 1)) for n in range(400))
    placed = place(Trace(1, still, is_placed=False), concurrency=8, seed=1)
    last = max(s[0].at for s in placed.sessions)
    assert 400 * 100 / last == pytest.approx(8, rel=0.15)
    assert place(placed, 3, 2) is placed


@pytest.mark.parametrize("name", ["lru", "ttl", "ttl:x", "oracle", "reactive:3"])
def test_unknown_policies_are_refused(name: str) -> None:
    with pytest.raises(InvalidRequest):
        make_strategy(name, lambda: pytest.fail("nobody needs the future"))


@pytest.mark.parametrize("wrong", [{"recall": 1.1}, {"precision": float("nan")}, {"lead": -1}])
def test_impossible_signals_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidRequest):
        Signals(**wrong)


def test_what_decides_never_sees_the_future() -> None:
    class Poisoned:
        def __getattr__(self, name: str) -> object:
            pytest.fail(f"{name} of the future was read")

    poisoned = replay(AWAY)
    poisoned.future = Poisoned  # type: ignore[assignment]
    with pytest.raises(pytest.fail.Exception, match="of the future was read"):
        poisoned.run("belady")
    for name in ("kvprefetch", "kvprefetch-inferred", "by-index"):
        assert poisoned.run(name)["requests"] == 4
