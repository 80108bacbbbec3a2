"""Public contexts: what the operator wants every worker of a model to hold, those that come later as well.

Promises
- Each worker's copy is a hint of the operator's in the book, for that worker alone. A context has its outcome when
  every worker that is there has one. Workers that register before its hold is over are given it, too; then it has its
  use.
- The same context given again takes the place of the one before.
- Bounded: `most` contexts, with `most_bytes` together; as many that are over are remembered, without their content.
  A restarted service knows none.
- Nothing blocks; used from the event loop's thread alone. Times are monotonic seconds, handed in.
"""

from collections import OrderedDict
from dataclasses import dataclass, field

from kvprefetch.cache.shares import OPERATOR
from kvprefetch.errors import LimitExceeded
from kvprefetch.outcomes import Outcome, Use
from kvprefetch.service.hint import Hint
from kvprefetch.service.hints import HintBook
from kvprefetch.v1.workers_pb2 import Preload


@dataclass(eq=False)
class Standing(Hint):
    """One public context. Its copies, by worker."""

    copies: dict[bytes, Hint] = field(default_factory=dict)


class PublicContexts:
    """See the module's promises."""

    def __init__(self, book: HintBook, most: int, most_bytes: int) -> None:
        self.book, self.most, self.most_bytes = book, most, most_bytes
        self._there: dict[bytes, str] = {}  # connected workers, and their models
        self._standing: dict[int, Standing] = {}
        self._over: OrderedDict[int, Standing] = OrderedDict()

    def __len__(self) -> int:
        return len(self._standing)

    def issue(self, preload: Preload, now: float, hold_s: float) -> Standing:
        """A context that every worker of its model is to have. Raises LimitExceeded, UnknownModel, InvalidRequest."""
        model = self.book.resolve_model(preload.context.model)
        size = preload.context.ByteSize()
        before = next((old for old in self._standing.values() if old.preload.context == preload.context), None)
        others = [each for each in self._standing.values() if each is not before]
        if len(others) >= self.most or sum(each.size for each in others) + size > self.most_bytes:
            raise LimitExceeded(
                f"{len(others)} public contexts are held, of {self.most} and {self.most_bytes} bytes "
                "(service.max_contexts, max_context_bytes): cancel some, or wait until their holds are over"
            )
        if before is not None:
            self.cancel(before, "it was given again", now)
        until = now + preload.expected_in_s + hold_s
        number = self.book.next_number()
        standing = Standing(number, OPERATOR, model, preload, now + preload.expected_in_s, until, size=size)
        self._standing[number] = standing
        for worker in list(self._there):
            self._give(standing, worker, now)
        return standing

    def find(self, number: int) -> Standing | None:
        """The context of that number, if it is one."""
        return self._standing.get(number) or self._over.get(number)

    def cancel(self, standing: Standing, reason: str, now: float) -> None:
        """No worker is given it any more; those that are not done give it up."""
        for copy in list(standing.copies.values()):
            self.book.cancel(copy, reason, now)
        self._resolve(standing, Outcome.CANCELLED, reason)
        self._end(standing)

    # -- what the registry tells -----------------------------------------------------------------------
    def registered(self, worker: bytes, model: str, now: float) -> None:
        """A worker is there, for the first time or again."""
        self._there[worker] = model
        for standing in list(self._standing.values()):
            copy = standing.copies.get(worker)
            has_it = copy is not None and copy.use is not Use.EVICTED
            if not has_it or (copy is not None and copy.outcome is not None and not copy.outcome.is_resident):
                self._give(standing, worker, now)

    def vanished(self, worker: bytes) -> None:
        """Its stream broke. Its copies are the book's concern."""
        self._there.pop(worker, None)

    def expire(self, now: float) -> None:
        """End those whose hold is over. To be called about every second."""
        for standing in [each for each in self._standing.values() if each.expires_at <= now]:
            self._resolve(standing, Outcome.EXPIRED, "not every worker that is there had it in time")
            self._end(standing)

    def close(self, reason: str) -> None:
        """The service ends. Whoever waits is woken."""
        for standing in list(self._standing.values()):
            self._resolve(standing, Outcome.FAILED, reason)
            self._end(standing)

    # -- within ----------------------------------------------------------------------------------------
    def _give(self, standing: Standing, worker: bytes, now: float) -> None:
        model = self._there[worker]
        standing.model = standing.model or model
        if standing.model != model:
            return
        asked = standing.preload
        preload = Preload(
            context=asked.context,
            probability=asked.probability,
            expected_in_s=max(standing.expected_at - now, 0.0),
        )
        preload.context.model = model
        hold_s = max(standing.expires_at - max(now, standing.expected_at), 0.0)
        copy = self.book.issue(
            OPERATOR, preload, now, hold_s, only_at=worker, heard=lambda copy: self._heard(standing, worker, copy)
        )
        standing.copies[worker] = copy
        if copy.worker is not None:  # it was sent: the content need not be kept for each worker
            copy.preload = Preload(hold_s=hold_s)

    def _heard(self, standing: Standing, worker: bytes, copy: Hint) -> None:
        if copy.use is Use.USED:
            standing.used_tokens += copy.used_tokens
        if copy.outcome is Outcome.CANCELLED:  # its worker vanished, or all is withdrawn
            standing.copies.pop(worker, None)
        copies = list(standing.copies.values())
        if standing.outcome is None and copies and all(each.outcome is not None for each in copies):
            self._settle(standing, copies)

    def _settle(self, standing: Standing, copies: list[Hint]) -> None:
        """Every worker that is there has said what became of it."""
        standing.tokens = min(copy.tokens for copy in copies)
        standing.worker_name = ", ".join(sorted({copy.worker_name for copy in copies}))
        standing.because = copies[0].because
        for copy in copies:
            if copy.outcome is not None and copy.outcome not in (Outcome.WARM, Outcome.ALREADY_WARM):
                self._resolve(standing, copy.outcome, f"{copy.worker_name}: {copy.reason}")
        is_new = any(copy.outcome is Outcome.WARM for copy in copies)
        self._resolve(standing, Outcome.WARM if is_new else Outcome.ALREADY_WARM, "")

    def _resolve(self, standing: Standing, outcome: Outcome, reason: str) -> None:
        if standing.outcome is None:
            standing.outcome, standing.reason = outcome, reason
            standing.resolved.set()

    def _end(self, standing: Standing) -> None:
        if self._standing.pop(standing.number, None) is None:
            return
        if standing.outcome is not None and standing.outcome.is_resident:
            standing.use = Use.USED if standing.used_tokens else Use.UNUSED
        standing.preload, standing.copies = Preload(), {}
        self._over[standing.number] = standing
        if len(self._over) > self.most:
            self._over.popitem(last=False)
        standing.ended.set()
