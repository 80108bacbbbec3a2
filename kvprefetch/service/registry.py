"""The workers that are connected now: what they are, how busy, and what to tell them.

Promises
- Used on the event loop's thread alone; nothing here blocks or awaits.
- What is sent to a worker is queued, at most `MOST_QUEUED` messages; a worker that is not there, or does not take what
  it is sent, is told nothing, and `send` says so.
- `place` says where a session's next request will land, as far as that was learnt.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from kvprefetch.service.placement import Likely, Placement
from kvprefetch.service.shelf import Shelf
from kvprefetch.tiers.slots import Owner
from kvprefetch.v1 import workers_pb2 as pb

MOST_QUEUED = 4_096

Report = Callable[["Worker", pb.WorkerMessage], None]
Change = Callable[["Worker"], None]


@dataclass(eq=False)
class Worker:
    """One connected worker. Its load is what it reported last."""

    owner: Owner
    model: str
    shelf: Shelf
    device_blocks: int
    load: pb.LoadReport = field(default_factory=pb.LoadReport)
    heard_at: float = 0.0  # when it said something last
    outbox: "asyncio.Queue[pb.ServiceMessage]" = field(default_factory=lambda: asyncio.Queue(MOST_QUEUED))
    task: "asyncio.Task[object] | None" = None  # that answers its stream
    shares_due: bool = False  # a message in the outbox stands for those that are valid when its turn comes

    @property
    def instance(self) -> bytes:
        return self.owner.instance

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.model}@{self.owner.pid}"


class Registry:
    """See the module's promises. `confidence`: that a session goes to one worker; below it, the place is the host."""

    def __init__(self, clock: Callable[[], float], confidence: float) -> None:
        self.clock, self.confidence = clock, confidence
        self.placement = Placement()
        self.is_draining = False
        self._workers: dict[bytes, Worker] = {}
        self._reports: list[Report] = []
        self._joined: list[Change] = []
        self._left: list[Change] = []

    # -- asking ----------------------------------------------------------------------------------------
    def workers(self, model: str = "") -> list[Worker]:
        """Those that are connected, in the order of their registration; with a `model`, those that serve it."""
        return [worker for worker in self._workers.values() if model in ("", worker.model)]

    def get(self, instance: bytes) -> Worker | None:
        """The connected worker with this instance."""
        return self._workers.get(instance)

    def place(self, tenant: str, session: str, model: str = "") -> "tuple[Worker, pb.Place] | None":
        """Whom to give a preload, and where it is wanted. None: no worker is there that serves `model`.

        Into the device of the worker that the request will come to, where that is sure enough; else into the arena,
        by the least busy worker.
        """
        likely = self._likely(tenant, session, model)
        if likely is None:
            return None
        if likely.probability > self.confidence:
            return self._workers[likely.worker], pb.PLACE_DEVICE
        least = min(self.workers(model), key=lambda worker: (worker.load.live, worker.load.preloads))
        return least, pb.PLACE_HOST

    def expected_at(self, tenant: str, session: str, model: str = "") -> Worker | None:
        """The worker that a session's next request most likely comes to, however unsure."""
        likely = self._likely(tenant, session, model)
        return self._workers[likely.worker] if likely else None

    # -- telling ---------------------------------------------------------------------------------------
    def send(self, instance: bytes, message: pb.ServiceMessage) -> bool:
        """Queue a message; False: the worker is not there, or too far behind."""
        worker = self._workers.get(instance)
        if worker is None or worker.outbox.full():
            return False
        worker.outbox.put_nowait(message)
        return True

    def drain(self) -> None:
        """Tell everybody that the service is ending; nobody may register any more."""
        self.is_draining = True
        for instance in self._workers:
            self.send(instance, pb.ServiceMessage(draining=pb.Draining()))

    # -- hearing ---------------------------------------------------------------------------------------
    def on_report(self, report: Report) -> None:
        """`report(worker, message)` for every load, preload and session report, after it was noted here."""
        self._reports.append(report)

    def on_joined(self, change: Change) -> None:
        """`change(worker)` when a worker has registered, for the first time or again."""
        self._joined.append(change)

    def on_left(self, change: Change) -> None:
        """`change(worker)` when its stream has ended; what it was asked to do will not be reported."""
        self._left.append(change)

    # -- for the stream's servicer ---------------------------------------------------------------------
    def join(self, worker: Worker) -> None:
        """Its stream is open."""
        worker.heard_at = self.clock()
        self._workers[worker.instance] = worker
        for change in self._joined:
            change(worker)

    def leave(self, worker: Worker) -> bool:
        """Its stream ended; False: another one took its place, or it had left."""
        if self._workers.get(worker.instance) is not worker:
            return False
        del self._workers[worker.instance]
        worker.shelf.tokens_per_s.pop(worker.instance, None)
        for change in self._left:
            change(worker)
        return True

    def forget(self, instance: bytes) -> None:
        """The worker is dead: no session is expected there."""
        self.placement.left(instance)

    def note(self, worker: Worker, message: pb.WorkerMessage) -> None:
        """What a worker said."""
        worker.heard_at = self.clock()
        kind = message.WhichOneof("message")
        if kind == "load":
            worker.load = message.load
            if message.load.tokens_per_s > 0:
                worker.shelf.tokens_per_s[worker.instance] = message.load.tokens_per_s
        elif kind == "session":
            self.placement.served(message.session.tenant, message.session.session, worker.instance, self.clock())
        for report in self._reports:
            report(worker, message)

    # -- within ----------------------------------------------------------------------------------------
    def _likely(self, tenant: str, session: str, model: str) -> Likely | None:
        able = [worker.instance for worker in self.workers(model)]
        return self.placement.likely(tenant, session, able, self.clock())
