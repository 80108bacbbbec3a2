"""Keeps memory alive until the device has passed the work that reads or writes it.

torch knows when a kernel of its own is done with a tensor; of a launch that was handed bare addresses it does not.
So a pool or a host buffer that is let go while a copy is queued lives on here until the copy's event has come.
"""

import threading
from collections.abc import Callable


class Pending:
    """Things and what they wait for. Any thread may call."""

    def __init__(self) -> None:
        self._held: list[tuple[Callable[[], bool], object]] = []
        self._lock = threading.Lock()

    def hold(self, things: object, is_done: Callable[[], bool]) -> None:
        """Keep `things` until `is_done()`, which is asked whenever something else comes to be held."""
        with self._lock:
            self._held = [(asked, kept) for asked, kept in self._held if not asked()]
            self._held.append((is_done, things))

    def __len__(self) -> int:
        return len(self._held)
