"""What an eviction takes, and what a block weighs: a pool of a million blocks that a thousand tenants share.

    python bench/fairness_pool.py

Sequences are of a hundred blocks. Tenants have equal guarantees of half of their equal share, and one in ten asks for
more all the time. Each demand is for a hundred pages at once, as a prompt's is; times are per page.
"""

import gc
import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from random import Random

import psutil

from kvprefetch.cache.block import Block
from kvprefetch.cache.evict import Demand
from kvprefetch.cache.pool import BlockPool
from kvprefetch.cache.shares import Share, Shares

BLOCKS, TENANTS, SEQUENCE = 1_000_000, 1_000, 100


@dataclass(frozen=True)
class PoolCost:
    """Microseconds per page, and bytes per block."""

    evict_us: float  # choosing victims: the decision
    make_room_us: float  # and evicting them, with all bookkeeping
    bytes_per_block: float


def measure(blocks: int = BLOCKS, tenants: int = TENANTS, demands: int = 2_000) -> PoolCost:
    """In a process of its own, so that nothing else weighs."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure, (blocks, tenants, demands))


def _measure(blocks: int, tenants: int, demands: int) -> PoolCost:
    random, keys = Random(0), _keys()
    names = [f"tenant-{number}" for number in range(tenants)]
    before = _memory()
    pool = BlockPool(blocks)
    pool.shares = Shares({name: Share(guarantee=0.5 / tenants) for name in names})
    now = 0.0
    while pool.free_pages >= SEQUENCE:
        now += 0.001
        _fill(pool, names[int(now * 1000) % tenants], keys, now)
    weighs = (_memory() - before) / blocks
    greedy = names[: max(tenants // 10, 1)]
    choosing = evicting = 0.0
    for _ in range(demands):
        now += 0.01
        demand = Demand(random.choice(greedy), speculative=False, now=now)
        missing = SEQUENCE - pool.free_pages
        began = time.perf_counter()
        victims = pool.line.choose(missing, demand)
        chosen = time.perf_counter()
        for victim in victims:
            pool.evict(victim.leaf, victim.rule)
        done = time.perf_counter()
        choosing += (chosen - began) / missing
        evicting += (done - began) / missing
        _fill(pool, demand.tenant, keys, now)
    pool.check()
    return PoolCost(1e6 * choosing / demands, 1e6 * evicting / demands, weighs)


def _fill(pool: BlockPool, tenant: str, keys: Iterator[bytes], now: float) -> None:
    parent: Block | None = None
    taken = pool.reserve(SEQUENCE, Demand(tenant, speculative=False, now=now))
    for block in taken:
        parent = pool.publish(block, next(keys), parent)
    pool.touch(taken, now, f"{tenant}-session", tenant)
    pool.release(taken)


def _keys() -> Iterator[bytes]:
    number = 0
    while True:
        yield blake2b(number.to_bytes(8), digest_size=32).digest()
        number += 1


def _memory() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


if __name__ == "__main__":
    print(measure())
