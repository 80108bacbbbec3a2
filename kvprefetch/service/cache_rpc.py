"""The `Cache` service: what workers ask of their node's blocks, checked, and handed to the shelf of their model.

Promises
- The caller's role was checked before (`auth`, `calls`). What does not fit is refused with a line that says what to do
  (InvalidRequest and LimitExceeded become status codes in `calls`; what only this service knows is aborted here).
- Nothing is changed by a call that is refused. No call but `Lookup` with `wait_ms`, and `Read`, ever waits.
- `Read` sends raw bytes: register with `add_cache`, not with the generated function.
"""

import math
from collections.abc import AsyncIterator
from typing import Any, NoReturn

import grpc
import grpc.aio

from kvprefetch.errors import InvalidRequest
from kvprefetch.service.calls import Context
from kvprefetch.service.leases import NotPresent, UnknownReservation
from kvprefetch.service.node import Node
from kvprefetch.service.packed import count_keys, pack_slots, split, unpack_checksums, unpack_slots
from kvprefetch.service.pins import LONGEST_S
from kvprefetch.service.registry import Registry, Worker
from kvprefetch.service.shelf import Shelf
from kvprefetch.tiers.contract import KEY_BYTES
from kvprefetch.v1 import cache_pb2 as pb

_MOST_NUMBERS = 16_384  # leases and reservations in one call
_MOST_NAME = 63  # bytes of a tenant's name, as in credentials
_MOST_SESSION = 256
_LONGEST_HOLD_S = 30 * 86_400.0


class CacheService:
    """See the module's promises."""

    def __init__(self, node: Node, registry: Registry, max_blocks: int) -> None:
        self.node, self.registry, self.max_blocks = node, registry, max_blocks

    async def Lookup(self, request: pb.LookupRequest, context: Context) -> pb.LookupReply:
        """See the proto."""
        worker = await self._worker(request.instance, context)
        count_keys(request.keys, self.max_blocks)
        _check_names(request.tenant, request.session)
        lease_for = worker.instance if request.lease else None
        try:
            found = await worker.shelf.look_up(
                request.keys,
                request.tenant,
                request.session,
                lease_for=lease_for,
                wait_s=request.wait_ms / 1_000,
                hold_s=_seconds(request.hold_s) if request.speculative else None,
            )
        except NotPresent as error:
            await _abort(context, grpc.StatusCode.FAILED_PRECONDITION, error)
        return pb.LookupReply(
            lease=found.lease, slots=found.slots, found=found.count, coming=found.coming, tier=found.tier
        )

    async def Reserve(self, request: pb.ReserveRequest, context: Context) -> pb.ReserveReply:
        """See the proto."""
        worker = await self._worker(request.instance, context)
        count_keys(request.keys, self.max_blocks)
        _check_names(request.tenant, request.session)
        if len(request.parent) not in (0, KEY_BYTES):
            raise InvalidRequest(f"parent: {len(request.parent)} bytes; a key has {KEY_BYTES}, or none for the first")
        hold_s = _seconds(request.hold_s) if request.speculative else None
        number, slots = worker.shelf.reserve(worker.owner, request.parent, split(request.keys), request.tenant, hold_s)
        return pb.ReserveReply(reservation=number, slots=pack_slots(slots))

    async def Commit(self, request: pb.CommitRequest, context: Context) -> pb.CommitReply:
        """See the proto."""
        worker = await self._worker(request.instance, context)
        checksums = unpack_checksums(request.checksums)
        try:
            committed = worker.shelf.commit(worker.instance, request.reservation, checksums)
        except UnknownReservation as error:
            await _abort(context, grpc.StatusCode.NOT_FOUND, error)
        except ValueError as error:
            raise InvalidRequest(str(error)) from error
        return pb.CommitReply(committed=committed)

    async def Release(self, request: pb.ReleaseRequest, context: Context) -> pb.ReleaseReply:
        """See the proto."""
        worker = await self._worker(request.instance, context)
        if len(request.leases) + len(request.reservations) > _MOST_NUMBERS:
            raise InvalidRequest(f"more than {_MOST_NUMBERS} numbers in one call: send fewer at a time")
        corrupt = set(unpack_slots(request.corrupt))
        worker.shelf.release(worker.instance, request.leases, request.reservations, corrupt)
        return pb.ReleaseReply()

    async def Read(self, request: pb.ReadRequest, context: Context) -> AsyncIterator[bytes]:
        """See the proto."""
        shelf = await self._shelf(request.namespace, context)
        count_keys(request.keys, self.max_blocks)
        async for frame in shelf.read(request.keys):
            yield frame

    async def Pin(self, request: pb.PinRequest, context: Context) -> pb.PinReply:
        """See the proto."""
        shelf = await self._shelf(request.namespace, context)
        count_keys(request.keys, self.max_blocks)
        _check_names(request.tenant, "")
        if not request.tenant:
            raise InvalidRequest("tenant: say who is charged")
        return pb.PinReply(pinned=shelf.pin(request.tenant, request.keys, _seconds(request.hold_s, LONGEST_S)))

    # -- within ----------------------------------------------------------------------------------------
    async def _worker(self, instance: bytes, context: Context) -> Worker:
        """The connected worker that calls."""
        worker = self.registry.get(instance)
        if worker is None:
            text = f"worker {instance[:4].hex()} is not registered (any more): open a Workers.Work stream first"
            await _abort(context, grpc.StatusCode.FAILED_PRECONDITION, text)
        return worker

    async def _shelf(self, namespace: str, context: Context) -> Shelf:
        shelf = self.node.shelves.get(namespace)
        if shelf is None:
            text = "no worker of this node has registered for that namespace: ask where one has"
            await _abort(context, grpc.StatusCode.NOT_FOUND, text)
        return shelf


def add_cache(server: grpc.aio.Server, service: CacheService) -> None:
    """Register `service`, with raw frames for `Read`."""
    unary: dict[str, tuple[Any, Any, Any]] = {
        "Lookup": (service.Lookup, pb.LookupRequest, pb.LookupReply),
        "Reserve": (service.Reserve, pb.ReserveRequest, pb.ReserveReply),
        "Commit": (service.Commit, pb.CommitRequest, pb.CommitReply),
        "Release": (service.Release, pb.ReleaseRequest, pb.ReleaseReply),
        "Pin": (service.Pin, pb.PinRequest, pb.PinReply),
    }
    handlers: dict[str, Any] = {
        name: grpc.unary_unary_rpc_method_handler(call, asked.FromString, answer.SerializeToString)
        for name, (call, asked, answer) in unary.items()
    }
    handlers["Read"] = grpc.unary_stream_rpc_method_handler(service.Read, pb.ReadRequest.FromString, None)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("kvprefetch.v1.Cache", handlers),))


async def _abort(context: Context, code: grpc.StatusCode, why: object) -> NoReturn:
    await context.abort(code, str(why))
    raise AssertionError("abort raises")


def _check_names(tenant: str, session: str) -> None:
    if len(tenant.encode()) > _MOST_NAME:
        raise InvalidRequest(f"tenant: a name has at most {_MOST_NAME} bytes")
    if len(session.encode()) > _MOST_SESSION:
        raise InvalidRequest(f"session: at most {_MOST_SESSION} bytes")


def _seconds(hold_s: float, longest_s: float = _LONGEST_HOLD_S) -> float:
    if not math.isfinite(hold_s) or not 0 <= hold_s <= longest_s:
        raise InvalidRequest(f"hold_s: {hold_s}; from 0 to {longest_s:.0f} seconds")
    return hold_s
