"""`LruPool` keeps what `SpanPool` keeps under `lru`, step by step."""

from random import Random

import pytest

from kvprefetch.cache.evict import Demand, lru
from kvprefetch.cache.spans import SpanPool
from kvprefetch.errors import PoolFull
from kvprefetch.sim.lru_pool import LruPool

PATHS = [tuple((1000 * p + 100 * k, 1 + (p + k) % 4) for k in range(1 + p % 3)) for p in range(12)]
PATHS += [(PATHS[2][0], (9000 + n, 3)) for n in range(4)]  # edits of one file


def state(pool: SpanPool) -> set[tuple[object, ...]]:
    return {(s.first, s.count, s.tenant, s.session, s.last_used, s.refs, s.speculative) for s in pool.spans()}


@pytest.mark.parametrize("seed", range(30))
def test_both_pools_keep_the_same_blocks(seed: int) -> None:
    pools, random = (SpanPool(30, lru), LruPool(30)), Random(seed)
    held: list[tuple[tuple[tuple[int, int], ...], int]] = []
    for step in range(300):
        now, path, tenant = float(step), random.choice(PATHS), random.choice("ab")
        blocks, speculative = sum(count for _, count in path), random.random() < 0.5
        until = now + random.choice([2.0, 50.0]) if speculative else None
        full = []
        for pool in pools:
            here = pool.match(path)
            pool.hold(path, here)
            try:
                pool.reserve(blocks - here, Demand(tenant, speculative, now))
            except PoolFull:
                full.append(pool)
            else:
                pool.unreserve(blocks - here, "ann")
                pool.insert(path, blocks, tenant, f"s{step % 5}", now, until)
                if not speculative:
                    pool.touch(path, blocks, tenant, f"s{step % 5}", now)
            pool.release(path, here)
            if step % 3 == 0:  # used again, by nobody who holds it
                pool.touch(path, pool.match(path), tenant, "again", now)
        assert len(full) in (0, 2)
        _hold_or_release(pools, held, path, random)
        assert state(pools[0]) == state(pools[1])
        for pool in pools:
            pool.check()


def _hold_or_release(pools: tuple[SpanPool, ...], held: list, path: tuple, random: Random) -> None:  # type: ignore[type-arg]
    if random.random() < 0.3:
        held.append((path, pools[0].match(path)))
        for pool in pools:
            pool.hold(*held[-1])
    if len(held) > 2:
        over = held.pop(0)
        for pool in pools:
            pool.release(*over)
