"""Whom to serve next: the tenant that has had least, but within a bounded lead whoever has least left to do.

A request whose prefix is warm has little left, so it may go ahead while its tenant is no further than `lead` above the
tenant with the least: locality within a bounded deficit, as in Cao et al., "Locality-aware Fair Scheduling in LLM
Serving" (2025). Among a tenant's own, the shortest remaining work goes first, and each gains on those that come later
by `ageing` of a second for each second of service that its tenant has had since; so does a tenant on others, for
service that went past it.

Promises
- Pure; it owns what waits in it, of any hashable type, until it is removed. Used by one thread alone. Several may share
  `Counters`: a queue for admission and one for the engine's slices.
- Between two tenants that always have something waiting, service ÷ weight differs by at most `lead` and one piece of
  service; nobody waits for ever while the number of tenants is bounded.
- Each call is O(log n) and looks at 32 tenants at most. Raises KeyError for an item that it has not.
"""

import heapq
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from math import inf
from typing import Generic, NamedTuple, TypeVar

from kvprefetch.plan.counters import Counters

LEAD_S = 1.0
AGEING = 0.1
_LOOKED_AT = 32

T = TypeVar("T", bound=Hashable)


@dataclass(slots=True, eq=False)
class _Place:
    """One item's."""

    tenant: str
    work: float
    aged: float  # its tenant's level when it came
    came: int  # of equals the first goes first
    entry: int = 0  # in its tenant's line; 0: it is out


@dataclass(slots=True, eq=False)
class _Line(Generic[T]):
    """One tenant's items."""

    entries: list[tuple[float, int, int, T]] = field(default_factory=list)  # heap by aged work
    items: int = 0  # those that are out included
    entry: int = 0  # among the tenants; 0: none
    is_aside: bool = False


class Turn(NamedTuple, Generic[T]):
    """Whose turn it is, and how it compares with others'."""

    item: T
    tenant: str
    level: float
    least: float  # level of the tenant that has had least
    rank: float  # the lowest goes first


