"""What the tiers that keep blocks in numbered pages have in common: the contract's words, said of a `BlockPool`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from kvprefetch.cache.block import Block, Hold
from kvprefetch.cache.keys import BlockKey
from kvprefetch.cache.pool import BlockPool
from kvprefetch.tiers.contract import Incoming, Usage


def require_size(buffers: Sequence[memoryview], block_bytes: int) -> None:
    """Raise ValueError where a buffer is not one block's."""
    if wrong := [view.nbytes for view in buffers if view.nbytes != block_bytes]:
        raise ValueError(f"blocks have {block_bytes} bytes, not {wrong[0]}")


@contextmanager
def held(pool: BlockPool) -> Iterator[Hold]:
    """A holder for as long as this lasts; add blocks to it together with their references."""
    hold = Hold()
    pool.holders.add(hold)
    try:
        yield hold
    finally:
        pool.holders.discard(hold)
        pool.release(reversed(hold.blocks))


def store_leading(pool: BlockPool, blocks: Sequence[Incoming], put: Callable[[Incoming], Block | None]) -> int:
    """How many leading blocks are held when `put` has had a go at those that were not.

    It returns a resident block with a reference for the caller, or None. What was stored is held meanwhile, so that
    the next does not displace it.
    """
    with held(pool) as hold:
        for incoming in blocks:
            block = pool.resident.get(incoming.key)
            if block is not None:
                pool.hold([block])
            else:
                block = put(incoming)
                if block is None:
                    break
            hold.blocks.append(block)
        return len(hold.blocks)


def discard_unused(pool: BlockPool, keys: Sequence[BlockKey], forget: Callable[[Block], None]) -> int:
    """How many of the blocks were forgotten: those that nobody uses. The last goes first, so that it is a leaf."""
    forgotten = 0
    for key in reversed(keys):
        block = pool.resident.get(key)
        if block is not None and not pool.is_in_use(block):
            forget(block)
            forgotten += 1
    return forgotten


def usage_of(pool: BlockPool, block_bytes: int, counters: Mapping[str, int]) -> Usage:
    """The pool's figures in bytes."""
    charged = {tenant: round(kinds.total() * block_bytes) for tenant, kinds in pool.accounts.charged.items()}
    blocks = len(pool.resident)
    return Usage(blocks, blocks * block_bytes, pool.pages * block_bytes, charged, dict(counters))
