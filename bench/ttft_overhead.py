"""What our own bookkeeping costs a request: keys, match, reasons of misses, allocation, release."""

import time
from statistics import median

from kvprefetch.cache.evict import Demand
from kvprefetch.cache.misses import explain
from kvprefetch.cache.pool import BlockPool
from kvprefetch.cache.sequence import Owner, PagedSequence
from kvprefetch.inprocess import Local

TOKENS = 4096


def overhead_ms(kv: Local, repeats: int = 200) -> float:
    """Median milliseconds for a 4,096-token prompt, half of them with the whole prompt resident."""
    block = kv.engine.block_tokens
    pool, owner = BlockPool(2 * TOKENS // block), Owner(b"root", "bench")
    times = []
    for turn in range(repeats):
        tokens = [turn // 2] * TOKENS
        start = time.perf_counter()
        sequence = PagedSequence(pool, owner, tokens, block)
        hits = len(pool.match(sequence.keys))
        explain(pool, sequence.keys, hits, block)
        sequence.open(TOKENS, Demand("bench", speculative=False, now=float(turn)))
        sequence.complete(TOKENS)
        sequence.close()
        times.append((time.perf_counter() - start) * 1000)
    return median(times)
