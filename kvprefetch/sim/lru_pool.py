"""The same pool under `lru`, for long replays: victims are found in the order of their last use, not among all leaves.

`tests/sim/test_navigation_pool.py` proves that it keeps what `SpanPool` keeps, step by step.
"""

from heapq import heapify, heappop, heappush
from itertools import count

from kvprefetch.cache.evict import Demand, Rank, lru
from kvprefetch.cache.spans import Path, Span, SpanPool

_Entry = tuple[float, int, Span]
_Candidate = tuple[int, float, int, Span]


class LruPool(SpanPool):
    """A `SpanPool` with the policy `lru`. Making room costs O(unused speculation + victims · log leaves)."""

    def __init__(self, capacity: int, merges: bool = True) -> None:
        super().__init__(capacity, lru, merges)
        self._fresh: dict[Span, None] = {}  # speculative leaves
        self._used: dict[str, list[_Entry]] = {}  # by tenant: other leaves by last use, and what once was one
        self._order = count()

    def touch(self, path: Path, count: int, tenant: str, session: str, now: float) -> None:
        """See `SpanPool`."""
        super().touch(path, count, tenant, session, now)
        for span in self.path_spans(path, count)[-1:]:
            self._note_leaf(span)  # a leaf may have become younger

    # -- within ----------------------------------------------------------------------------------------
    def _note_leaf(self, span: Span) -> None:
        super()._note_leaf(span)
        if span not in self.leaves:
            return
        if span.speculative:
            self._fresh[span] = None
            return
        entries = self._used.setdefault(span.tenant, [])
        heappush(entries, (span.last_used, next(self._order), span))
        if len(entries) > 4 * len(self.leaves) + 64:
            self._used[span.tenant] = self._sound(span.tenant)

    def _sound(self, tenant: str) -> list[_Entry]:
        """The tenant's entries that hold still, once each."""
        newest = {entry[2]: entry for entry in self._used[tenant] if self._holds(tenant, entry)}
        entries = list(newest.values())
        heapify(entries)
        return entries

    def _holds(self, tenant: str, entry: _Entry) -> bool:
        last_used, _, span = entry
        is_current = span.last_used == last_used and span.tenant == tenant and not span.speculative
        return is_current and span in self.leaves

    def _choose(self, missing: int, demand: Demand) -> list[tuple[Span, int]] | None:
        chosen: list[tuple[Span, int]] = []
        candidates, taken = self._speculative(demand), dict[Span, str]()
        for tenant in self._open_to(demand):
            self._offer_oldest(tenant, candidates, demand, taken)
        remaining: dict[Span, int] = {}
        while missing > 0 and candidates:
            *_, span = heappop(candidates)
            take = min(span.count, missing)
            chosen.append((span, take))
            missing -= take
            if span in taken and missing > 0:
                self._offer_oldest(taken[span], candidates, demand, taken)
            parent = span.parent
            if take < span.count or parent is None or parent is self.root:
                continue
            left = remaining[parent] = remaining.get(parent, len(parent.children)) - 1
            if left == 0 and not parent.refs:
                self._offer(parent, candidates, demand)
        for span, tenant in taken.items():
            heappush(self._used[tenant], (span.last_used, next(self._order), span))
        return chosen if missing <= 0 else None

    def _open_to(self, demand: Demand) -> list[str]:
        """Tenants whose used blocks it may take."""
        return [demand.tenant] if demand.speculative else list(self._used)

    def _speculative(self, demand: Demand) -> list[_Candidate]:
        found: list[_Candidate] = []
        for span in list(self._fresh):
            if span in self.leaves and span.speculative:
                self._offer(span, found, demand)
            else:
                del self._fresh[span]
        return found

    def _offer(self, span: Span, candidates: list[_Candidate], demand: Demand) -> None:
        rank: Rank | None = lru(span, demand)
        if rank is not None:
            heappush(candidates, (rank.group, rank.age, next(self._order), span))

    def _offer_oldest(self, tenant: str, candidates: list[_Candidate], demand: Demand, taken: dict[Span, str]) -> None:
        """The tenant's leaf that was used longest ago, of those not taken yet, becomes a candidate."""
        entries = self._used.get(tenant, [])
        while entries:
            entry = heappop(entries)
            if self._holds(tenant, entry) and entry[2] not in taken:
                taken[entry[2]] = tenant
                self._offer(entry[2], candidates, demand)
                return
