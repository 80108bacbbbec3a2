"""Max-min by usage, as it is found elsewhere: whoever keeps most gives way. A baseline.

What running requests hold is not counted, as it cannot be evicted; nobody has a guarantee, and all wait in one line.
"""

from collections import Counter
from heapq import heappop, heappush

from kvprefetch.cache.evict import Demand
from kvprefetch.cache.spans import Path, Span
from kvprefetch.sim.lru_pool import LruPool

_Candidate = tuple[int, float, int, Span]


class MaxMinPool(LruPool):
    """A `SpanPool` whose victim is the oldest leaf of the tenant with most unheld blocks. Knows no speculation."""

    def __init__(self, capacity: int, grain: int = 1) -> None:
        super().__init__(capacity)
        self.grain = grain  # blocks that equals give up in turns
        self.unheld: Counter[str] = Counter()  # by tenant: resident blocks that no request holds

    def hold(self, path: Path, count: int) -> None:
        """See `SpanPool`."""
        for span in self.path_spans(path, count):
            if not span.refs:
                self.unheld[span.tenant] -= span.count
        super().hold(path, count)

    def release(self, path: Path, count: int) -> None:
        """See `SpanPool`."""
        super().release(path, count)
        for span in self.path_spans(path, count):
            if not span.refs:
                self.unheld[span.tenant] += span.count

    def insert(
        self,
        path: Path,
        upto: int,
        tenant: str,
        session: str,
        now: float,
        speculative_until: float | None = None,
    ) -> int:
        """See `SpanPool`."""
        fresh = super().insert(path, upto, tenant, session, now, speculative_until)
        self.unheld[tenant] += fresh
        return fresh

    def touch(self, path: Path, count: int, tenant: str, session: str, now: float) -> None:
        """See `SpanPool`."""
        for span in self.path_spans(path, count):
            if not span.refs:
                self.unheld[span.tenant] -= span.count
                self.unheld[tenant] += span.count
        super().touch(path, count, tenant, session, now)

    def cut(self, span: Span, count: int) -> None:
        """See `SpanPool`."""
        super().cut(span, count)
        self.unheld[span.tenant] -= count

    def _choose(self, missing: int, demand: Demand) -> list[tuple[Span, int]] | None:
        if missing > self.unheld.total():
            return None
        kept, lines = Counter(self.unheld), dict[str, list[_Candidate]]()
        taken, cuts, remaining = dict[Span, str](), dict[Span, int](), dict[Span, int]()
        while missing > 0 and kept:
            tenant = max(kept, key=lambda each: kept[each])
            line = lines.get(tenant)
            if line is None:
                line = lines[tenant] = []
                self._offer_oldest(tenant, line, demand, taken)
            if not line:
                del kept[tenant]  # what it has cannot be evicted yet
                continue
            span = line[0][-1]
            second = max((blocks for other, blocks in kept.items() if other != tenant), default=0)
            before = cuts.get(span, 0)
            take = min(span.count - before, missing, max(kept[tenant] - second, self.grain))
            cuts[span] = before + take
            kept[tenant] -= take
            missing -= take
            if before + take == span.count:
                heappop(line)
                self._open_behind(span, line, demand, taken, remaining)
        for span, tenant in taken.items():
            heappush(self._used[tenant], (span.last_used, next(self._order), span))
        return list(cuts.items()) if missing <= 0 else None

    def _open_behind(
        self, span: Span, line: list[_Candidate], demand: Demand, taken: dict[Span, str], remaining: dict[Span, int]
    ) -> None:
        """It goes wholly: its tenant's next leaf stands in line, and what it followed where nothing else does."""
        if span in taken:
            self._offer_oldest(span.tenant, line, demand, taken)
        parent = span.parent
        if parent is not None and parent is not self.root:
            left = remaining[parent] = remaining.get(parent, len(parent.children)) - 1
            if left == 0 and not parent.refs:
                self._offer(parent, line, demand)
