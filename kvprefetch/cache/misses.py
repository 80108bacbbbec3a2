"""Why the blocks of a prompt were not resident (law 6: every miss has a reason)."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from kvprefetch.cache.keys import BlockKey
from kvprefetch.cache.pool import BlockPool
from kvprefetch.outcomes import MissReason


@dataclass(frozen=True)
class Lookup:
    """One prompt's look-up, in blocks; `hits + loaded + sum(misses) = blocks`."""

    blocks: int
    hits: int
    misses: Counter[MissReason]
    rules: Counter[str]  # of the evicted: which rule
    diverged_at: int | None  # first token of the block where a known prefix took another turn
    loaded: int = 0  # in another tier, to be loaded


def explain(
    pool: BlockPool,
    keys: Sequence[BlockKey],
    hits: int,
    block_tokens: int,
    *,
    elsewhere: int = 0,
    failed: MissReason | None = None,
    borrowed: int = 0,
) -> Lookup:
    """Give each missing key its reason. Call before the prompt announces its own keys.

    The first `elsewhere` keys lie in another tier; `failed`: why it could not say so of the rest, if it could not.
    The first `borrowed` are shared with others: what follows those may be theirs, so it tells nothing.
    """
    misses: Counter[MissReason] = Counter()
    rules: Counter[str] = Counter()
    diverged = bool(hits > borrowed and pool.resident[keys[hits - 1]].fanout)
    loaded = max(elsewhere - hits, 0)
    diverged = diverged and not loaded
    for key in keys[hits + loaded :]:
        if pool.announced.get(key):
            misses[MissReason.IN_FLIGHT] += 1
            diverged = False  # this one goes on where a known prefix did
        elif failed is not None:
            misses[failed] += 1
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
    return Lookup(len(keys), hits, misses, rules, at, loaded)
