"""One thread with an event loop, for all calls of a connection."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future
from typing import Any, TypeVar

from kvprefetch.errors import Closed

T = TypeVar("T")
_LINGER_S = 0.5  # for what has been cancelled to end by itself


class LoopThread:
    """A daemon thread that runs a loop until `close`. All methods may be called from any other thread."""

    def __init__(self, name: str) -> None:
        self._lock = threading.Lock()
        self._closing = False
        self._calls: set[Future[Any]] = set()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), name=name, daemon=True)
        self._thread.start()
        self._ready.wait()

    def call(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run it there and wait for its result; bounded only by itself. Raises Closed, and what `work` raises."""
        with self._lock:
            self._refuse_if_closing()
            future: Future[T] = asyncio.run_coroutine_threadsafe(work(), self.loop)
            self._calls.add(future)
        try:
            return future.result()
        except CancelledError as error:
            raise Closed("the connection was closed meanwhile") from error
        finally:
            self._calls.discard(future)

    def post(self, action: Callable[[], object]) -> None:
        """Run `action` there soon. Never blocks. Raises Closed."""
        with self._lock:
            self._refuse_if_closing()
            self.loop.call_soon_threadsafe(action)

    def close(self, last: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run `last` there, end the thread and wait for it. Again, it does nothing."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        asyncio.run_coroutine_threadsafe(last(), self.loop).result()
        for future in tuple(self._calls):
            future.cancel()
        self.loop.call_soon_threadsafe(self._end.set)
        self._thread.join()

    def _refuse_if_closing(self) -> None:
        if self._closing:
            raise Closed("the connection is closed")

    async def _main(self) -> None:
        self.loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        self._ready.set()
        await self._end.wait()
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        if rest:  # gRPC's own, of calls that have been cancelled
            await asyncio.wait(rest, timeout=_LINGER_S)
