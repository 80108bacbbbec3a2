"""A virtual clock: actions in order of time, and in order of their scheduling where times are equal."""

import heapq
from collections.abc import Callable
from itertools import count


class VirtualClock:
    """Runs actions at their times; `now` in seconds."""

    def __init__(self) -> None:
        self.now = 0.0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()

    def at(self, time: float, action: Callable[[], None]) -> None:
        """Run `action` at `time`, or now if that has passed."""
        heapq.heappush(self._queue, (max(time, self.now), next(self._order), action))

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        """Run `action` in so many seconds."""
        self.at(self.now + seconds, action)

    def run(self) -> None:
        """Until nothing is scheduled any more."""
        while self._queue:
            self.now, _, action = heapq.heappop(self._queue)
            action()
