"""`kvprefetch.local`: a worker in this process, with the same calls as a connection to a service."""

import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from kvprefetch.cache.keys import Namespace, Scope, root_key
from kvprefetch.cache.sequence import Owner, PagedSequence
from kvprefetch.contexts import Context, Message, Sampling
from kvprefetch.engines.engine import TransformersEngine, open_engine
from kvprefetch.engines.load import LoadedModel
from kvprefetch.engines.sampling import Sampler
from kvprefetch.engines.text import TextStream
from kvprefetch.errors import Closed, InvalidRequest, PoolTooSmall
from kvprefetch.outcomes import Outcome, Result, Use
from kvprefetch.settings import Settings, load_settings
from kvprefetch.worker.loop import Worker
from kvprefetch.worker.request import FinishReason, Generation, LiveRequest, Timing
from kvprefetch.worker.speculation import Job


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
    def use(self) -> Use | None:
        """What it was good for; None while open."""
        return self.job.ticket.use if self.job else None

    @property
    def used_tokens(self) -> int:
        """Tokens that the request which used it found resident."""
        return self.job.ticket.used_tokens if self.job else 0

    def resolve(self, result: Result) -> None:
        """Called once, by the worker."""
        self._result = result
        self._done.set()


class Local:
    """One model, one pool, one worker thread, in this process. Thread-safe; close it, or use it in `with`."""

    def __init__(self, engine: TransformersEngine, settings: Settings) -> None:
        self.engine, self.settings = engine, settings
        secret = settings.secret.encode() or secrets.token_bytes(32)
        namespace = Namespace(Scope.PRIVATE, settings.tenant)
        self._owner = Owner(root_key(secret, namespace, engine.fingerprint), settings.tenant)
        self._named: dict[str, Context] = {}
        self._signals: Counter[str] = Counter()
        self._unread_signals = 0
        self.worker = Worker(engine, settings, time.monotonic, self._foresee_next_turn)

    # -- contexts, hints, signals ----------------------------------------------------------------------
    def context(
        self,
        messages: Iterable[Message] = (),
        *,
        tools: Iterable[Mapping[str, Any]] = (),
        chat_template_kwargs: Mapping[str, Any] | None = None,
        token_ids: Iterable[int] = (),
        name: str = "",
        model: str = "",
        adapter: str = "",
    ) -> Context:
        """Describe a context; with a `name` it is remembered, and the name alone finds it again."""
        if model not in ("", self.engine.loaded.name):
            raise InvalidRequest(f"this worker serves {self.engine.loaded.name!r}, not {model!r}")
        if adapter:
            raise InvalidRequest(f"this worker serves no adapters, {adapter!r} among them")
        messages, token_ids = tuple(messages), tuple(token_ids)
        if name and not messages and not token_ids:
            if name not in self._named:
                raise InvalidRequest(f"no context is known by the name {name!r}")
            return self._named[name]
        context = Context(messages, tuple(tools), dict(chat_template_kwargs or {}), token_ids, name)
        if name:
            self._named[name] = context
        return context

    def prefetch(
        self,
        context: Context,
        *,
        session: str = "",
        probability: float = 1.0,
        expected_in_s: float = 0.0,
        hold_s: float | None = None,
    ) -> Prefetch:
        """Ask for `context` to be warm. Returns at once. Raises Closed, and InvalidRequest for odd numbers.

        `probability` that it will be used, in about `expected_in_s` seconds; unused, it keeps its place for
        `hold_s` (default: the settings'). It expires if not done `hold_s` after it was expected.
        """
        hold = self.settings.speculation.hold_s if hold_s is None else hold_s
        if not 0 <= probability <= 1:
            raise InvalidRequest(f"a probability is from 0 to 1, not {probability}")
        if not (0 <= hold < float("inf") and 0 <= expected_in_s < float("inf")):
            raise InvalidRequest("hold_s and expected_in_s are finite seconds, 0 or more")
        handle = Prefetch(self._cancel)

        def start() -> None:
            handle.job = self._issue(
                context, session, probability, expected_in_s, hold, because="hint", resolved=handle.resolve
            )

        self.worker.post(start)
        return handle

    def signal(
        self,
        kind: str,
        *,
        session: str,
        contexts: Sequence[Context] = (),
        attributes: Mapping[str, Any] | None = None,
        at: float | None = None,
    ) -> None:
        """Say what was observed in a session, at `at` (seconds since the epoch; None: now). Never blocks.

        The contexts it names are preloaded with the settings' prior probability, unless the signal is older
        than the hold time. "session_ended" withdraws the session's preloads. `attributes` inform no decision
        yet. When too many signals are unread, this one is dropped and counted. Raises Closed.
        """
        spec = self.settings.speculation
        if self._unread_signals >= spec.max_pending:
            self._signals["dropped"] += 1
            return
        if at is not None and time.time() - at > spec.hold_s:
            self._signals["stale"] += 1
            return
        self._unread_signals += 1

        def read() -> None:
            self._unread_signals -= 1
            self._signals[kind] += 1
            if kind == "session_ended":
                self._end_session(session)
            for context in contexts:
                self._issue(context, session, spec.signal_probability, 0.0, spec.hold_s, because=kind)

        self.worker.post(read)

    # -- answers ---------------------------------------------------------------------------------------
    def generate(
        self,
        messages: Iterable[Message] = (),
        *,
        tools: Iterable[Mapping[str, Any]] = (),
        chat_template_kwargs: Mapping[str, Any] | None = None,
        token_ids: Iterable[int] = (),
        session: str = "",
        **sampling: Any,
    ) -> Generation:
        """Answer; iterate over the result for text as it comes. `sampling`: the fields of `Sampling`.

        With a `session`, the next turn's prefix is made warm from the moment the answer ends. Raises
        InvalidRequest, PoolTooSmall, Closed.
        """
        arrived = time.monotonic()
        with self.worker.announce():
            context = self.context(
                messages, tools=tools, chat_template_kwargs=chat_template_kwargs, token_ids=token_ids
            )
            prompt = self.worker.renderer.prompt(context)
            request = self._request(prompt, Sampling(**sampling), arrived)
            request.session = session
            request.context = context if session and context.messages else None
            self.worker.submit(request)
        return request.stream

    def stats(self) -> dict[str, Any]:
        """Counts since the start, of the pool, prefetches, look-ups and signals; waits for at most one step."""
        return self.worker.call(self._stats)

    def check(self) -> None:
        """Prove that every page is accounted for (law 5), or raise AccountingError."""
        self.worker.call(self.worker.pool.check)

    def clear(self) -> None:
        """Forget every block that no request is using."""
        self.worker.call(self.worker.pool.clear)

    def close(self) -> None:
        """End all requests and prefetches and the worker's thread. Calling it again does nothing."""
        self.worker.close()

    def __enter__(self) -> "Local":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # -- within ----------------------------------------------------------------------------------------
    def _request(self, prompt: list[int], sampling: Sampling, arrived: float) -> LiveRequest:
        engine = self.engine
        engine.validate(prompt)
        room = engine.max_tokens - len(prompt) if engine.max_tokens is not None else sampling.max_tokens
        max_new = min(sampling.max_tokens, room)
        pages = -(-(len(prompt) + max_new - 1) // engine.block_tokens)
        if pages > engine.pool.pages:
            raise PoolTooSmall(
                f"{len(prompt)} prompt tokens and up to {max_new} new ones need {pages} pages of "
                f"{engine.block_tokens} tokens; the pool has {engine.pool.pages}"
            )
        sequence = PagedSequence(self.worker.pool, self._owner, prompt, engine.block_tokens)
        request = LiveRequest(
            prompt=prompt,
            sampling=sampling,
            sequence=sequence,
            stream=Generation(lambda: setattr(request, "cancelled", True)),
            sampler=Sampler(sampling),
            text=TextStream(engine.loaded.tokenizer, sampling.stop),
            eos=engine.eos_tokens,
            max_new=max_new,
            timing=Timing(arrived),
            tenant=self._owner.tenant,
        )
        request.stream.prompt_tokens = len(prompt)
        return request

    def _issue(
        self,
        context: Context,
        session: str,
        probability: float,
        expected_in_s: float,
        hold_s: float,
        because: str,
        resolved: Callable[[Result], None] = lambda result: None,
    ) -> Job:
        """Open a ticket and queue its job; on the worker's thread."""
        worker, now = self.worker, self.worker.clock()
        ticket = worker.ledger.issue(
            now,
            tenant=self._owner.tenant,
            session=session,
            probability=probability,
            expected_in_s=expected_in_s,
            hold_s=hold_s,
            because=because,
        )
        job = Job(ticket, context, self._owner, resolved, is_next_turn=because == "turn_finished")
        worker.speculator.add(job, now)
        if not self.settings.speculation.enabled:
            worker.speculator.end(job, Result(Outcome.REJECTED, 0, "speculation is switched off"), now)
        return job

    def _foresee_next_turn(self, request: LiveRequest) -> None:
        """The pause rule: what was said so far is what the session's next request starts with."""
        if request.context is None or request.stream.finish_reason is FinishReason.CANCELLED:
            return
        if self.settings.speculation.enabled:
            context = request.context.with_answer(request.stream.text)
            hold = self.settings.speculation.hold_s
            self._issue(context, request.session, 1.0, 0.0, hold, because="turn_finished")

    def _cancel(self, handle: Prefetch) -> None:
        def cancel() -> None:
            if handle.job is not None:
                result = Result(Outcome.CANCELLED, 0, "withdrawn by the caller")
                self.worker.speculator.end(handle.job, result, self.worker.clock())

        try:
            self.worker.post(cancel)
        except Closed:
            return  # closing gave it its outcome

    def _end_session(self, session: str) -> None:
        worker, now = self.worker, self.worker.clock()
        for job in [j for j in worker.speculator.jobs if j.ticket.session == session]:
            worker.speculator.end(job, Result(Outcome.CANCELLED, 0, "the session ended"), now)
        worker.ledger.end_session(session)

    def _stats(self) -> dict[str, Any]:
        pool = self.worker.pool
        return {
            "model": self.engine.loaded.name,
            "device": str(self.engine.pool.device),
            "backend": self.engine.backend_name,
            "pool": {
                "pages": pool.pages,
                "block_tokens": self.engine.block_tokens,
                "page_bytes": self.engine.shape.bytes,
                "free": pool.free_pages,
                "resident": len(pool.resident),
                "in_flight": len(pool.in_flight),
                "quarantined": len(pool.quarantined),
                "evictions": pool.evictions,
                "charges": {tenant: dict(kinds) for tenant, kinds in pool.charges().items()},
            },
            "prefetch": self.worker.ledger.stats(),
            "lookups": self.worker.ledger.lookup_stats(),
            "signals": dict(self._signals),
        }


def local(model: str | LoadedModel, *, settings: Settings | None = None, settings_file: str | None = None) -> Local:
    """Load `model` (a folder, a GGUF file or a hub id) and start a worker for it in this process.

    Raises UnknownModel, UnsupportedModel, SettingsError, PoolTooSmall.
    """
    chosen = settings or load_settings(settings_file)
    return Local(open_engine(model, chosen), chosen)
