"""The `Hints` service: what applications say, checked, counted, and given to workers.

Promises
- Every call is for the caller's own tenant. Names and hints of another tenant are unknown.
- `Signal` and `Prefetch` return their first answer at once; nothing waits for a worker but the events that it tells.
- A hint lives on when its stream is closed.
- A group's contexts are for its tenants, public ones for operators alone (PermissionDenied).
- Contexts are not rendered here: their JSON is looked at no further than its first byte, and never logged.
"""

import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from kvprefetch.cache.shares import OPERATOR
from kvprefetch.client.words import outcome_word, use_word
from kvprefetch.contexts import PUBLIC, group_of
from kvprefetch.errors import InvalidRequest, LimitExceeded, PermissionDenied, ServiceUnavailable
from kvprefetch.service.auth import Role, caller
from kvprefetch.service.calls import Context as Call
from kvprefetch.service.hint import Hint, TenantBook
from kvprefetch.service.hints import HintBook
from kvprefetch.service.limits import Bucket, Names
from kvprefetch.service.public import PublicContexts, Standing
from kvprefetch.settings import ServiceSettings, Settings
from kvprefetch.v1 import hints_pb2 as pb
from kvprefetch.v1 import hints_pb2_grpc
from kvprefetch.v1.workers_pb2 import Observed, Preload, ServiceMessage

SESSION_ENDED = "session_ended"
_KINDS = 64  # of signals, counted apart; callers choose the words, so there must be an end
PUBLIC_HOLD_S = 86_400.0
"""How long workers that come are given a public context, where its operator does not say."""
_WORD_BYTES = 256  # of a kind, a session, a name
_ATTRIBUTES_BYTES = 64 * 2**10


@dataclass
class Allowance:
    """What is kept for one tenant."""

    signals: Bucket
    names: Names
    kinds: Counter[str] = field(default_factory=Counter)  # signals read, by kind; those beyond the first 64: "other"
    stale: int = 0
    refused: int = 0

    @classmethod
    def of(cls, settings: ServiceSettings) -> "Allowance":
        """A fresh one."""
        return cls(Bucket(settings.signals_per_s), Names(settings.max_contexts, settings.max_context_bytes))


