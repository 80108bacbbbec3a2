"""Our own `kvprefetch worker`: told with `max_tokens: 0` what to have warm, it works at it in its idle time."""

from dataclasses import dataclass, field

from kvprefetch.errors import InvalidRequest, UpstreamError
from kvprefetch.gateway.contract import Dialect, Draft, Link, Rendered, Traits, WarmRequest
from kvprefetch.gateway.engines.answers import encode, samples
from kvprefetch.gateway.engines.probes import followed
from kvprefetch.gateway.engines.text import TextRenderer
from kvprefetch.settings import UpstreamSettings

_LIVE = "kvprefetch_live_requests"


@dataclass(frozen=True)
class RenderedWhole:
    """A draft in one piece: the worker slices it."""

    draft: Draft = field(repr=False)
    tokens: int
    is_exact: bool = False
    token_ids: tuple[int, ...] = ()

    def request(self, end: int) -> WarmRequest:
        """All of it, whatever `end` is."""
        body, dialect = self.draft.body, self.draft.dialect
        if dialect is Dialect.CHAT and not self.draft.exact:
            body = followed(dialect, body)
        return WarmRequest(dialect.value, encode({**body, "max_tokens": 0}), self.tokens)


class Worker:
    """One `kvprefetch worker`."""

    def __init__(self, link: Link, settings: UpstreamSettings) -> None:
        self.traits = Traits("kvprefetch", capacity_tokens=settings.capacity_tokens or None, warms_itself=True)
        self._link = link
        self._text = TextRenderer()

    async def render(self, draft: Draft) -> Rendered:
        """Of chat and completions alone; it knows no other dialect."""
        if draft.dialect not in (Dialect.CHAT, Dialect.COMPLETIONS):
            raise InvalidRequest(f"a kvprefetch worker has no {draft.dialect.value}")
        if not draft.is_text:
            raise InvalidRequest("a kvprefetch worker takes text alone")
        return RenderedWhole(draft, self._text.render(draft).tokens)

    async def load(self) -> int | None:
        """Requests that it is answering; those with `max_tokens: 0`, ours among them, count too."""
        status, text = await self._link.get("/metrics")
        if status != 200:
            raise UpstreamError(f"{self._link.url}/metrics answers with status {status}")
        counted = samples(text, _LIVE)
        return int(counted[0].value) if counted else None

    def cached(self, rendered: Rendered, salt: str) -> int | None:
        """It answers a request for what it has at once, and says so."""
        return None

    def learn(self, rendered: Rendered, end: int, prompt_tokens: int) -> None:
        """Estimates become better by it."""
        self._text.learn(rendered, end, prompt_tokens)

    async def close(self) -> None:
        """Nothing is held."""
