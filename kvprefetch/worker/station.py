"""The worker's stream with its node's service: it registers, reports its load, and takes preloads.

What is worth preloading, and where, is the service's word; when, this worker's own: each preload becomes a hint here,
which the planner weighs like any other. When the stream breaks, the worker registers again by itself, for ever.
"""

import logging
import os
import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from kvprefetch.cache.keys import canonical
from kvprefetch.cache.shares import Share, Shares
from kvprefetch.client.remote import short
from kvprefetch.errors import TierError
from kvprefetch.v1 import workers_pb2, workers_pb2_grpc
from kvprefetch.worker.assigned import Assigned
from kvprefetch.worker.link import Link

if TYPE_CHECKING:
    from kvprefetch.worker.core import Core

log = logging.getLogger(__name__)
_REPORT_S = 1.0
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.1, 2.0


class Station:
    """See the module's promises. `registered` is set once the worker has been registered for the first time."""

    def __init__(self, core: "Core", link: Link) -> None:
        self.core, self.link = core, link
        self.registered = threading.Event()
        self.is_connected = False
        self._service = ""
        self._outbox: queue.SimpleQueue[workers_pb2.WorkerMessage | None] = queue.SimpleQueue()
        self._broke_at = link.clock()
        self._told: grpc.StatusCode | None = None  # why there is no service, as was said last
        self.assigned = Assigned(core, lambda message: self._outbox.put(message), link.clock)
        self._closing = threading.Event()
        self._call: Any = None  # both a grpc.Call and an iterator of its messages
        self._thread = threading.Thread(target=self._run, name="kvprefetch-station", daemon=True)
        self._thread.start()

    def served(self, tenant: str, session: str) -> None:
        """A live request of the session was served here."""
        if session and self.is_connected:
            report = workers_pb2.SessionReport(tenant=tenant, session=short(session))
            self._outbox.put(workers_pb2.WorkerMessage(session=report))

    def close(self) -> None:
        """End the stream and its thread."""
        self._closing.set()
        self._outbox.put(None)
        if self._call is not None:
            self._call.cancel()
        self._thread.join()

    # -- the station's thread --------------------------------------------------------------------------
    def _run(self) -> None:
        wait_s = _FIRST_WAIT_S
        while not self._closing.is_set():
            try:
                with self.link.offloader.writing:  # so that no slot is being written to: the service may free them all
                    self.link.detach()
                    self.assigned.broken()
                    self._outbox = queue.SimpleQueue()
                    self._outbox.put(workers_pb2.WorkerMessage(register=self._register()))
                    self._call = workers_pb2_grpc.WorkersStub(self.link.channel).Work(self._messages(self._outbox))
                    first = next(self._call).registered
                    self._take_place(first)
                wait_s = _FIRST_WAIT_S
                self._listen(self._call)
            except grpc.RpcError as error:
                self._tell(error)
            except StopIteration:
                log.warning("the cache service has ended the stream")
            except TierError as error:
                log.warning("the arena cannot be used: %s", error)
            except ValueError:  # what gRPC raises on a closed channel
                return
            except Exception:  # the thread's outermost line
                log.exception("the stream with the cache service broke")
            finally:
                if self.is_connected:
                    self.is_connected, self._broke_at = False, self.link.clock()
            self._closing.wait(wait_s)
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S)

    def _listen(self, call: Iterator[workers_pb2.ServiceMessage]) -> None:
        for message in call:
            kind = message.WhichOneof("message")
            if kind == "preload":
                self.assigned.take(message.preload)
            elif kind == "withdraw":
                self.assigned.withdraw(message.withdraw.hint)
            elif kind == "observed":
                seen = message.observed
                self.core.hints(seen.tenant).observed(seen.kind, seen.session, seen.about)
            elif kind == "shares":
                tenants = message.shares.tenants
                named = {each.name: Share(each.weight, each.guarantee) for each in tenants}
                self.core.worker.set_shares(Shares(named))
            elif kind == "draining":
                log.info("the cache service is draining")

    def _tell(self, error: grpc.RpcError) -> None:
        """Once for each reason, until the service was there again."""
        if self._closing.is_set() or error.code() is self._told:
            return
        self._told = error.code()
        if self._told in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
            log.error("the cache service refuses this worker (%s); serving without", error.details())
        else:
            log.warning("no cache service (%s: %s); serving without", error.code().name, error.details())

    def _register(self) -> workers_pb2.Register:
        engine = self.core.engine
        return workers_pb2.Register(
            instance=self.link.instance,
            pid=os.getpid(),
            started=started_ticks(os.getpid()),
            model=engine.loaded.name,
            fingerprint=canonical(engine.fingerprint),
            block_bytes=engine.shape.bytes,
            block_tokens=engine.block_tokens,
            leases=self.link.leases(),
            device_blocks=engine.pool.pages,
        )

    def _take_place(self, registered: workers_pb2.Registered) -> None:
        is_new = bool(self._service) and registered.service != self._service
        self.core.rekey(registered.secret)
        self.link.registered(registered.arena, registered.namespace, is_new)
        if registered.service == self._service:
            self.assigned.repeat(self._broke_at)
        self._service = registered.service
        self.is_connected, self._told = True, None
        self.registered.set()

    def _messages(
        self, outbox: "queue.SimpleQueue[workers_pb2.WorkerMessage | None]"
    ) -> Iterator[workers_pb2.WorkerMessage]:
        while True:
            try:
                message = outbox.get(timeout=_REPORT_S)
            except queue.Empty:
                message = workers_pb2.WorkerMessage(load=self._load())
            if message is None or self._closing.is_set():
                return
            yield message

    def _load(self) -> workers_pb2.LoadReport:
        worker = self.core.worker
        seconds = worker.foresight.rates.prefill_s(0, _TYPICAL)
        return workers_pb2.LoadReport(
            live=len(worker.live.active) + len(worker.live.waiting),
            preloads=len(worker.preloads.jobs),
            free_blocks=worker.pool.free_pages,
            tokens_per_s=_TYPICAL / seconds if seconds else 0.0,
        )


_TYPICAL = 2_048  # tokens of a prompt whose prefill rate is reported


def started_ticks(pid: int) -> int:
    """When the process started, in ticks since boot: with the pid it names a process for good. 0 where unknown."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    return int(stat.rpartition(")")[2].split()[19])
