"""The pools that fairness is measured against: hard partitions, and max-min by usage."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvprefetch.cache.evict import Demand
from kvprefetch.cache.spans import SpanPool
from kvprefetch.errors import PoolFull
from kvprefetch.sim.clock import VirtualClock
from kvprefetch.sim.divided import DividedPool, DividedWorker
from kvprefetch.sim.machine import Machine
from kvprefetch.sim.maxmin import MaxMinPool
from kvprefetch.sim.trace import Request
from kvprefetch.sim.worker import Live

FIRST = {"ann": 1000, "bob": 2000, "cat": 3000}


def keep(pool: SpanPool, tenant: str, number: int, count: int, now: float) -> int:
    """Compute `count` blocks of a tenant's sequence and let go of them: how many were there."""
    path = ((FIRST[tenant] + 100 * number, count),)
    here = pool.match(path)
    pool.hold(path, here)
    try:
        pool.reserve(count - here, Demand(tenant, speculative=False, now=now))
    except PoolFull:
        pool.release(path, here)
        raise
    pool.unreserve(count - here, tenant)
    pool.insert(path, count, tenant, f"{tenant}-{number}", now)
    pool.release(path, here)
    pool.touch(path, count, tenant, f"{tenant}-{number}", now)
    pool.check()
    return here


def resident(pool: SpanPool, tenant: str) -> int:
    return sum(span.count for span in pool.spans() if span.tenant == tenant)


# -- hard partitions ---------------------------------------------------------------------------------------
def test_a_part_is_its_tenants_alone() -> None:
    pool = DividedPool(20, ["ann", "bob"])
    keep(pool, "ann", 0, 4, 0)
    for number in range(5):
        keep(pool, "bob", number, 5, 1 + number)
    assert (resident(pool, "ann"), resident(pool, "bob")) == (4, 10)
    assert keep(pool, "ann", 0, 4, 9) == 4


def test_what_is_not_used_is_wasted() -> None:
    pool = DividedPool(20, ["ann", "bob"])
    with pytest.raises(PoolFull):
        keep(pool, "bob", 0, 11, 0)
    assert pool.free == 20


def test_in_a_divided_worker_nobody_waits_for_another() -> None:
    machine = Machine(gpu_tokens=20, host_tokens=40, block_tokens=1)
    clock, served = VirtualClock(), list[Live]()
    worker = DividedWorker(machine, clock, ["ann", "bob"], served.append)
    for tenant, number, busy_s in (("bob", 0, 100.0), ("bob", 1, 1.0), ("ann", 0, 1.0)):
        path = ((FIRST[tenant] + 100 * number, 8),)
        worker.arrive(Request(f"{tenant}-{number}", tenant, 0.0, 9, 0, busy_s, path))
    clock.run()
    assert [live.request.session for live in served] == ["bob-0", "ann-0", "bob-1"]
    assert served[-1].admitted_at == 100.0


def test_of_a_prompt_longer_than_its_part_the_beginning_is_kept() -> None:
    machine = Machine(gpu_tokens=20, host_tokens=40, block_tokens=1)
    clock, served = VirtualClock(), list[Live]()
    worker = DividedWorker(machine, clock, ["ann", "bob"], served.append)
    worker.arrive(Request("ann-0", "ann", 0.0, 30, 0, 1.0, ((1000, 29),)))
    clock.run()
    assert (resident(worker.gpu, "ann"), resident(worker.host, "ann")) == (10, 20)


# -- max-min by usage --------------------------------------------------------------------------------------
def test_whoever_keeps_most_gives_way() -> None:
    pool = MaxMinPool(20)
    keep(pool, "ann", 0, 4, 0)
    for number in range(3):
        keep(pool, "bob", number, 5, 1 + number)
    keep(pool, "cat", 0, 4, 9)
    assert (resident(pool, "ann"), resident(pool, "bob"), resident(pool, "cat")) == (4, 12, 4)
    assert pool.match(((FIRST["bob"], 5),)) == 2  # the oldest of its own went


def test_what_a_request_holds_is_not_counted() -> None:
    """So whoever keeps little gives way to one that pins much."""
    pool = MaxMinPool(20)
    keep(pool, "ann", 0, 6, 0)
    path = ((FIRST["bob"], 14),)
    keep(pool, "bob", 0, 14, 1)
    pool.hold(path, 14)
    keep(pool, "cat", 0, 3, 2)
    assert (resident(pool, "ann"), resident(pool, "bob")) == (3, 14)
    with pytest.raises(PoolFull):
        keep(pool, "cat", 1, 7, 3)


def test_victims_are_taken_in_turns_from_equals() -> None:
    pool = MaxMinPool(20)
    for number in range(2):
        keep(pool, "ann", number, 5, number)
        keep(pool, "bob", number, 5, number)
    keep(pool, "cat", 0, 6, 9)
    assert (resident(pool, "ann"), resident(pool, "bob"), resident(pool, "cat")) == (7, 7, 6)


STEPS = st.lists(
    st.tuples(st.sampled_from(sorted(FIRST)), st.integers(0, 3), st.integers(1, 9), st.booleans()), max_size=60
)


@settings(max_examples=100, deadline=None)
@given(STEPS)
def test_the_count_of_unheld_blocks_is_exact(steps: list[tuple[str, int, int, bool]]) -> None:
    pool, held = MaxMinPool(24), list[tuple[tuple[tuple[int, int], ...], int]]()
    for now, (tenant, number, count, holds) in enumerate(steps):
        try:
            keep(pool, tenant, number, count, float(now))
        except PoolFull:
            continue
        path = ((FIRST[tenant] + 100 * number, count),)
        if holds:
            pool.hold(path, count)
            held.append((path, count))
        elif held:
            pool.release(*held.pop(0))
        unheld = {name: sum(s.count for s in pool.spans() if s.tenant == name and not s.refs) for name in FIRST}
        assert {name: pool.unheld[name] for name in FIRST} == unheld
