"""Signals on their way to the service: a bounded queue, and one sender.

Promises
- `put` never blocks. Where the queue is full, by number or bytes, the new signal is dropped and counted.
- Signals arrive in their order. While the service is away they wait, for at most `PATIENCE_S` each; what it refuses is
  counted, and told in the log once for each kind of refusal.
"""

import asyncio
import logging
import threading
from collections import Counter, deque
from collections.abc import Awaitable, Callable

import grpc
import grpc.aio

from kvprefetch.v1 import hints_pb2 as pb

log = logging.getLogger(__name__)
Send = Callable[[pb.SignalRequest], Awaitable[object]]

MOST = 1_024
MOST_BYTES = 64 * 2**20
PATIENCE_S = 30.0
_BACKOFF_S = (0.05, 1.0)  # the first, and the longest
_AWAY = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED})


class Signals:
    """See the module's promises. `put` is for any thread; the rest for the loop's."""

    def __init__(self, send: Send, wake: Callable[[Callable[[], object]], None]) -> None:
        self.counts: Counter[str] = Counter()  # "sent", "dropped", "refused", "late"
        self._send, self._wake = send, wake
        self._waiting: deque[tuple[pb.SignalRequest, int]] = deque()
        self._bytes = 0
        self._lock = threading.Lock()
        self._some = asyncio.Event()
        self._told: set[grpc.StatusCode] = set()

    def put(self, request: pb.SignalRequest) -> None:
        """Send it soon. Raises Closed."""
        size = request.ByteSize()
        with self._lock:
            if len(self._waiting) >= MOST or self._bytes + size > MOST_BYTES:
                self.counts["dropped"] += 1
                return
            self._waiting.append((request, size))
            self._bytes += size
        self._wake(self._some.set)

    async def run(self) -> None:
        """Send what comes, for ever."""
        while True:
            await self._some.wait()
            self._some.clear()
            while self._waiting:
                request, size = self._waiting[0]
                self.counts[await self._deliver(request)] += 1
                with self._lock:
                    self._waiting.popleft()
                    self._bytes -= size

    async def flush(self, timeout_s: float) -> None:
        """Until nothing waits, or the time is over; what is left is dropped and counted."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while self._waiting and loop.time() < deadline:
            await asyncio.sleep(0.005)
        with self._lock:
            self.counts["dropped"] += len(self._waiting)
            self._waiting.clear()

    async def _deliver(self, request: pb.SignalRequest) -> str:
        """How it went: "sent", "refused" or "late"."""
        loop = asyncio.get_running_loop()
        deadline, pause = loop.time() + PATIENCE_S, _BACKOFF_S[0]
        while True:
            try:
                await self._send(request)
                return "sent"
            except grpc.aio.AioRpcError as error:
                if error.code() not in _AWAY:
                    self._tell(error)
                    return "refused"
            if loop.time() >= deadline:
                return "late"
            await asyncio.sleep(pause)
            pause = min(2 * pause, _BACKOFF_S[1])

    def _tell(self, error: grpc.aio.AioRpcError) -> None:
        if error.code() not in self._told:
            self._told.add(error.code())
            log.warning("the service refuses signals: %s: %s", error.code().name, error.details())
