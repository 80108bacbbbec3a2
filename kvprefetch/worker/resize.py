"""Another size for a running pool: what is worth least is evicted, the rest moved down, and whole segments given back.

On the loop's thread, between steps. Nothing is copied but the pages to be cut off, into pages that are free.
"""

from dataclasses import dataclass

from kvprefetch.cache.compact import vacating
from kvprefetch.cache.pool import BlockPool
from kvprefetch.engines.engine import TransformersEngine
from kvprefetch.errors import SettingsError
from kvprefetch.worker.compact import carry_out, pinned_pages


@dataclass(frozen=True)
class Resized:
    """What became of a pool. `pages` may be more than was asked, where requests held pages further up."""

    pages: int
    evicted_pages: int = 0
    moved_pages: int = 0
    bytes_given_back: int = 0  # to the device or the system; parts of segments stay


def resize(engine: TransformersEngine, pool: BlockPool, pages: int, now: float) -> Resized:
    """Have `pages` pages: fewer, or up to as many as the pool was opened with.

    Raises SettingsError for more than that or where memory to grow is short, PoolFull where requests hold too many
    to shrink so far; nothing has changed then. What a copy raises comes through; every block is readable then.
    """
    if not 1 <= pages <= engine.pool.pages:
        raise SettingsError(f"pool.size: {pages} pages; this pool was opened with {engine.pool.pages}")
    if pages >= pool.pages:
        engine.pool.back(pool.pages, pages)
        pool.resize(pages)
        return Resized(pages)
    evictions = pool.evictions
    pool.vacate(pool.pages - pages, now)
    phases = vacating((block.page for block in pool.blocks()), pinned_pages(pool), pages)
    moved = carry_out(phases, engine, pool)
    highest = max((block.page for block in pool.blocks()), default=-1)
    kept, before = max(pages, highest + 1), pool.pages
    pool.resize(kept)
    engine.synchronize()
    return Resized(kept, pool.evictions - evictions, moved, engine.pool.release(kept, before))
