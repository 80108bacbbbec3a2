"""One hint's events, across breaks of its stream and restarts of the service.

Promises
- The handle gets exactly one outcome. A stream that broke is taken up again where the service still knows the hint; a
  service that was restarted is asked anew, while the hint's time lasts. After that it is FAILED, with the reason.
- A use that was open when the service was restarted stays open: nobody knows it.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from kvprefetch.client.handle import Prefetch
from kvprefetch.client.problems import error_of, last_words
from kvprefetch.client.words import outcome_of, use_of
from kvprefetch.outcomes import Outcome, Result, Use
from kvprefetch.v1 import hints_pb2 as pb

log = logging.getLogger(__name__)
Open = Callable[[pb.PrefetchRequest], AsyncIterator[pb.PrefetchEvent]]

SETTLES_S = 10.0
"""After a restart, workers register again within this; until then their models and contexts may be unknown."""
_BACKOFF_S = (0.05, 1.0)  # the first, and the longest
_REFUSED = frozenset(
    {
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.UNIMPLEMENTED,
    }
)


@dataclass
class Following:
    """See the module's promises. Times are the loop's."""

    handle: Prefetch
    request: pb.PrefetchRequest
    open: Open
    cancel: Callable[[int], Any]  # a call that withdraws the hint of that number
    address: str
    expected_at: float
    expires_at: float
    lost_at: float | None = None  # when the stream broke; None: it is well
    complaint: str = ""

    async def run(self) -> None:
        """Until nothing more will come."""
        pause = _BACKOFF_S[0]
        while not await self._listen():
            now = asyncio.get_running_loop().time()
            if self.handle.is_withdrawn:
                self.handle.resolve(Result(Outcome.CANCELLED, 0, "withdrawn by the caller"))
            elif now >= self.expires_at:
                reason = f"lost the service at {self.address} before it was done: {self.complaint}"
                self.handle.resolve(Result(Outcome.FAILED, 0, reason))
            if now >= self.expires_at or self.handle.is_withdrawn:
                return
            await asyncio.sleep(pause)
            pause = min(2 * pause, _BACKOFF_S[1])
            if self.lost_at is None:  # it had been well again
                pause = _BACKOFF_S[0]

    async def _listen(self) -> bool:
        """Follow one stream to its end; whether all is said."""
        now = asyncio.get_running_loop().time()
        request = pb.PrefetchRequest()
        if self.handle.number:
            request.follow = self.handle.number
        else:
            request.CopyFrom(self.request)
            request.expected_in_s = max(self.expected_at - now, 0.0)
        try:
            async for event in self.open(request):
                self.lost_at = None
                self._note(event)
            return self._is_over()
        except grpc.aio.AioRpcError as error:
            return self._is_over() or self._broke(error, now)

    def _note(self, event: pb.PrefetchEvent) -> None:
        handle = self.handle
        if not handle.number and handle.is_withdrawn:
            self.cancel(event.hint)
        handle.number, handle.worker = event.hint, event.worker or handle.worker
        outcome, use = outcome_of(event.outcome), use_of(event.use)
        if use is not None:
            handle.note_use(use, event.tokens if use is Use.USED else 0)
        elif outcome is not None:
            handle.resolve(Result(outcome, event.tokens, event.reason), event.because)

    def _is_over(self) -> bool:
        """Whether the service has nothing more to tell."""
        outcome = self.handle.outcome
        return outcome is not None and (not outcome.is_resident or self.handle.use is not None)

    def _broke(self, error: grpc.aio.AioRpcError, now: float) -> bool:
        """The stream broke; whether it is of no use to try again."""
        again = self.lost_at is not None
        self.lost_at = now if self.lost_at is None else self.lost_at
        self.complaint = last_words(error.details())
        if error.code() not in _REFUSED:
            return False
        if error.code() is grpc.StatusCode.NOT_FOUND and self.handle.number:  # another run of the service
            self.handle.number = 0
            return self.handle.outcome is not None
        if error.code() is grpc.StatusCode.NOT_FOUND and again and now - self.lost_at < SETTLES_S:
            return False
        self.handle.refuse(error_of(error.code(), error.details(), self.address))
        return True
