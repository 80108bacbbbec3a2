"""Tenants on one replayed worker, and what is measured of them."""

import pytest

from kvprefetch.sim.baselines import Reactive
from kvprefetch.sim.clock import VirtualClock
from kvprefetch.sim.machine import Machine
from kvprefetch.sim.tenants import Flood
from kvprefetch.sim.together import Found, Together, between, gpu_hit, hit, jain, ttft_p99, worst_window
from kvprefetch.sim.trace import Request, Trace
from kvprefetch.sim.worker import Live, Record, SimWorker

SMALL = Machine(
    gpu_tokens=20, host_tokens=40, block_tokens=1, kv_bytes_per_token=1e9, reload_gbps=10, prefill_tflops=1e-3,
    params=5e8, layers=0, slice_s=None,
)  # fmt: skip
"""One token: 1 s of prefill, 0.1 s of loading."""


def lru(machine: Machine, clock: VirtualClock, record: Record) -> SimWorker:
    return SimWorker(machine, clock, Reactive(), record)


def session(tenant: str, first: int, count: int, *times: float) -> tuple[Request, ...]:
    """The same blocks again and again."""
    return tuple(Request(f"{tenant}-{first}", tenant, at, count + 1, 0, 0.0, ((first, count),)) for at in times)


def found(tenant: str, at: float, reusable: int, gpu: int, host: int = 0, ttft_s: float = 1.0) -> Found:
    request = Request(f"{tenant}-{at}", tenant, at, 11, 0, 0.0, ((int(1000 * at), 10),))
    return Found(Live(request, 10, admitted_at=at, ttft_s=ttft_s, ends_at=at + ttft_s), reusable, gpu, host)


CALM = Trace(1, (session("ann", 100, 8, 0, 100, 200, 300), session("bob", 200, 8, 50, 150, 250, 350)), is_placed=True)


def test_without_a_flood_all_is_there() -> None:
    served = Together(CALM, SMALL).serve(lru)
    assert len(served) == 8
    assert gpu_hit(served) == 1.0


def test_a_flood_takes_what_others_had_and_is_not_among_those_who_are_measured() -> None:
    flood = Flood(rate=0.04, start_s=100.0, end_s=300.0, tokens=12).requests(1, seed=0)
    served = Together(CALM, SMALL).serve(lru, flood, apart=True)
    assert {each.tenant for each in served} == {"ann", "bob"}
    assert gpu_hit(served) < hit(served) < 1
    assert [each.at for each in served] == [0, 50, 100, 150, 200, 250, 300, 350]


def test_a_flood_with_an_engine_of_its_own_takes_nobody_s_turn() -> None:
    flood = Flood(rate=0.5, start_s=90.0, end_s=300.0, tokens=6).requests(1, seed=0)
    roomy = Machine(**{**{f: getattr(SMALL, f) for f in SMALL.__dataclass_fields__}, "gpu_tokens": 4000})
    apart, shared = (Together(CALM, roomy).serve(lru, flood, apart=apart) for apart in (True, False))
    assert ttft_p99(between(apart, 60, 400)) == pytest.approx(1.0)
    assert ttft_p99(between(shared, 60, 400)) > 10


def test_hits_are_weighed_by_tokens() -> None:
    runs = [found("ann", 1, 10, 5, 5), found("bob", 2, 30, 0, 15), found("bob", 3, 0, 0)]
    assert gpu_hit(runs) == pytest.approx(5 / 40)
    assert hit(runs) == pytest.approx(25 / 40)
    assert gpu_hit([]) == 0.0


def test_jain_tells_how_equal_hits_are() -> None:
    assert jain([found("ann", 1, 10, 5), found("bob", 2, 20, 10)]) == pytest.approx(1.0)
    assert jain([found("ann", 1, 10, 5), found("bob", 2, 20, 0)]) == pytest.approx(0.5)
    assert jain([found("ann", 1, 10, 5), found("bob", 2, 0, 0)]) == pytest.approx(1.0)  # who can have nothing is none


def test_the_worst_window_is_of_one_tenant_and_one_minute() -> None:
    """Each looks up twice; a private pool would hold everything."""
    first = [found(name, at, 0, 0) for name, at in (("ann", 1.0), ("bob", 2.0))]
    again = [(first[0], 30.0, 10), (first[1], 40.0, 6), (first[1], 50.0, 10), (first[0], 70.0, 10)]
    runs = [*first]
    for earlier, at, gpu in again:
        request = earlier.live.request
        later = Request(request.session, request.tenant, at, 11, 0, 0.0, request.path)
        runs.append(Found(Live(later, 10, admitted_at=at, ttft_s=1.0, ends_at=at + 1), 10, gpu, 1))
    worst = worst_window(runs, lambda tenant: 10)
    assert (worst.points, worst.windows, worst.below) == (pytest.approx(-20.0), 3, 1)
    assert worst_window(runs, lambda tenant: 10, with_host=True).points == pytest.approx(-10.0)
    assert worst_window(runs, lambda tenant: 4).points == pytest.approx(40.0)  # it had more than its guarantee
