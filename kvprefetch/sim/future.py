"""What only a replay can know: the next use of each block. Reached by the oracle and by Belady alone."""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from math import inf

from kvprefetch.cache.evict import Demand, Rank
from kvprefetch.cache.spans import Run, SpanPool
from kvprefetch.sim.trace import Request, Trace


class Future:
    """Times of use of every block, kept per stretch of blocks that are always used together."""

    def __init__(self, trace: Trace) -> None:
        requests = trace.requests()
        cuts: set[int] = set()
        for request in requests:
            for first, count in request.path:
                cuts.update((first, first + count))
        self._cuts = sorted(cuts)
        self._uses: dict[int, list[float]] = defaultdict(list)
        for request in requests:
            for first, count in request.path:
                low, high = bisect_right(self._cuts, first) - 1, bisect_right(self._cuts, first + count - 1)
                for stretch in range(low, high):
                    self._uses[stretch].append(request.at)

    def next_use(self, name: int, now: float) -> float:
        """When the block is used next after `now`; never is inf."""
        uses = self._uses.get(bisect_right(self._cuts, name) - 1, [])
        at = bisect_right(uses, now)
        return uses[at] if at < len(uses) else inf

    def cut(self, trace: Trace) -> Trace:
        """`trace` with its paths cut where uses differ, so that a whole run has one next use."""

        def pieces(first: int, count: int) -> Iterator[Run]:
            marks = self._cuts[bisect_right(self._cuts, first) - 1 : bisect_right(self._cuts, first + count - 1) + 1]
            return ((low, high - low) for low, high in pairwise(marks))

        def again(request: Request) -> Request:
            return replace(request, path=tuple(p for run in request.path for p in pieces(*run)))

        return replace(trace, sessions=tuple(tuple(map(again, session)) for session in trace.sessions))


def reusable_blocks(trace: Trace) -> dict[tuple[str, float, int], int]:
    """How many leading blocks of each request an endless cache would have, by `Request.identity`."""
    blocks = sum(request.blocks for session in trace.sessions for request in session)

    def keep(span: object, demand: Demand) -> Rank | None:
        return None

    pool = SpanPool(blocks + 1, keep)
    found = {}
    for request in trace.requests():
        found[request.identity] = pool.match(request.path)
        pool.insert(request.path, request.blocks, "", "", 0.0)
        pool.touch(request.path, request.blocks, "", "", 0.0)
    return found