class FairOrder(Generic[T]):
    """See the module's promises. Work and `lead` in the unit that is charged: seconds of service."""

    def __init__(self, counters: Counters, lead: float = LEAD_S, ageing: float = AGEING) -> None:
        self.counters, self.lead, self.ageing = counters, lead, ageing
        self._places: dict[T, _Place] = {}
        self._lines: dict[str, _Line[T]] = {}
        self._tenants: list[tuple[float, int, str]] = []  # heap by level; one that has risen is put right later
        self._aside: list[str] = []
        self._numbers = count(1)

    def __len__(self) -> int:
        """Items, those included that are out."""
        return len(self._places)

    def __contains__(self, item: object) -> bool:
        return item in self._places

    def __iter__(self) -> Iterator[T]:
        """All items, those that came first first."""
        return iter(list(self._places))

    # -- what waits ------------------------------------------------------------------------------------
    def add(self, item: T, tenant: str, work: float) -> None:
        """It waits from now on, with so much work left. One that is there already is only weighed again."""
        if item in self._places:
            self.reweigh(item, work)
            return
        self.counters.enter(tenant)
        self._places[item] = _Place(tenant, _seconds(work), self.counters.level(tenant), next(self._numbers))
        self._lines.setdefault(tenant, _Line()).items += 1
        self._line_up(item)

    def reweigh(self, item: T, work: float) -> None:
        """So much of it is left. One that was taken waits again, in its old place."""
        place, work = self._places[item], _seconds(work)
        if place.entry and place.work == work:
            return
        place.work = work
        self._line_up(item)

    def put_back(self, item: T) -> None:
        """It was taken, and waits again as it was."""
        if not self._places[item].entry:
            self._line_up(item)

    def remove(self, item: T) -> None:
        """It wants nothing more."""
        place = self._places.pop(item)
        self.counters.leave(place.tenant)
        line = self._lines[place.tenant]
        line.items -= 1
        if not line.items:
            del self._lines[place.tenant]
            self._sweep()

    def charge(self, item: T, service: float) -> None:
        """Its tenant has had so much service."""
        self.counters.charge(self._places[item].tenant, service)

    # -- whose turn it is ------------------------------------------------------------------------------
    def turn(self) -> Turn[T] | None:
        """Who is to be served next; None: nobody waits. The same until something happens."""
        looked: list[tuple[float, int, str]] = []
        best: Turn[T] | None = None
        while self._tenants and len(looked) < _LOOKED_AT:
            noted, entry, tenant = self._tenants[0]
            line = self._lines.get(tenant)
            if line is None or line.entry != entry:
                heapq.heappop(self._tenants)
                continue
            first = self._first(line)
            if first is None:
                line.entry = 0
                heapq.heappop(self._tenants)
                continue
            level = self.counters.level(tenant)
            if level > noted:
                heapq.heapreplace(self._tenants, (level, entry, tenant))
                continue
            least = looked[0][0] if looked else level
            if level > least + self.lead:
                break
            looked.append(heapq.heappop(self._tenants))
            rank = self._places[first].work + self.ageing * self.counters.passed(tenant)
            if best is None or rank < best.rank:
                best = Turn(first, tenant, level, least, rank)
        for seen in looked:
            heapq.heappush(self._tenants, seen)
        return best

    def take(self) -> T | None:
        """As `turn`; until it is put back, weighed again or removed, the item is out, though its tenant still wants."""
        turn = self.turn()
        if turn is None:
            return None
        self._places[turn.item].entry = 0
        return turn.item

    def hold(self, item: T) -> None:
        """It is taken out of turn."""
        self._places[item].entry = 0

    def set_aside(self, tenant: str) -> None:
        """It can get nothing now: nothing of its is anybody's turn until `resume`."""
        line = self._lines.get(tenant)
        if line is not None and not line.is_aside:
            line.is_aside, line.entry = True, 0
            self._aside.append(tenant)

    def resume(self) -> None:
        """Whoever was set aside is back."""
        aside, self._aside = self._aside, []
        for tenant in aside:
            line = self._lines.get(tenant)
            if line is not None and line.is_aside:
                line.is_aside = False
                self._enter(tenant, line)

    # -- within ----------------------------------------------------------------------------------------
    def _line_up(self, item: T) -> None:
        place = self._places[item]
        line = self._lines[place.tenant]
        place.entry = next(self._numbers)
        heapq.heappush(line.entries, (place.work + self.ageing * place.aged, place.came, place.entry, item))
        if len(line.entries) > 2 * line.items + 64:  # entries that say nothing any more must not pile up
            line.entries = [entry for entry in line.entries if self._is_live(entry[3], entry[2])]
            heapq.heapify(line.entries)
        if not line.entry and not line.is_aside:
            self._enter(place.tenant, line)

    def _enter(self, tenant: str, line: _Line[T]) -> None:
        line.entry = next(self._numbers)
        heapq.heappush(self._tenants, (self.counters.level(tenant), line.entry, tenant))
        self._sweep()

    def _first(self, line: _Line[T]) -> T | None:
        while line.entries:
            _, _, entry, item = line.entries[0]
            if self._is_live(item, entry):
                return item
            heapq.heappop(line.entries)
        return None

    def _is_live(self, item: T, entry: int) -> bool:
        place = self._places.get(item)
        return place is not None and place.entry == entry

    def _sweep(self) -> None:
        if len(self._tenants) > 2 * len(self._lines) + 64:
            lines = self._lines
            self._tenants = [
                entry for entry in self._tenants if entry[2] in lines and lines[entry[2]].entry == entry[1]
            ]
            heapq.heapify(self._tenants)


def _seconds(work: float) -> float:
    """What is no time counts as none."""
    return work if 0 < work < inf else 0.0


def foremost(orders: Sequence[FairOrder[T]]) -> tuple[FairOrder[T], T] | None:
    """Of several over the same counters, whose turn it is and what; None: nobody waits in any. See `FairOrder.hold`."""
    turns = [(order, turn) for order in orders if (turn := order.turn()) is not None]
    if not turns:
        return None
    least = min(turn.least for _, turn in turns)
    near = [(turn.rank, at) for at, (order, turn) in enumerate(turns) if turn.level <= least + order.lead]
    order, turn = turns[min(near)[1]]
    return order, turn.item
