"""A block: the KV of a fixed run of tokens, in one page of a pool."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar, Protocol, Union

from kvprefetch.cache.keys import BlockKey


class State(Enum):
    """Where a block stands."""

    IN_FLIGHT = "in_flight"  # reserved; its bytes are being written; private to its holder
    RESIDENT = "resident"  # published under its key; its bytes never change again
    QUARANTINED = "quarantined"  # its bytes are not to be trusted nor its page reused
    DROPPED = "dropped"  # its bytes are damaged; its page is free when nobody can be reading it any more
    GONE = "gone"  # its page is free


class Charge(Enum):
    """As what a tenant pays for a page."""

    USED = "used"
    SPECULATIVE = "speculative"
    IN_FLIGHT = "in_flight"
    QUARANTINED = "quarantined"

    __hash__ = object.__hash__  # members are one of a kind; an Enum would hash its name, each time


@dataclass(slots=True, eq=False)
class Unused:
    """What is known of a block that was preloaded and that no live request has used yet."""

    hold_until: float  # it keeps its place until then
    kind: str = ""  # the evidence on which it was preloaded: whose budget it may earn for
    fading: float = 0.0  # its index, per second of hold that is left


@dataclass(slots=True, eq=False)
class Block:
    """One page's content. Only the pool that owns it changes it.

    There may be millions: what few of them have is behind a reference, and an only child is one, not a table.
    """

    count: ClassVar[int] = 1  # pages, as a run of blocks has

    page: int
    tenant: str  # who is charged; of a group's block the one of `payers` who used it last
    state: State
    last_used: float
    refs: int = 0  # holders; a child's holder need not be among them: a parent stays as long as it has children
    key: BlockKey = b""
    parent: "Block | None" = None
    depth: int = 0  # blocks before it in its sequence
    session: str = ""  # that used it last, or for which it was preloaded
    unused: Unused | None = None
    payers: dict[str, float] | None = None  # of a group's block: who shares its charge → when each used it last
    _below: Union["Block", dict[BlockKey, "Block"], None] = field(default=None, repr=False)

    @property
    def speculative(self) -> bool:
        """Whether no live request has used it yet."""
        return self.unused is not None

    @property
    def hold_until(self) -> float:
        """Until when an unused speculative block keeps its place."""
        return self.unused.hold_until if self.unused is not None else 0.0

    @property
    def is_leaf(self) -> bool:
        """Whether it may be evicted: resident, unheld, and nothing behind it."""
        return not self.refs and self._below is None and self.state is State.RESIDENT

    @property
    def fanout(self) -> int:
        """Resident blocks that follow it."""
        below = self._below
        return 0 if below is None else len(below) if isinstance(below, dict) else 1

    @property
    def children(self) -> tuple["Block", ...]:
        """Those blocks."""
        below = self._below
        return () if below is None else tuple(below.values()) if isinstance(below, dict) else (below,)

    @property
    def charge(self) -> Charge:
        """As what its tenant pays for it."""
        if self.state is State.RESIDENT:
            return Charge.SPECULATIVE if self.unused is not None else Charge.USED
        return Charge.IN_FLIGHT if self.state is State.IN_FLIGHT else Charge.QUARANTINED

    def preloaded_for(self, session: str, kind: str) -> None:
        """It was preloaded for this session, on this kind of evidence."""
        self.session = session
        if self.unused is not None:
            self.unused.kind = kind

    # -- for its pool ----------------------------------------------------------------------------------
    def adopt(self, child: "Block") -> None:
        """`child` follows it from now on."""
        below = self._below
        if below is None:
            self._below = child
        elif isinstance(below, dict):
            below[child.key] = child
        else:
            self._below = {below.key: below, child.key: child}

    def disown(self, children: Iterable["Block"]) -> None:
        """They follow it no more."""
        for child in children:
            below = self._below
            if isinstance(below, dict):
                del below[child.key]
                if len(below) == 1:
                    (self._below,) = below.values()
            elif below is child:
                self._below = None
            else:
                raise KeyError(child.key)


class Holder(Protocol):
    """Something that holds references: one for each entry of `blocks`."""

    blocks: list[Block]


@dataclass(slots=True, eq=False)
class Hold:
    """A holder that is no more than that."""

    blocks: list[Block] = field(default_factory=list)
