"""A worker's calls to its node's cache: packed keys and slots out and in.

Promises
- Thread-safe. Every call blocks for at most its timeout and raises ServiceUnavailable after it, or at once while the
  breaker is open: a dead service costs one timeout, not one a request.
- A service that does not know this worker (any more) counts as unavailable; the worker registers again by itself.
- Holds nothing: leases and reservations are numbers, which the caller gives back with `release`.
- An answer that comes too late is not lost, as what it grants would never be given back: `unwanted` is told of it. What
  a broken connection swallowed, the service learns when the worker registers again.
"""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Protocol

import grpc

from kvprefetch.cache.keys import BlockKey
from kvprefetch.errors import Closed, ServiceUnavailable
from kvprefetch.tiers.breaker import Breaker
from kvprefetch.v1 import cache_pb2, cache_pb2_grpc

LOOKUP_S = 0.05
"""Law 1: a look-up waits no longer."""
_MOST_SESSION = 200  # bytes
TAKEN = 0xFFFFFFFF
"""In place of a slot: somebody holds or writes that block already."""
_GONE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
_UNKNOWN = (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.NOT_FOUND)


class LookupTimedOut(ServiceUnavailable):
    """It did not answer in time."""


class CallRefused(ServiceUnavailable):
    """What was asked can never be done: asking again is of no use."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a look-up found: slots of the leading keys, under a lease; and what is on its way."""

    lease: int
    slots: Sequence[int]
    found: int
    coming: int
    tier: str


@dataclass(frozen=True, slots=True)
class Reservation:
    """Slots to write the leading keys' blocks to; TAKEN where nothing is to be written."""

    number: int
    slots: Sequence[int]


class Unwanted(Protocol):
    """Gives back a lease or a reservation that nobody uses. Called by any thread; must not block."""

    def __call__(self, *, lease: int = 0, reservation: int = 0) -> None: ...


class CacheClient:
    """See the module's promises."""

    def __init__(
        self, channel: grpc.Channel, instance: bytes, clock: Callable[[], float], unwanted: Unwanted | None = None
    ) -> None:
        self.instance, self.clock = instance, clock
        self.unwanted: Unwanted = unwanted or _forget
        self.breaker = Breaker()
        self._stub = cache_pb2_grpc.CacheStub(channel)

    def look_up(
        self,
        tenant: str,
        session: str,
        keys: Sequence[BlockKey],
        *,
        lease: bool = True,
        wait_s: float = 0.0,
        timeout_s: float = LOOKUP_S,
        hold_s: float | None = None,
    ) -> Answer:
        """The longest prefix that the arena holds. Raises ServiceUnavailable, LookupTimedOut after `timeout_s`.

        `hold_s`: nobody has asked for it yet; what is brought from further away is charged as speculation.
        """
        request = cache_pb2.LookupRequest(
            instance=self.instance,
            tenant=tenant,
            session=short(session),
            keys=b"".join(keys),
            speculative=hold_s is not None,
            hold_s=hold_s or 0.0,
            lease=lease,
            wait_ms=int(1000 * min(wait_s, timeout_s)),
        )
        reply = self._call(self._stub.Lookup, request, timeout_s, lambda late: self.unwanted(lease=late.lease))
        return Answer(reply.lease, _numbers(reply.slots), reply.found, reply.coming, reply.tier)

    def reserve(
        self,
        tenant: str,
        session: str,
        parent: BlockKey,
        keys: Sequence[BlockKey],
        speculative_s: float | None,
        timeout_s: float,
    ) -> Reservation:
        """Slots for blocks that follow each other, the first behind `parent`. Raises ServiceUnavailable."""
        request = cache_pb2.ReserveRequest(
            instance=self.instance,
            tenant=tenant,
            session=short(session),
            parent=parent,
            keys=b"".join(keys),
            speculative=speculative_s is not None,
            hold_s=speculative_s or 0.0,
        )
        reply = self._call(
            self._stub.Reserve, request, timeout_s, lambda late: self.unwanted(reservation=late.reservation)
        )
        return Reservation(reply.reservation, _numbers(reply.slots))

    def commit(self, reservation: int, checksums: Sequence[int], timeout_s: float) -> int:
        """The reserved slots are written; how many blocks can be found now. Raises ServiceUnavailable."""
        packed = array("Q", checksums).tobytes()
        request = cache_pb2.CommitRequest(instance=self.instance, reservation=reservation, checksums=packed)
        committed: int = self._call(self._stub.Commit, request, timeout_s).committed
        return committed

    def release(
        self,
        leases: Sequence[int] = (),
        reservations: Sequence[int] = (),
        corrupt: Sequence[int] = (),
        timeout_s: float = 1.0,
    ) -> None:
        """Give back. Raises ServiceUnavailable: then the numbers are still held, until this worker registers again."""
        request = cache_pb2.ReleaseRequest(
            instance=self.instance,
            leases=leases,
            reservations=reservations,
            corrupt=array("I", corrupt).tobytes(),
        )
        self._call(self._stub.Release, request, timeout_s)

    def _call(
        self, method: Any, request: Any, timeout_s: float, late: Callable[[Any], None] = lambda reply: None
    ) -> Any:
        """The reply. One that comes after `timeout_s` goes to `late`, on one of gRPC's threads."""
        if not self.breaker.allows(self.clock()):
            raise ServiceUnavailable("the cache service did not answer a moment ago")
        try:
            call = method.future(request)  # without a deadline: cancelled, it might be granted all the same
            reply = call.result(timeout=timeout_s)
        except grpc.FutureTimeoutError as error:
            if timeout_s >= LOOKUP_S:  # who waits for less learns nothing that others should go by
                self.breaker.failed(self.clock())
            call.add_done_callback(lambda done: late(done.result()) if done.code() is grpc.StatusCode.OK else None)
            raise LookupTimedOut(f"the cache service did not answer within {timeout_s} s") from error
        except grpc.RpcError as error:
            code = error.code()
            if code in _GONE:
                self.breaker.failed(self.clock())
            else:
                self.breaker.succeeded()
            if code in (*_GONE, *_UNKNOWN, grpc.StatusCode.CANCELLED):
                raise ServiceUnavailable(f"the cache service: {error.details()}") from error
            refusal = CallRefused if code is grpc.StatusCode.INVALID_ARGUMENT else ServiceUnavailable
            raise refusal(f"the cache service refused: {code.name}: {error.details()}") from error
        except (ValueError, grpc.FutureCancelledError) as error:  # what gRPC raises on a closed channel
            raise Closed("the connection is closed") from error
        self.breaker.succeeded()
        return reply


def short(session: str) -> str:
    """The session's name, or where it is too long for the wire, a hash of it."""
    raw = session.encode("utf-8", "replace")
    return session if len(raw) <= _MOST_SESSION else sha256(raw).hexdigest()


def _forget(*, lease: int = 0, reservation: int = 0) -> None:
    """For callers who take no leases."""


def _numbers(packed: bytes) -> Sequence[int]:
    """Little-endian uint32, as on every machine that this runs on."""
    return array("I", packed)
