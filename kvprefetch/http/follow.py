"""From the worker's thread to the event loop: an answer's events, without a thread for each answer.

Promises: no event is lost or reordered; the worker's thread never waits for the loop, and wakes it once for all
events that come before it looks. A loop that is gone is no error on the worker's side.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from kvprefetch.worker.request import Event, Generation


class Relay:
    """One for each event loop; `post` from any thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._posted: deque[tuple[Callable[[Event], None], Event]] = deque()
        self._lock = threading.Lock()
        self._is_waking = False

    def post(self, hear: Callable[[Event], None], event: Event) -> None:
        """Have the loop call `hear(event)`."""
        self._posted.append((hear, event))
        with self._lock:
            if self._is_waking:
                return
            self._is_waking = True
        with suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        with self._lock:
            self._is_waking = False
        while self._posted:
            hear, event = self._posted.popleft()
            hear(event)


class Follower:
    """The events of one answer, in batches. Used on the loop alone."""

    def __init__(self, generation: Generation, relay: Relay) -> None:
        self._pieces: list[str] = []
        self._ended = False
        self._error: BaseException | None = None
        self._news = asyncio.Event()
        generation.subscribe(lambda event: relay.post(self._hear, event))

    async def batch(self) -> tuple[list[str], bool]:
        """A piece for each token since the last call, and whether that was all. Raises what ended the answer."""
        await self._news.wait()
        pieces, self._pieces = self._pieces, []
        if self._error is not None and not pieces:
            raise self._error
        if not self._ended:
            self._news.clear()
        return pieces, self._ended and self._error is None

    def _hear(self, event: Event) -> None:
        if isinstance(event, str):
            self._pieces.append(event)
        else:
            self._ended, self._error = True, event
        self._news.set()
