"""Workers as the book of hints sees them: a few by name, with what they were sent."""

from kvprefetch.service.hints import HintBook
from kvprefetch.v1.outcomes_pb2 import Outcome, Use
from kvprefetch.v1.workers_pb2 import PLACE_DEVICE, Place, PreloadReport, ServiceMessage


class Crew:
    """Every session goes to the first worker of its model."""

    def __init__(self) -> None:
        self.there: dict[bytes, str] = {}  # worker → its model
        self.known: set[str] = set()
        self.sent: list[tuple[bytes, ServiceMessage]] = []
        self.full: set[bytes] = set()
        self.forgotten: list[tuple[str, str]] = []

    def join(self, book: HintBook, worker: bytes, model: str = "m", now: float = 0.0) -> None:
        self.there[worker] = model
        self.known.add(model)
        book.registered(worker, model, now)

    def leave(self, book: HintBook, worker: bytes, now: float = 0.0) -> None:
        del self.there[worker]
        book.vanished(worker, now)

    def told(self, worker: bytes, kind: str) -> list[ServiceMessage]:
        return [message for to, message in self.sent if to == worker and message.WhichOneof("message") == kind]

    # -- what the book asks ----------------------------------------------------------------------------
    def models(self) -> set[str]:
        return self.known

    def place(self, tenant: str, session: str, model: str) -> tuple[bytes, Place] | None:
        worker = self.expected_at(tenant, session, model)
        return (worker, PLACE_DEVICE) if worker else None

    def expected_at(self, tenant: str, session: str, model: str) -> bytes | None:
        return next((worker for worker, serves in self.there.items() if serves == model), None)

    def send(self, worker: bytes, message: ServiceMessage) -> bool:
        takes = worker in self.there and worker not in self.full
        if takes:
            self.sent.append((worker, message))
        return takes

    def name(self, worker: bytes) -> str:
        return worker.decode()

    def session_ended(self, tenant: str, session: str) -> None:
        self.forgotten.append((tenant, session))


def report(hint: int, outcome: str = "", use: str = "", tokens: int = 0, reason: str = "") -> PreloadReport:
    said = PreloadReport(hint=hint, tokens=tokens, reason=reason)
    if outcome:
        said.outcome = Outcome.Value(f"OUTCOME_{outcome}")
    if use:
        said.use = Use.Value(f"USE_{use}")
    return said
