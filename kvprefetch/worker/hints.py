"""Hints and signals: what callers say may come, turned into preloads on the worker's thread."""

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress

from kvprefetch.cache.commons import Owner
from kvprefetch.contexts import Context, qualified
from kvprefetch.errors import Closed, InvalidRequest, PermissionDenied
from kvprefetch.outcomes import Outcome, Result, Use
from kvprefetch.plan.foresight import NEXT_TURN
from kvprefetch.plan.library import PREDICTED
from kvprefetch.settings import SpeculationSettings
from kvprefetch.worker.job import Job
from kvprefetch.worker.loop import Worker
from kvprefetch.worker.request import FinishReason, LiveRequest

_SIGNAL = "signal "  # and its kind: evidence that no caller can confuse with other evidence
_KINDS = 64  # of signals, counted apart; callers choose the words, so there must be an end


class Prefetch:
    """A hint that was given. It lives on whether or not anybody waits for it."""

    def __init__(self, cancel: Callable[["Prefetch"], None]) -> None:
        self.job: Job | None = None  # set on the worker's thread
        self._cancel = cancel
        self._done = threading.Event()
        self._result: Result | None = None

    def wait(self, timeout_s: float | None = None) -> Result:
        """Its outcome. Raises TimeoutError if there is none within `timeout_s`."""
        if not self._done.wait(timeout_s):
            raise TimeoutError(f"the prefetch has no outcome after {timeout_s} s; it lives on")
        assert self._result is not None
        return self._result

    def cancel(self) -> None:
        """Withdraw it; the outcome is CANCELLED unless it has one. Calling it again does nothing."""
        self._cancel(self)

    @property
    def is_done(self) -> bool:
        """Whether it has its outcome."""
        return self._done.is_set()

    @property
    def use(self) -> Use | None:
        """What it was good for; None while open."""
        return self.job.ticket.use if self.job else None

    @property
    def used_tokens(self) -> int:
        """Tokens that the request which used it found resident."""
        return self.job.ticket.used_tokens if self.job else 0

    @property
    def because(self) -> str:
        """Why it was worked on: evidence, action and the terms of its value, in seconds of TTFT; "" if it was not."""
        return self.job.why if self.job else ""

    def resolve(self, result: Result) -> None:
        """Called once, by the worker."""
        self._result = result
        self._done.set()


