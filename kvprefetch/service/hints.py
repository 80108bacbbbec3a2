"""The service's book of hints: each is given to a worker, followed, and ends with one outcome (law 6), then a use.

Promises
- A hint that no worker can take waits until one registers, or expires. If its worker vanishes before it is done,
  another one gets it, once; the second time it is FAILED. One that is for a certain worker only ends with it.
- The first outcome and the first use count; what a worker says later, or of somebody else's hint, is ignored.
- All that is kept is bounded: a tenant has at most `max_hints` open hints, with `max_bytes` of contexts, and as many
  ended ones are remembered, without their contexts.
- Nothing blocks; used from the event loop's thread alone. Times are monotonic seconds, handed in.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from itertools import count
from typing import Protocol

from kvprefetch.client.words import outcome_of, use_of
from kvprefetch.errors import InvalidRequest, LimitExceeded, UnknownContext, UnknownModel
from kvprefetch.outcomes import Outcome, Use
from kvprefetch.service.hint import Hint, TenantBook
from kvprefetch.v1.workers_pb2 import Place, Preload, PreloadReport, ServiceMessage, Withdraw

COMES_BACK_S = 10.0
"""A worker that vanished may register again for so long; then what it had made warm counts as gone."""
PATIENCE_S = 60.0
"""A worker that stays connected and says nothing is believed for so long after the hint's time."""
UNSTATED_HOLD_S = 3_600.0
"""Where the worker's own setting decides how long a preload is held."""


class Workers(Protocol):
    """What the book needs of the registry of workers. Workers are named by their instances.

    The registry tells the book: `registered`, `vanished`, `reported`.
    """

    def models(self) -> Collection[str]:
        """Every model that a worker has registered for since the service started."""

    def place(self, tenant: str, session: str, model: str) -> "tuple[bytes, Place] | None":
        """The connected worker that a preload goes to, and where it is wanted there; None: no worker of that model."""

    def expected_at(self, tenant: str, session: str, model: str) -> bytes | None:
        """The connected worker that the session's next request most likely comes to, however unsure."""

    def send(self, worker: bytes, message: ServiceMessage) -> bool:
        """Queue a message for a worker; False: it is not connected (any more), or does not read."""

    def name(self, worker: bytes) -> str:
        """For people."""

    def session_ended(self, tenant: str, session: str) -> None:
        """Forget where that session goes."""


