"""Names by a value that changes: who has the least is known at once. O(log n) a change."""

from heapq import heapify, heappop, heappush
from math import inf

_FEW = 64


class Ranking:
    """A heap in which what holds no longer is left behind, and skipped. Among equals the name decides."""

    def __init__(self) -> None:
        self._values: dict[str, float] = {}
        self._heap: list[tuple[float, str]] = []

    def put(self, name: str, value: float) -> None:
        """It has this value from now on."""
        if self._values.get(name) == value:
            return
        self._values[name] = value
        heappush(self._heap, (value, name))
        if len(self._heap) > 2 * len(self._values) + _FEW:
            self._heap = [(value, name) for name, value in self._values.items()]
            heapify(self._heap)

    def drop(self, name: str) -> None:
        """It has none."""
        self._values.pop(name, None)

    def first(self) -> tuple[float, str] | None:
        """The least value, and whose it is."""
        heap, values = self._heap, self._values
        while heap and values.get(heap[0][1]) != heap[0][0]:
            heappop(heap)
        return heap[0] if heap else None

    def second(self) -> float:
        """A value that nobody but the first is below. It may be less than the second least."""
        return min((value for value, _ in self._heap[1:3]), default=inf)