class HintsService(hints_pb2_grpc.HintsServicer):
    """See the module's promises. `clock`: monotonic seconds; `wall`: seconds since the epoch."""

    def __init__(
        self,
        book: HintBook,
        settings: Settings,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.book, self.settings, self.clock, self.wall = book, settings, clock, wall
        self.allowances: dict[str, Allowance] = {}
        self.public = PublicContexts(book, settings.service.max_contexts, settings.service.max_context_bytes)

    async def Signal(self, request: pb.SignalRequest, context: Call) -> pb.SignalReply:
        """See the proto."""
        tenant, now = caller().tenant, self.clock()
        allowance = self._allowance(tenant)
        if not allowance.signals.take(now):
            allowance.refused += 1
            raise LimitExceeded(f"more than {allowance.signals.rate:g} signals/s (service.signals_per_s)")
        _check_signal(request)
        age_s = self.wall() - request.at if request.at else 0.0
        if age_s > self.settings.speculation.hold_s:
            allowance.stale += 1
            return pb.SignalReply()
        contexts = [self._whole(tenant, each, now) for each in request.contexts]
        for each in contexts:
            self._check_group(tenant, each.namespace)
        self.book.make_room(tenant, len(contexts), sum(each.ByteSize() for each in contexts))
        for each in contexts:
            self.book.resolve_model(each.model)
        for each in contexts:
            self._remember(tenant, each, now)
        known = request.kind in allowance.kinds or len(allowance.kinds) < _KINDS
        allowance.kinds[request.kind if known else "other"] += 1
        if request.kind == SESSION_ENDED:
            self._end_session(tenant, request.session, now)
        else:
            about = next((each.name for each in contexts if each.name), "")
            self._observe(tenant, request.session, request.kind, set(), about)
        for each in contexts:
            self._preload_for(request, each, tenant, now)
        return pb.SignalReply()

    async def Prefetch(self, request: pb.PrefetchRequest, context: Call) -> AsyncIterator[pb.PrefetchEvent]:
        """See the proto."""
        hint = self._find(request.follow) if request.follow else self._issue(request)
        yield _event(hint)
        await hint.resolved.wait()
        self._refuse_if_closed()
        yield _event(hint, with_outcome=True)
        if hint.outcome is not None and hint.outcome.is_resident:
            await hint.ended.wait()
            self._refuse_if_closed()
            yield _event(hint, with_outcome=True, with_use=True)

    async def Cancel(self, request: pb.CancelRequest, context: Call) -> pb.CancelReply:
        """See the proto."""
        hint, reason, now = self._find(request.hint), "withdrawn by the caller", self.clock()
        if isinstance(hint, Standing):
            self.public.cancel(hint, reason, now)
        else:
            self.book.cancel(hint, reason, now)
        return pb.CancelReply()

    def stats(self, tenant: str | None = None) -> dict[str, Any]:
        """Counts by tenant: of all, or of one."""
        names = {*self.book.tenants, *self.allowances} if tenant is None else {tenant}
        return {name: self._stats_of(name) for name in sorted(names)}

    # -- within ----------------------------------------------------------------------------------------
    def _allowance(self, tenant: str) -> Allowance:
        if tenant not in self.allowances:
            self.allowances[tenant] = Allowance.of(self.settings.service)
        return self.allowances[tenant]

    def _find(self, number: int) -> Hint:
        """A hint of the caller's. Raises UnknownContext."""
        standing = self.public.find(number) if Role.OPERATOR in caller().roles else None
        return standing or self.book.find(caller().tenant, number)

    def _issue(self, request: pb.PrefetchRequest) -> Hint:
        """The hint that is asked for."""
        now = self.clock()
        _check_numbers(request)
        if request.context.namespace == PUBLIC:
            return self._issue_public(request, now)
        tenant = caller().tenant
        content = self._whole(tenant, request.context, now)
        self._check_group(tenant, content.namespace)
        self.book.make_room(tenant, 1, content.ByteSize())
        self.book.resolve_model(content.model)
        self._remember(tenant, content, now)
        preload = Preload(
            session=_word(request.session, "session"),
            context=content,
            probability=request.probability,
            expected_in_s=request.expected_in_s,
        )
        return self.book.issue(tenant, preload, now, request.hold_s if request.HasField("hold_s") else None)

    def _issue_public(self, request: pb.PrefetchRequest, now: float) -> Hint:
        """A context for every worker. Its name is one among the operator's."""
        if Role.OPERATOR not in caller().roles:
            raise PermissionDenied(f"{caller().name!r} is no operator: only an operator fills the public namespace")
        content = self._whole(OPERATOR, request.context, now)
        preload = Preload(context=content, probability=request.probability, expected_in_s=request.expected_in_s)
        hold_s = request.hold_s if request.HasField("hold_s") else PUBLIC_HOLD_S
        standing = self.public.issue(preload, now, hold_s)
        self._remember(OPERATOR, content, now)
        return standing

    def _check_group(self, tenant: str, namespace: str) -> None:
        """Raises PermissionDenied unless the tenant may fill it, InvalidRequest for no namespace."""
        group = group_of(namespace)
        if namespace == PUBLIC:
            raise PermissionDenied("the public namespace is filled by an operator's prefetch alone")
        if group and not any(each.name == group and tenant in each.tenants for each in self.settings.groups):
            raise PermissionDenied(f"{tenant!r} is in no group of the name {group!r}")

    def _whole(self, tenant: str, context: pb.Context, now: float) -> pb.Context:
        """A copy of the context, its content recalled where only its name is given.

        A part of a request would keep all of it in memory.
        """
        _word(context.name, "name")
        whole = pb.Context()
        if context.name and not context.messages and not context.token_ids:
            whole.CopyFrom(self._allowance(tenant).names.recall(context.name, now))
            whole.model = context.model or whole.model
            whole.namespace = context.namespace or whole.namespace
        else:
            _check_content(context)
            whole.CopyFrom(context)
        return whole

    def _remember(self, tenant: str, context: pb.Context, now: float) -> None:
        """Keep what has a name. Raises LimitExceeded."""
        if context.name:
            self._allowance(tenant).names.remember(context.name, context, now)

    def _preload_for(self, request: pb.SignalRequest, context: pb.Context, tenant: str, now: float) -> None:
        """A context that a signal names."""
        probability = self.settings.speculation.signal_probability
        preload = Preload(session=request.session, context=context, probability=probability, kind=request.kind)
        self.book.issue(tenant, preload, now)

    def _end_session(self, tenant: str, session: str, now: float) -> None:
        """Whoever has to do with the session is told, and what waits for it is withdrawn."""
        if not session:
            return
        hints = self.book.of_session(tenant, session)
        self._observe(tenant, session, SESSION_ENDED, {hint.worker for hint in hints if hint.worker})
        for hint in hints:
            self.book.cancel(hint, "the session ended", now)
        self.book.workers.session_ended(tenant, session)

    def _observe(self, tenant: str, session: str, kind: str, also: set[bytes], about: str = "") -> None:
        """Tell the session's likely workers, one of each model, for their predictors."""
        if not session:
            return
        workers = self.book.workers
        likely = {workers.expected_at(tenant, session, model) for model in workers.models()}
        message = ServiceMessage(observed=Observed(tenant=tenant, session=session, kind=kind, about=about))
        for worker in also | {worker for worker in likely if worker}:
            workers.send(worker, message)

    def _refuse_if_closed(self) -> None:
        if self.book.is_closed:
            raise ServiceUnavailable("the service is draining; ask again when it has restarted")

    def _stats_of(self, tenant: str) -> dict[str, Any]:
        book = self.book.tenants.get(tenant, TenantBook())
        allowance = self.allowances.get(tenant) or Allowance.of(self.settings.service)
        return {
            "hints": book.stats(),
            "signals": {"kinds": dict(allowance.kinds), "stale": allowance.stale, "refused": allowance.refused},
            "contexts": {"named": len(allowance.names), "bytes": allowance.names.bytes},
        }


def _event(hint: Hint, *, with_outcome: bool = False, with_use: bool = False) -> pb.PrefetchEvent:
    event = pb.PrefetchEvent(hint=hint.number, worker=hint.worker_name)
    if with_outcome:
        event.outcome, event.tokens = outcome_word(hint.outcome), hint.tokens
        event.reason, event.because = hint.reason, hint.because
    if with_use:
        event.use, event.tokens = use_word(hint.use), hint.used_tokens
    return event


def _word(text: str, what: str) -> str:
    if len(text.encode()) > _WORD_BYTES:
        raise InvalidRequest(f"a {what} has at most {_WORD_BYTES} bytes")
    return text


def _check_numbers(request: pb.PrefetchRequest) -> None:
    if not 0 <= request.probability <= 1:
        raise InvalidRequest(f"a probability is from 0 to 1, not {request.probability}")
    if not all(0 <= seconds < math.inf for seconds in (request.hold_s, request.expected_in_s)):
        raise InvalidRequest("hold_s and expected_in_s are finite seconds, 0 or more")


def _check_signal(request: pb.SignalRequest) -> None:
    _word(request.kind, "signal's kind")
    _word(request.session, "session")
    if not request.kind:
        raise InvalidRequest("a signal has a kind, a word of your own such as 'document_opened'")
    if len(request.attributes) > _ATTRIBUTES_BYTES:
        raise InvalidRequest(f"a signal's attributes have at most {_ATTRIBUTES_BYTES} bytes")
    if not math.isfinite(request.at):
        raise InvalidRequest("at is seconds since the epoch")


def _check_content(context: pb.Context) -> None:
    if context.adapter:
        raise InvalidRequest("no worker serves adapters")
    if bool(context.messages) == bool(context.token_ids):
        raise InvalidRequest("a context has either messages or token_ids, or else the name of one given before")
    for what, text, sign in (
        ("messages are a JSON list", context.messages, b"["),
        ("tools are a JSON list", context.tools, b"["),
        ("chat_template_kwargs are a JSON object", context.chat_template_kwargs, b"{"),
    ):
        if text and text[:64].lstrip()[:1] != sign:
            raise InvalidRequest(f"a context's {what}")
