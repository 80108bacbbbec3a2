"""The `Workers` service: a worker's life with its node, one stream each.

Promises
- A stream begins with a `Register` and is answered with `Registered`; from then on the worker counts as present, until
  the stream ends. Then its slots are quarantined and its leases kept, until it comes back or is proved dead.
- A process that registers again, before we have noticed that its stream broke, takes the old stream's place. Another
  process with the same instance is refused (ALREADY_EXISTS) while the first one may be alive.
- A process that cannot be seen from here is refused: its death could never be proved.
"""

import asyncio
import logging
from typing import Any

import grpc
import grpc.aio

from kvprefetch.cache.shares import Shares
from kvprefetch.errors import InvalidRequest, ServiceUnavailable
from kvprefetch.service.calls import Context
from kvprefetch.service.namespace import Model, model_of, owner_of
from kvprefetch.service.node import Node
from kvprefetch.service.registry import Registry, Worker
from kvprefetch.service.watch import is_alive
from kvprefetch.tiers.slots import Owner
from kvprefetch.v1 import admin_pb2, workers_pb2_grpc
from kvprefetch.v1 import workers_pb2 as pb

log = logging.getLogger(__name__)

FIRST_WORD_S = 10.0
"""A stream that does not register in so long is closed."""
_MOST_NUMBERS = 65_536  # leases and reservations in a Register


class WorkersService(workers_pb2_grpc.WorkersServicer):
    """See the module's promises."""

    def __init__(self, node: Node, registry: Registry) -> None:
        self.node, self.registry = node, registry
        node.on_death.append(self._died)
        node.tenants.on_change.append(self._tell_shares)
        self._shares = Shares(), _message(Shares())  # the latest, and how they are said

    async def Work(self, request_iterator: object, context: Context) -> None:
        """See the proto."""
        register = await self._first_word(context)
        owner, model = owner_of(register), model_of(register)
        await self._admit(owner, register, context)
        shelf = await self.node.open(model)
        await self._admit(owner, register, context)  # once more: others had their turn meanwhile
        worker = Worker(owner, model.name, shelf, register.device_blocks, task=asyncio.current_task())
        self._join(worker, register)
        try:
            await context.write(self._registered(worker, model))
            if self.node.tenants.is_ruling:
                await context.write(await self._say_shares())
            await self._converse(worker, context)
        finally:
            self._leave(worker)

    # -- within ----------------------------------------------------------------------------------------
    async def _first_word(self, context: Context) -> pb.Register:
        try:
            message: Any = await asyncio.wait_for(context.read(), FIRST_WORD_S)
        except TimeoutError:
            message = None
        if not isinstance(message, pb.WorkerMessage) or not message.HasField("register"):
            raise InvalidRequest("the first message of a Work stream is Register, within 10 s")
        return message.register

    async def _admit(self, owner: Owner, register: pb.Register, context: Context) -> None:
        """Raise unless this process may have this instance now."""
        if self.registry.is_draining:
            raise ServiceUnavailable("the service is draining; register again when it has restarted")
        if len(register.leases) + len(register.reservations) > _MOST_NUMBERS:
            raise InvalidRequest(f"more than {_MOST_NUMBERS} leases and reservations")
        if not is_alive(owner.pid, owner.started):
            raise InvalidRequest(
                f"pid {owner.pid}, started {owner.started}: no such process is seen from the service; run both in one "
                "namespace of processes (containers: share it), and read `started` from /proc/PID/stat, field 22"
            )
        other = self.node.owner(owner.instance)
        if other is not None and other != owner and is_alive(other.pid, other.started):
            text = f"pid {other.pid} has this instance and is alive: draw another one"
            await context.abort(grpc.StatusCode.ALREADY_EXISTS, text)

    def _join(self, worker: Worker, register: pb.Register) -> None:
        before = self.registry.get(worker.instance)
        if before is not None:
            self._leave(before)
            if before.task is not None:
                before.task.cancel()
        self.node.returned(worker.owner, register.leases, register.reservations)
        self.registry.join(worker)
        log.info("worker %s (%s) has registered", worker.instance[:4].hex(), worker.name)

    def _leave(self, worker: Worker) -> None:
        if self.registry.leave(worker):
            self.node.vanished(worker.instance)
            log.info("the stream of worker %s (%s) has ended", worker.instance[:4].hex(), worker.name)

    def _died(self, instance: bytes) -> None:
        worker = self.registry.get(instance)
        if worker is not None:
            self.registry.leave(worker)
            if worker.task is not None:
                worker.task.cancel()
        self.registry.forget(instance)

    def _tell_shares(self, shares: Shares) -> None:
        """To everybody. Where changes follow each other faster than they are sent, the latest is."""
        for worker in self.registry.workers():
            if worker.shares_due:
                continue
            worker.shares_due = self.registry.send(worker.instance, pb.ServiceMessage(shares=pb.Shares()))
            if not worker.shares_due and worker.task is not None:
                worker.task.cancel()  # it is too far behind: it registers again, and hears of them then

    def _registered(self, worker: Worker, model: Model) -> pb.ServiceMessage:
        arena = worker.shelf.host.arena
        return pb.ServiceMessage(
            registered=pb.Registered(
                namespace=worker.shelf.namespace,
                arena=str(arena.path),
                slots=arena.slots,
                slot_bytes=arena.slot_bytes,
                secret=self.node.secret(model),
                service=self.node.run,
            )
        )

    async def _converse(self, worker: Worker, context: Context) -> None:
        """Until the worker ends the stream."""
        telling = asyncio.create_task(self._tell(worker, context))
        try:
            while True:
                message: Any = await context.read()
                if message is grpc.aio.EOF:
                    return
                if not isinstance(message, pb.WorkerMessage):
                    raise InvalidRequest("bytes that are no WorkerMessage")
                if message.HasField("register"):
                    raise InvalidRequest("Register is the first message of a stream, and only the first")
                self.registry.note(worker, message)
        finally:
            telling.cancel()

    async def _tell(self, worker: Worker, context: Context) -> None:
        while True:
            message = await worker.outbox.get()
            if message.HasField("shares"):
                worker.shares_due = False  # from now on a change is one more to be told
                message = await self._say_shares()
            await context.write(message)

    async def _say_shares(self) -> pb.ServiceMessage:
        """Made in a thread: there may be very many."""
        shares = self.node.tenants.shares
        if self._shares[0] is not shares:
            self._shares = shares, await asyncio.to_thread(_message, shares)
        return self._shares[1]


def _message(shares: Shares) -> pb.ServiceMessage:
    named = shares.named.items()
    tenants = [admin_pb2.TenantShare(name=n, weight=s.weight, guarantee=s.guarantee) for n, s in named]
    return pb.ServiceMessage(shares=pb.Shares(tenants=tenants))