class Hints:
    """The way in for hints and signals of one tenant. Thread-safe; nothing here blocks."""

    def __init__(
        self, worker: Worker, settings: SpeculationSettings, tenant: str, owner: Callable[[str], Owner]
    ) -> None:
        self.worker, self.settings, self.tenant, self.owner = worker, settings, tenant, owner
        self._signals: Counter[str] = Counter()
        self._unread = 0
        self._named: OrderedDict[str, Context] = OrderedDict()
        self._lock = threading.Lock()

    def remember(self, name: str, context: Context) -> None:
        """Give `context` a name; the names used last are kept, `max_named` of them."""
        with self._lock:
            self._named[name] = context
            self._named.move_to_end(name)
            if len(self._named) > self.settings.max_named:
                self._named.popitem(last=False)

    def recall(self, name: str) -> Context:
        """The context of that name. Raises InvalidRequest."""
        with self._lock:
            if name not in self._named:
                raise InvalidRequest(f"no context is known by the name {name!r}")
            self._named.move_to_end(name)
            return self._named[name]

    def prefetch(
        self,
        context: Context,
        session: str,
        probability: float,
        expected_in_s: float,
        hold_s: float | None,
        *,
        kind: str = "",
        to_host: bool = False,
        report: Callable[[Prefetch], None] | None = None,
    ) -> Prefetch:
        """See `Local.prefetch`.

        With a `kind`, a signal of that kind asks for it; `to_host`: the node's arena is enough. `report` is called
        on the worker's thread when there is an outcome, and when there is a use. Raises PermissionDenied for a context
        in a namespace that this tenant may not fill.
        """
        owner = self.owner(context.namespace)
        hold = self.settings.hold_s if hold_s is None else hold_s
        if not 0 <= probability <= 1:
            raise InvalidRequest(f"a probability is from 0 to 1, not {probability}")
        if not (0 <= hold < float("inf") and 0 <= expected_in_s < float("inf")):
            raise InvalidRequest("hold_s and expected_in_s are finite seconds, 0 or more")
        handle = Prefetch(self._cancel)

        def resolved(result: Result) -> None:
            handle.resolve(result)
            if report is not None:
                report(handle)

        def start() -> None:
            because = _SIGNAL + self._word(kind) if kind else "hint"
            whose = qualified(self.tenant, session)
            job = self._job(context, owner, whose, probability, expected_in_s, hold, because, resolved)
            handle.job, job.to_host, job.ticket.outlives_pool = job, to_host, to_host
            if report is not None:
                job.ticket.settled = lambda ticket: report(handle)
            self._queue(job)

        self.worker.post(start)
        return handle

    def observed(self, kind: str, session: str, about: str) -> None:
        """A signal that names no contexts to preload, for the predictor alone."""

        def read() -> None:
            now = self.worker.clock()
            if session and kind == "session_ended":
                self._end_session(qualified(self.tenant, session))
            elif session:
                known = self._known(kind)
                self.worker.foresight.signalled(qualified(self.tenant, session), self.tenant, known, about, now)

        with suppress(Closed):
            self.worker.post(read)

    def signal(self, kind: str, session: str, contexts: Sequence[Context], at: float | None) -> None:
        """See `Local.signal`."""
        spec, session = self.settings, qualified(self.tenant, session)
        wanted = [(context, self.owner(context.namespace)) for context in contexts]
        with self._lock:
            if self._unread >= spec.max_pending:
                self._signals["dropped"] += 1
                return
            if at is not None and time.time() - at > spec.hold_s:
                self._signals["stale"] += 1
                return
            self._unread += 1

        def read() -> None:
            known = self._count(kind)
            if session and kind == "session_ended":
                self._end_session(session)
            elif session:
                about = next((context.name for context in contexts if context.name), "")
                now = self.worker.clock()
                self.worker.foresight.signalled(session, self.tenant, known, about, now)
            for context, owner in wanted:
                self._issue(context, owner, session, spec.signal_probability, spec.hold_s, because=_SIGNAL + known)

        self.worker.post(read)

    def signal_counts(self) -> dict[str, int]:
        """Signals read by kind, "stale" and "dropped" ones; kinds beyond the first 64 together as "other"."""
        with self._lock:
            return dict(self._signals)

    def foresee(self, request: LiveRequest) -> None:
        """A turn has ended: candidates for what comes next, which the planner weighs.

        What was said so far is what the session's next request starts with, unless it turns to another context.
        """
        cut_off = request.stream.finish_reason is FinishReason.CANCELLED
        if request.context is None or cut_off or not self.settings.enabled:
            return
        session, hold_s = request.session, self.settings.hold_s
        context = request.context.with_answer(request.stream.text)
        self._foresee(context, session, 1.0, hold_s, NEXT_TURN)
        self._withdraw(
            lambda job: job.ticket.because == PREDICTED and job.ticket.session == session, "newer predictions"
        )
        now = self.worker.clock()
        for context, said in self.worker.foresight.library.next(session, self.tenant, now):
            self._foresee(context, session, said.probability, hold_s, PREDICTED)

    # -- on the worker's thread ------------------------------------------------------------------------
    def _foresee(self, context: Context, session: str, probability: float, hold_s: float, because: str) -> None:
        with suppress(PermissionDenied):  # the tenant has left the group meanwhile
            self._issue(context, self.owner(context.namespace), session, probability, hold_s, because)

    def _issue(
        self, context: Context, owner: Owner, session: str, probability: float, hold_s: float, because: str
    ) -> None:
        """Open a ticket for what may come at any moment, and queue its job."""
        self._queue(self._job(context, owner, session, probability, 0.0, hold_s, because, lambda result: None))

    def _job(
        self,
        context: Context,
        owner: Owner,
        session: str,
        probability: float,
        expected_in_s: float,
        hold_s: float,
        because: str,
        resolved: Callable[[Result], None],
    ) -> Job:
        worker, now = self.worker, self.worker.clock()
        ticket = worker.ledger.issue(
            now,
            tenant=self.tenant,
            session=session,
            probability=probability,
            expected_in_s=expected_in_s,
            hold_s=hold_s,
            because=because,
        )
        return Job(
            ticket,
            context,
            resolved,
            owner,
            named=context.name,
            is_next_turn=because == NEXT_TURN,
            is_signalled=because.startswith(_SIGNAL),
        )

    def _queue(self, job: Job) -> None:
        self.worker.preloads.add(job, self.worker.clock())

    def _count(self, kind: str) -> str:
        """Note a signal that was read."""
        with self._lock:
            self._unread -= 1
        return self._known(kind)

    def _known(self, kind: str) -> str:
        """Count a signal; returns its kind, as `_word` has it."""
        known = self._word(kind)
        with self._lock:
            self._signals[known] += 1
        return known

    def _word(self, kind: str) -> str:
        """The kind, or "other" where there are too many to tell apart."""
        with self._lock:
            return kind if kind in self._signals or len(self._signals) < _KINDS else "other"

    def _end_session(self, session: str) -> None:
        worker, now = self.worker, self.worker.clock()
        self._withdraw(lambda job: job.ticket.session == session, "the session ended")
        worker.ledger.end_session(session)
        worker.foresight.session_ended(session, now)

    def _withdraw(self, which: Callable[[Job], bool], reason: str) -> None:
        self.worker.preloads.withdraw(which, reason, self.worker.clock())

    def _cancel(self, handle: Prefetch) -> None:
        def cancel() -> None:
            if handle.job is not None:
                result = Result(Outcome.CANCELLED, 0, "withdrawn by the caller")
                self.worker.preloads.end(handle.job, result, self.worker.clock())

        try:
            self.worker.post(cancel)
        except Closed:
            return  # closing gave it its outcome
