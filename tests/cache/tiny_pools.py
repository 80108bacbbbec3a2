"""Words for short stories on tiny pools: blocks of four tokens, one letter a token."""

from hashlib import sha256

from kvprefetch.cache.block import Block
from kvprefetch.cache.evict import Demand
from kvprefetch.cache.keys import BlockKey, block_keys
from kvprefetch.cache.pool import BlockPool
from kvprefetch.cache.sequence import Owner, PagedSequence

BLOCK = 4


def letters(text: str) -> list[int]:
    """Token ids of `text`."""
    return [ord(letter) for letter in text]


def owner(tenant: str) -> Owner:
    """The owner of `tenant`'s private namespace."""
    return Owner(sha256(tenant.encode()).digest(), tenant)


def keys_of(text: str, tenant: str = "ann") -> list[BlockKey]:
    """Keys of the full blocks of `text`."""
    return block_keys(owner(tenant).root, letters(text), BLOCK)


def live(tenant: str = "ann", now: float = 0.0) -> Demand:
    """A live request of `tenant` needs pages."""
    return Demand(tenant, speculative=False, now=now)


def preload(tenant: str = "ann", now: float = 0.0) -> Demand:
    """A preload for `tenant` needs pages."""
    return Demand(tenant, speculative=True, now=now)


def opened(pool: BlockPool, text: str, tenant: str = "ann", *, room: int = 0, now: float = 0.0) -> PagedSequence:
    """A live sequence of `text` with room for `room` more tokens."""
    sequence = PagedSequence(pool, owner(tenant), letters(text), BLOCK)
    sequence.open(len(text) + room, live(tenant, now))
    return sequence


def keep(
    pool: BlockPool, text: str, tenant: str = "ann", *, now: float = 0.0, until: float | None = None
) -> list[Block]:
    """Compute `text` and let go of it: its blocks, resident and unheld; speculation on hold if `until` is given."""
    sequence = PagedSequence(pool, owner(tenant), letters(text), BLOCK)
    sequence.open(len(text), Demand(tenant, speculative=until is not None, now=now))
    sequence.complete(len(text), speculative_until=until)
    blocks = sequence.blocks[: sequence.shared]
    sequence.close()
    return blocks


def resident(pool: BlockPool, text: str, tenant: str = "ann") -> str:
    """The part of `text` that the pool holds."""
    return text[: len(pool.match(keys_of(text, tenant))) * BLOCK]


def snapshot(pool: BlockPool) -> object:
    """All that a refused demand must leave as it was."""
    pool.check()
    return (
        sorted(pool.free),
        {key: (block.page, block.refs, block.last_used) for key, block in pool.resident.items()},
        sorted(pool.in_flight),
        sorted(pool.quarantined),
        sorted(pool.leaves),
        set(pool.holders),
        dict(pool.announced),
        dict(pool.evicted),
    )
