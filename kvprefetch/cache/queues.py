"""One tenant's blocks in line, and what one demand would take of all lines before anything is taken.

A queue keeps two heaps: all leaves by the order's key, unused speculation by the end of its hold. What changed since
a leaf was put there is seen when it comes to the front: a key may have become more at any moment, and less only after
`Order.lasts_s` or where `Order.epoch` changed, upon which `refresh` looks at all anew. Pure.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush, heapreplace
from math import inf
from typing import Generic, NamedTuple, Protocol, Self, TypeVar

from kvprefetch.cache.evict import Evictable


class Leaf(Evictable, Protocol):
    """A block, or a run of blocks that share their fate."""

    tenant: str

    @property
    def count(self) -> int: ...
    @property
    def refs(self) -> int: ...
    @property
    def is_leaf(self) -> bool: ...
    @property
    def fanout(self) -> int: ...
    @property
    def parent(self) -> Self | None: ...
    @property
    def payers(self) -> dict[str, float] | None: ...


L = TypeVar("L", bound=Leaf)
L_contra = TypeVar("L_contra", bound=Leaf, contravariant=True)
_FEW = 64


class Order(Protocol[L_contra]):
    """How the blocks of one tenant stand in line."""

    rule: str  # the reason of an eviction by it
    lasts_s: float  # a key may have become less after so long

    def first_key(self, leaf: L_contra) -> float:
        """A key that is at most the true one, without looking."""

    def key(self, leaf: L_contra, now: float) -> float:
        """The least goes first."""

    def epoch(self, tenant: str) -> Hashable:
        """Changes when all of its keys do."""

    def weighs(self, tenant: str) -> bool:
        """Whether keys are on the scale of a preload's worth."""


class Victim(NamedTuple, Generic[L]):
    """Its last `pages` blocks go."""

    leaf: L
    pages: int
    rule: str


@dataclass(slots=True)
class Draft(Generic[L]):
    """What one demand would take."""

    asking: str = ""
    asked: int = 0  # pages that count as its own already
    victims: dict[L, Victim[L]] = field(default_factory=dict)  # children before parents
    opened: set[L] = field(default_factory=set)  # that nothing would follow any more
    closed: dict[L, int] = field(default_factory=dict)  # by parent: children taken
    used: dict[str, float] = field(default_factory=dict)  # by tenant: pages that it would no longer pay for
    fresh: dict[str, float] = field(default_factory=dict)  # unused speculation among what it would pay for no longer

    def has(self, leaf: L, tenant: str) -> bool:
        """Whether there is something to take of it, out of this tenant's line."""
        if leaf.tenant != tenant or not (leaf.is_leaf or leaf in self.opened):
            return False
        victim = self.victims.get(leaf)
        return victim is None or victim.pages < leaf.count

    def take(self, leaf: L, most: int, rule: str) -> tuple[int, L | None]:
        """This one, or the end of it: how many blocks, and its parent where all that followed that one is taken now."""
        victim, count, parent = self.victims.get(leaf), leaf.count, leaf.parent
        before = victim.pages if victim is not None else 0
        pages = min(count - before, most)
        self.victims[leaf] = Victim(leaf, before + pages, victim.rule if victim is not None else rule)
        if parent is None or before + pages < count:
            return pages, None
        closed = self.closed[parent] = self.closed.get(parent, 0) + 1
        if closed < parent.fanout or parent.refs:
            return pages, None
        self.opened.add(parent)
        return pages, parent


class Queue(Generic[L]):
    """See the module's promises."""

    __slots__ = ("_epoch", "_fresh", "_number", "_ranked", "_ranked_at", "_sweep_at", "tenant")

    def __init__(self, tenant: str) -> None:
        self.tenant = tenant
        self._ranked: list[tuple[float, int, L]] = []
        self._fresh: list[tuple[float, int, L]] = []
        self._number = 0  # of those that were put: the older goes first among equals
        self._sweep_at = _FEW
        self._ranked_at = -inf
        self._epoch: Hashable = None

    def __bool__(self) -> bool:
        return bool(self._ranked or self._fresh)

    def leaves(self) -> set[L]:
        """All that stand here, and some that do no more. O(leaves)."""
        return {leaf for _, _, leaf in self._ranked if leaf.tenant == self.tenant}

    def put(self, leaf: L, order: Order[L], draft: Draft[L]) -> None:
        """It stands here from now on, or was used again."""
        self._number = number = self._number + 1
        heappush(self._ranked, (order.first_key(leaf), number, leaf))
        if leaf.speculative:
            heappush(self._fresh, (leaf.hold_until, number, leaf))
        if len(self._ranked) > self._sweep_at:
            self._sweep(order, draft)

    def follow(self, leaf: L, order: Order[L]) -> None:
        """It stands here in place of the first by its key, of which nothing is left."""
        self._number = number = self._number + 1
        heapreplace(self._ranked, (order.first_key(leaf), number, leaf))
        if leaf.speculative:
            heappush(self._fresh, (leaf.hold_until, number, leaf))

    def first(self, order: Order[L], now: float, draft: Draft[L]) -> tuple[float, int, L] | None:
        """The first in line, by its key as it is now."""
        ranked, tenant = self._ranked, self.tenant
        while ranked:
            key, number, leaf = ranked[0]
            if not draft.has(leaf, tenant):
                heappop(ranked)
                continue
            true = order.key(leaf, now)
            if not true > key:  # also where it is no number
                return ranked[0]
            heapreplace(ranked, (true, number, leaf))
        return None

    def first_fresh(self, draft: Draft[L]) -> tuple[float, int, L] | None:
        """The unused speculation whose hold ends first."""
        fresh = self._fresh
        while fresh:
            until, number, leaf = fresh[0]
            if not (leaf.speculative and draft.has(leaf, self.tenant)):
                heappop(fresh)
            elif leaf.hold_until > until:
                heapreplace(fresh, (leaf.hold_until, number, leaf))
            else:
                return fresh[0]
        return None

    def refresh(self, order: Order[L], now: float, draft: Draft[L]) -> bool:
        """Rank all leaves anew where their keys may have become less; whether that was so."""
        epoch = order.epoch(self.tenant)
        if self._epoch == epoch and abs(now - self._ranked_at) < order.lasts_s:
            return False
        self._epoch, self._ranked_at = epoch, now
        self._sweep(order, draft)
        return True

    def _sweep(self, order: Order[L], draft: Draft[L]) -> None:
        """Each leaf once, with the least key that it may have."""
        ranked = {leaf: number for _, number, leaf in self._ranked if draft.has(leaf, self.tenant)}
        self._ranked[:] = [(order.first_key(leaf), number, leaf) for leaf, number in ranked.items()]
        fresh = {leaf: number for _, number, leaf in self._fresh if draft.has(leaf, self.tenant)}
        self._fresh[:] = [(leaf.hold_until, number, leaf) for leaf, number in fresh.items() if leaf.speculative]
        heapify(self._ranked)
        heapify(self._fresh)
        self._sweep_at = 2 * len(self._ranked) + _FEW
