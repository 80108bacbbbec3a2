"""Why the blocks of a prompt were not resident (law 6: every miss has a reason)."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from kvprefetch.cache.keys import BlockKey
from kvprefetch.cache.pool import BlockPool
from kvprefetch.outcomes import MissReason


@dataclass(frozen=True)
class Lookup:
    """One prompt's look-up, in blocks; `hits + sum(misses) = blocks`."""

    blocks: int
    hits: int
    misses: Counter[MissReason]
    rules: Counter[str]  # of the evicted: which rule
    diverged_at: int | None  # first token of the block where a known prefix took another turn


def explain(pool: BlockPool, keys: Sequence[BlockKey], hits: int, block_tokens: int) -> Lookup:
    """Give each of `keys[hits:]` its reason. Call before the prompt announces its own keys."""
    misses: Counter[MissReason] = Counter()
    rules: Counter[str] = Counter()
    diverged = bool(hits and pool.resident[keys[hits - 1]].children)
    for key in keys[hits:]:
        if pool.announced.get(key):
            misses[MissReason.IN_FLIGHT] += 1
            diverged = False  # this one goes on where a known prefix did
        elif key in pool.evicted:
            misses[MissReason.EVICTED] += 1
            rules[pool.evicted[key]] += 1
            diverged = False
        elif diverged:
            misses[MissReason.DIVERGED] += 1
        elif pool.forgot_evictions:
            misses[MissReason.UNKNOWN] += 1
        else:
            misses[MissReason.NEVER_SEEN] += 1
    at = hits * block_tokens if misses[MissReason.DIVERGED] else None
    return Lookup(len(keys), hits, misses, rules, at)
