"""A pool's index made again from what a file says lies in its pages. Pure."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from kvprefetch.cache.block import Block, State, Unused
from kvprefetch.cache.keys import BlockKey
from kvprefetch.cache.pool import BlockPool


@dataclass(frozen=True, slots=True)
class Kept:
    """A block that lies in `page`."""

    page: int
    key: BlockKey
    parent: BlockKey  # b"" for the first of its sequence
    tenant: str
    speculative_until: float | None = None  # by the pool's clock
    shared: bool = False  # a group's: `tenant` pays until others use it


def rebuild(pool: BlockPool, kept: Iterable[Kept], quarantined: Mapping[int, str], now: float) -> list[Block]:
    """Take in resident blocks, the least wanted first, and quarantined pages with whom they are charged to.

    `pool` is empty. Parents are linked in whatever order they come; one that is not there, or that would be behind
    its own child, makes its child the first of a sequence. Returns the quarantined blocks. Raises ValueError, having
    changed nothing, where a page or key is named twice.
    """
    blocks: dict[BlockKey, Block] = {}
    parents: dict[BlockKey, BlockKey] = {}
    for at, one in enumerate(kept):
        until = one.speculative_until
        block = Block(one.page, one.tenant, State.RESIDENT, now, key=one.key)
        if until is not None:
            block.unused = Unused(until)
        if one.shared:
            block.payers = {one.tenant: now}
        if blocks.setdefault(one.key, block) is not block:
            raise ValueError(f"the key of block {at} is named twice")
        parents[one.key] = one.parent
    for key, block in blocks.items():
        parent = blocks.get(parents[key])
        if parent is not None:
            block.parent = parent
            parent.adopt(block)
    _set_depths(blocks.values())
    doubtful = [Block(page, tenant, State.QUARANTINED, now) for page, tenant in quarantined.items()]
    pool.take_in([*blocks.values(), *doubtful])
    return doubtful


def _set_depths(blocks: Iterable[Block]) -> None:
    done: set[int] = set()
    for block in blocks:
        above: dict[int, Block] = {}  # page → block, upwards from this one
        at: Block | None = block
        while at is not None and at.page not in done:
            if at.page in above:  # a file may say anything
                _, top = above.popitem()
                at.disown([top])
                top.parent = None
                above[top.page] = top
                break
            above[at.page] = at
            at = at.parent
        for other in reversed(above.values()):
            other.depth = other.parent.depth + 1 if other.parent else 0
        done |= above.keys()
