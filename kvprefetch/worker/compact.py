"""Compaction of a device pool: live pages packed at the low end, each sequence's in a run where wanted.

On the loop's thread, between steps: nothing else moves then. Pages that somebody holds stay where they are.
Each phase is copied, waited for, and only then published, so a failure half-way leaves every block readable.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from kvprefetch.cache.compact import Phase, ordering, packing, runs
from kvprefetch.cache.pool import BlockPool
from kvprefetch.engines.engine import TransformersEngine
from kvprefetch.ops.copy import copy_pages
from kvprefetch.ops.pages import describe


@dataclass(frozen=True)
class Compaction:
    """What a compaction did. `runs`: contiguous runs of pages over all sequences, the copies to offload them."""

    moved_pages: int
    moved_bytes: int
    phases: int
    runs_before: int
    runs_after: int
    free_tail_pages: int  # above the highest page in use


def compact(engine: TransformersEngine, pool: BlockPool, *, order: bool) -> Compaction:
    """Pack the pool; with `order` also lay each sequence out in its order. Raises what the copy raises."""
    before = _runs(pool)
    pinned = pinned_pages(pool)
    if order:
        sequences = [[block.page for block in run] for run in pool.sequences()]
        known = {page for pages in sequences for page in pages}
        phases = ordering([*sequences, *([page] for page in pinned if page not in known)], pinned, pool.pages)
    else:
        phases = packing((block.page for block in pool.blocks()), pinned)
    moved = carry_out(phases, engine, pool)
    highest = max((block.page for block in pool.blocks()), default=-1)
    return Compaction(moved, moved * engine.shape.bytes, len(phases), before, _runs(pool), pool.pages - 1 - highest)


def pinned_pages(pool: BlockPool) -> list[int]:
    """Pages that must stay where they are: somebody reads or writes them."""
    return [block.page for block in pool.blocks() if block.refs or block.page in pool.quarantined]


def carry_out(phases: Sequence[Phase], engine: TransformersEngine, pool: BlockPool) -> int:
    """Copy and publish phase by phase; returns the pages moved. Raises what the copy raises."""
    memory = describe(engine.pool.tensor)
    for phase in phases:
        copy_pages(memory, memory, [source for source, _ in phase], [target for _, target in phase])
        engine.synchronize()
        pool.relocate(phase)
    return sum(map(len, phases))


def _runs(pool: BlockPool) -> int:
    return sum(runs([block.page for block in run]) for run in pool.sequences())
