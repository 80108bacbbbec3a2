"""`kvprefetch.local`: a worker in this process, with the same calls as a connection to a service."""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvprefetch.cache.shares import OPERATOR
from kvprefetch.contexts import PUBLIC, Context, Message, Sampling, qualified
from kvprefetch.engines.engine import TransformersEngine, open_engine
from kvprefetch.engines.load import LoadedModel
from kvprefetch.errors import InvalidRequest
from kvprefetch.settings import Settings, load_settings
from kvprefetch.tiers.device import pool_bytes
from kvprefetch.worker.core import Core
from kvprefetch.worker.hints import Hints, Prefetch
from kvprefetch.worker.link import Link
from kvprefetch.worker.request import Generation

if TYPE_CHECKING:
    from kvprefetch.worker.compact import Compaction
    from kvprefetch.worker.resize import Resized


class Local:
    """One model, one pool, one worker thread, in this process. Thread-safe; close it, or use it in `with`.

    It speaks for one tenant, the settings' by default; `as_tenant` gives the same worker for another.
    """

    def __init__(self, engine: TransformersEngine, settings: Settings, link: Link | None = None) -> None:
        self._bind(Core(engine, settings, link), settings.tenant)
        self._is_operator = True

    def _bind(self, core: Core, tenant: str) -> None:
        self.core, self.tenant, self._is_operator = core, tenant, False
        self.engine, self.settings, self.worker = core.engine, core.settings, core.worker

    def as_tenant(self, name: str) -> "Local":
        """The same worker, for another tenant: closing either closes both. Raises InvalidRequest for no name."""
        if name == OPERATOR:
            raise InvalidRequest("a tenant has a name")
        view = object.__new__(Local)
        view._bind(self.core, name)
        return view

    @property
    def _hints(self) -> Hints:
        return self.core.hints(self.tenant)

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
        namespace: str = "",
    ) -> Context:
        """Describe a context; with a `name` it is remembered, and the name alone finds it again.

        The names used last are kept, as many as the settings say. `namespace`: who shares its blocks, see `Context`.
        Raises InvalidRequest.
        """
        if model not in ("", self.engine.loaded.name):
            raise InvalidRequest(f"this worker serves {self.engine.loaded.name!r}, not {model!r}")
        if adapter:
            raise InvalidRequest(f"this worker serves no adapters, {adapter!r} among them")
        messages, token_ids = tuple(messages), tuple(token_ids)
        if name and not messages and not token_ids:
            return self._hints.recall(name)
        context = Context(messages, tuple(tools), dict(chat_template_kwargs or {}), token_ids, name, namespace)
        if name:
            self._hints.remember(name, context)
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
        `hold_s` (default: the settings'). It expires if not done `hold_s` after it was expected. A context of the
        public namespace is the operator's, as whoever opened the worker is; others get PermissionDenied, as do those
        who are not in its group.
        """
        if context.namespace == PUBLIC and self._is_operator:
            return self.core.hints(OPERATOR).prefetch(context, "", probability, expected_in_s, hold_s)
        return self._hints.prefetch(context, session, probability, expected_in_s, hold_s)

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
        self._hints.signal(kind, session, contexts, at)

    # -- answers ---------------------------------------------------------------------------------------
    def generate(
        self,
        messages: Iterable[Message] = (),
        *,
        tools: Iterable[Mapping[str, Any]] = (),
        chat_template_kwargs: Mapping[str, Any] | None = None,
        token_ids: Iterable[int] = (),
        session: str = "",
        namespace: str = "",
        **sampling: Any,
    ) -> Generation:
        """Answer; iterate over the result for text as it comes. `sampling`: the fields of `Sampling`.

        With a `session`, the next turn's prefix is made warm from the moment the answer ends. With the `namespace`
        "group:NAME" the tenants of that group share its blocks. Raises InvalidRequest, PermissionDenied,
        PoolTooSmall, Closed.
        """
        arrived = time.monotonic()
        with self.worker.announce():
            context = self.context(
                messages,
                tools=tools,
                chat_template_kwargs=chat_template_kwargs,
                token_ids=token_ids,
                namespace=namespace,
            )
            prompt = self.worker.renderer.prompt(context)
            request = self.core.request(prompt, Sampling(**sampling), arrived, self.tenant, namespace)
            request.session = qualified(self.tenant, session)
            request.context = context if session and context.messages else None
            self.core.submit(request, session)
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

    def compact(self, *, order: bool = False) -> "Compaction":
        """Move live pages to the low end of the pool, with `order` each sequence's into one run.

        Waits for it; live requests wait meanwhile. Pages that a request holds stay where they are.
        """
        from kvprefetch.worker.compact import compact  # brings Triton

        return self.worker.call(lambda: compact(self.engine, self.worker.pool, order=order))

    def resize(self, size: str) -> "Resized":
        """Give the pool another size ("2GiB"), up to the one it was opened with; memory is really given back.

        To shrink, blocks are evicted as for a live request, and the others packed. Waits for it; live requests
        wait meanwhile. Raises SettingsError, and PoolFull where requests hold too many pages.
        """
        from kvprefetch.worker.resize import resize  # brings Triton

        pages = pool_bytes(size, self.engine.pool.device) // self.engine.shape.bytes
        return self.worker.call(lambda: resize(self.engine, self.worker.pool, pages, self.worker.clock()))

    def close(self) -> None:
        """End all requests and prefetches and the worker's thread. Calling it again does nothing."""
        self.core.close()

    def __enter__(self) -> "Local":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # -- within ----------------------------------------------------------------------------------------
    def _stats(self) -> dict[str, Any]:
        pool = self.worker.pool
        self.worker.ledger.expire_holds(self.worker.clock())
        self.worker.foresight.occupied(self.worker.clock())
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
            "signals": self._hints.signal_counts(),
            "eviction": {
                "by": "lru" if self.worker.foresight.guard.prefers_lru(self.tenant) else "index",
                "fallbacks": self.worker.foresight.guard.fallbacks,
            },
            "evidence": self.worker.foresight.stats(self.worker.clock()),
            "speculation": self.worker.foresight.meters.stats(),
            "node": self.core.link.stats() if self.core.link else None,
        }


def local(model: str | LoadedModel, *, settings: Settings | None = None, settings_file: str | None = None) -> Local:
    """Load `model` (a folder, a GGUF file or a hub id) and start a worker for it in this process.

    Raises UnknownModel, UnsupportedModel, SettingsError, PoolTooSmall.
    """
    chosen = settings or load_settings(settings_file)
    return Local(open_engine(model, chosen), chosen)
