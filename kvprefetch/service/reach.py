"""The registry of workers, as the book of hints sees it."""

from collections.abc import Callable, Collection

from kvprefetch.service.hints import HintBook
from kvprefetch.service.public import PublicContexts
from kvprefetch.service.registry import Registry, Worker
from kvprefetch.v1.workers_pb2 import Place, ServiceMessage, WorkerMessage


class Reach:
    """Whom hints can reach. Remembers every model that was ever registered, for a worker may come back."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self._models: set[str] = set()
        registry.on_joined(lambda worker: self._models.add(worker.model))

    def models(self) -> Collection[str]:
        """See `hints.Workers`, here and below."""
        return self._models

    def place(self, tenant: str, session: str, model: str) -> "tuple[bytes, Place] | None":
        found = self.registry.place(tenant, session, model)
        return (found[0].instance, found[1]) if found else None

    def expected_at(self, tenant: str, session: str, model: str) -> bytes | None:
        worker = self.registry.expected_at(tenant, session, model)
        return worker.instance if worker else None

    def send(self, worker: bytes, message: ServiceMessage) -> bool:
        return self.registry.send(worker, message)

    def name(self, worker: bytes) -> str:
        known = self.registry.get(worker)
        return known.name if known else ""

    def session_ended(self, tenant: str, session: str) -> None:
        self.registry.placement.ended(tenant, session)


def connect(registry: Registry, book: HintBook, public: PublicContexts, clock: Callable[[], float]) -> None:
    """Tell the book, and who keeps the public contexts, what the registry hears."""

    def reported(worker: Worker, message: WorkerMessage) -> None:
        if message.HasField("preload"):
            book.reported(worker.instance, message.preload, clock())

    registry.on_joined(lambda worker: book.registered(worker.instance, worker.model, clock()))
    registry.on_joined(lambda worker: public.registered(worker.instance, worker.model, clock()))
    registry.on_left(lambda worker: public.vanished(worker.instance))
    registry.on_left(lambda worker: book.vanished(worker.instance, clock()))
    registry.on_report(reported)
