"""A block: the KV of a fixed run of tokens, in one page of a pool."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from kvprefetch.cache.keys import BlockKey


class State(Enum):
    """Where a block stands; a page without a block is free."""

    IN_FLIGHT = "in_flight"  # reserved; its bytes are being written; private to its holder
    RESIDENT = "resident"  # published under its key; its bytes never change again
    QUARANTINED = "quarantined"  # its bytes are not to be trusted nor its page reused
    DROPPED = "dropped"  # its bytes are damaged; its page is free when nobody can be reading it any more


class Charge(Enum):
    """As what a tenant pays for a page."""

    USED = "used"
    SPECULATIVE = "speculative"
    IN_FLIGHT = "in_flight"
    QUARANTINED = "quarantined"


@dataclass(slots=True, eq=False)
class Block:
    """One page's content. Only the pool that owns it changes it."""

    page: int
    tenant: str
    state: State
    last_used: float
    refs: int = 0  # holders; a child's holder need not be among them: a parent stays as long as it has children
    key: BlockKey = b""
    parent: "Block | None" = None
    depth: int = 0  # blocks before it in its sequence
    children: dict[BlockKey, "Block"] = field(default_factory=dict)
    speculative: bool = False  # no live request has used it yet
    hold_until: float = 0.0  # an unused speculative block keeps its place until then
    session: str = ""  # that used it last, or for which it was preloaded
    kind: str = ""  # the evidence on which it was preloaded: whose budget it may earn for
    fading: float = 0.0  # index of an unused speculative block, per second of hold that is left

    @property
    def charge(self) -> Charge:
        """As what its tenant pays for it."""
        if self.state is State.RESIDENT:
            return Charge.SPECULATIVE if self.speculative else Charge.USED
        return Charge.IN_FLIGHT if self.state is State.IN_FLIGHT else Charge.QUARANTINED


class Holder(Protocol):
    """Something that holds references: one for each entry of `blocks`."""

    blocks: list[Block]


@dataclass(slots=True, eq=False)
class Hold:
    """A holder that is no more than that."""

    blocks: list[Block] = field(default_factory=list)