class HintBook:
    """See the module's promises. `first_number`: hints of another run of the service must have other numbers."""

    def __init__(self, workers: Workers, max_hints: int, max_bytes: int, first_number: int) -> None:
        self.workers, self.max_hints, self.max_bytes = workers, max_hints, max_bytes
        self.tenants: dict[str, TenantBook] = {}
        self.is_closed = False
        self.counts: Counter[str] = Counter()
        self._open: dict[int, Hint] = {}  # of all tenants
        self._away: dict[bytes, float] = {}  # workers that vanished, and when they will be given up
        self._numbers: Iterator[int] = count(first_number)

    # -- what callers want -----------------------------------------------------------------------------
    def issue(
        self,
        tenant: str,
        preload: Preload,
        now: float,
        hold_s: float | None = None,
        *,
        only_at: bytes | None = None,
        heard: Callable[[Hint], None] | None = None,
    ) -> Hint:
        """A new hint; `preload` says all but its number and place. Raises LimitExceeded, UnknownModel, InvalidRequest.

        Without a `hold_s`, the worker's setting says how long it keeps its place. One that is for a certain worker
        only is not limited: whoever issues it keeps its content, and counts it.
        """
        size = preload.context.ByteSize() if only_at is None else 0
        if only_at is None:
            self.make_room(tenant, 1, size)
        model = self.resolve_model(preload.context.model)
        hold = UNSTATED_HOLD_S if hold_s is None else hold_s
        expected_at = now + preload.expected_in_s
        hint = Hint(self.next_number(), tenant, model, preload, expected_at, expected_at + hold, size=size)
        hint.only_at, hint.heard = only_at, heard
        preload.hint, preload.tenant = hint.number, tenant
        if hold_s is not None:
            preload.hold_s = hold_s
        book = self.tenants.setdefault(tenant, TenantBook())
        book.issued += 1
        book.open_bytes += size
        book.open[hint.number] = self._open[hint.number] = hint
        self._place(hint, now)
        return hint

    def next_number(self) -> int:
        """A number that no hint has."""
        return next(self._numbers)

    def make_room(self, tenant: str, hints: int, size: int = 0) -> None:
        """Raises LimitExceeded unless the tenant may have so many more, with contexts of `size` bytes together."""
        book = self.tenants.get(tenant, TenantBook())
        if len(book.open) + hints > self.max_hints or book.open_bytes + size > self.max_bytes:
            raise LimitExceeded(
                f"{len(book.open)} hints with {book.open_bytes} bytes of contexts are open, of {self.max_hints} and "
                f"{self.max_bytes} (service.max_hints, max_context_bytes); cancel some, or give them shorter holds"
            )

    def resolve_model(self, model: str) -> str:
        """The model that is meant; "" while no worker has registered. Raises UnknownModel, InvalidRequest."""
        known = sorted(self.workers.models())
        if model and known and model not in known:
            raise UnknownModel(f"no worker serves {model!r}; there is {', '.join(map(repr, known))}")
        if not model and len(known) > 1:
            raise InvalidRequest(f"say which model: {', '.join(map(repr, known))}")
        return model or (known[0] if known else "")

    def find(self, tenant: str, number: int) -> Hint:
        """A hint of this tenant, open or ended. Raises UnknownContext."""
        book = self.tenants.get(tenant, TenantBook())
        hint = book.open.get(number) or book.ended.get(number)
        if hint is None:
            raise UnknownContext(f"no hint {number} is known; it is forgotten, or of an earlier run of the service")
        return hint

    def cancel(self, hint: Hint, reason: str, now: float) -> None:
        """Withdraw it; the outcome is CANCELLED unless it has one."""
        if hint.outcome is not None:
            return
        hint.is_withdrawn = True
        told = hint.worker is not None and self.workers.send(
            hint.worker, ServiceMessage(withdraw=Withdraw(hint=hint.number))
        )
        if not told:
            self._resolve(hint, Outcome.CANCELLED, now, reason)

    def of_session(self, tenant: str, session: str) -> list[Hint]:
        """The open hints of one session."""
        book = self.tenants.get(tenant, TenantBook())
        return [hint for hint in book.open.values() if hint.session == session]

    # -- what the registry tells -----------------------------------------------------------------------
    def registered(self, worker: bytes, model: str, now: float) -> None:
        """A worker is there, for the first time or again: it gets what waits for its model."""
        self._away.pop(worker, None)
        for hint in list(self._open.values()):
            if hint.worker is None and hint.model in ("", model):
                self._place(hint, now)

    def vanished(self, worker: bytes, now: float) -> None:
        """A worker's stream broke."""
        self._away[worker] = now + COMES_BACK_S
        for hint in [each for each in self._open.values() if each.worker == worker and each.outcome is None]:
            hint.worker, hint.losses = None, hint.losses + 1
            if hint.is_withdrawn or hint.only_at is not None:
                self._resolve(hint, Outcome.CANCELLED, now, "its worker vanished, and nobody else is to have it")
            elif hint.losses > 1:
                self._resolve(hint, Outcome.FAILED, now, "the worker vanished, and so did the one before")
            else:
                self.counts["moved"] += 1
                self._place(hint, now)

    def reported(self, worker: bytes, report: PreloadReport, now: float) -> None:
        """What became of a preload there."""
        hint = self._open.get(report.hint)
        if hint is None or hint.worker != worker:
            self.counts["stray_reports"] += 1
            return
        hint.because = report.because or hint.because
        outcome, use = outcome_of(report.outcome), use_of(report.use)
        if outcome is not None and hint.outcome is None:
            self._resolve(hint, outcome, now, report.reason, report.tokens)
        if use is not None and hint.outcome is not None and hint.outcome.is_resident:
            self._use(hint, use, report.tokens if use is Use.USED else 0)

    def expire(self, now: float) -> None:
        """Close what is overdue, and try again to place what waits. To be called about every second."""
        given_up = {worker for worker, until in self._away.items() if until <= now}
        for worker in given_up:
            del self._away[worker]
        for hint in list(self._open.values()):
            if hint.outcome is None and hint.worker is None and hint.expires_at <= now:
                self._resolve(hint, Outcome.EXPIRED, now, f"no worker of {hint.model or 'any model'} came in time")
            elif hint.outcome is None and hint.worker is None:
                self._place(hint, now)
            elif hint.outcome is None and hint.expires_at + PATIENCE_S <= now:
                self.cancel(hint, "", now)
                self._resolve(hint, Outcome.EXPIRED, now, "its worker did not say what became of it")
            elif hint.outcome is not None and hint.worker in given_up:
                hint.reason = "the worker vanished"
                self._use(hint, Use.EVICTED, 0)
            elif hint.outcome is not None and hint.use_due_at <= now:
                self._use(hint, Use.UNUSED, 0)

    def close(self, reason: str, now: float) -> None:
        """The service ends: what has no outcome is FAILED. Whoever waits is woken."""
        self.is_closed = True
        for hint in list(self._open.values()):
            if hint.outcome is None:
                self._resolve(hint, Outcome.FAILED, now, reason)
            else:
                self._use(hint, Use.UNUSED, 0)

    # -- within ----------------------------------------------------------------------------------------
    def _place(self, hint: Hint, now: float) -> None:
        """Give it to a worker, if there is one."""
        hint.model = hint.model or self._only_model()
        place: tuple[bytes, Place] | None = None
        if hint.only_at is not None:
            place = hint.only_at, Place.PLACE_DEVICE
        elif hint.model:
            place = self.workers.place(hint.tenant, hint.session, hint.model)
        if place is None:
            return
        worker, where = place
        hint.preload.place = where
        hint.preload.expected_in_s = max(hint.expected_at - now, 0.0)
        if self.workers.send(worker, ServiceMessage(preload=hint.preload)):
            hint.worker, hint.worker_name = worker, self.workers.name(worker)
            self.tenants[hint.tenant].placed[Place.Name(where).removeprefix("PLACE_").lower()] += 1

    def _only_model(self) -> str:
        known = sorted(self.workers.models())
        return known[0] if known else ""

    def _resolve(self, hint: Hint, outcome: Outcome, now: float, reason: str, tokens: int = 0) -> None:
        if hint.outcome is not None:
            return
        hint.outcome, hint.reason, hint.tokens = outcome, reason, tokens
        self.tenants[hint.tenant].outcomes[outcome] += 1
        hold_s = hint.preload.hold_s if hint.preload.HasField("hold_s") else UNSTATED_HOLD_S
        hint.use_due_at = now + hold_s + PATIENCE_S
        hint.resolved.set()
        if not outcome.is_resident:
            self._end(hint)
        if hint.heard is not None:
            hint.heard(hint)

    def _use(self, hint: Hint, use: Use, tokens: int) -> None:
        hint.use, hint.used_tokens = use, tokens
        book = self.tenants[hint.tenant]
        book.uses[use] += 1
        book.used_tokens += tokens
        self._end(hint)
        if hint.heard is not None:
            hint.heard(hint)

    def _end(self, hint: Hint) -> None:
        book = self.tenants[hint.tenant]
        self._open.pop(hint.number)
        book.ended[hint.number] = book.open.pop(hint.number)
        if len(book.ended) > self.max_hints:
            book.ended.popitem(last=False)
        book.open_bytes -= hint.size
        hint.preload = Preload(session=hint.session)  # its content may be megabytes
        hint.ended.set()
