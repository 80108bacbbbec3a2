"""What stories about engines need: an engine found behind a link, and drafts warmed in it as the gateway warms them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import msgspec
from real_engines import RealEngine

from kvprefetch.gateway.contract import Dialect, Draft, Engine, Json, Rendered
from kvprefetch.gateway.engines.discover import discover
from kvprefetch.gateway.link import UpstreamLink, open_links
from kvprefetch.settings import GatewaySettings, UpstreamSettings

CACHED = {  # where each dialect says it
    Dialect.CHAT: ("prompt_tokens_details", "cached_tokens"),
    Dialect.COMPLETIONS: ("prompt_tokens_details", "cached_tokens"),
    Dialect.RESPONSES: ("input_tokens_details", "cached_tokens"),
    Dialect.MESSAGES: ("cache_read_input_tokens",),
}


@dataclass(frozen=True)
class Found:
    """An engine, the link to it, and what it serves."""

    engine: Engine
    link: UpstreamLink
    model: str

    async def ask(self, dialect: Dialect, body: Json, *, path: str = "") -> Json:
        """The answer to a request, which must be taken."""
        status, said = await self.link.post(path or dialect.value, msgspec.json.encode({"model": self.model, **body}))
        assert status == 200, said
        return msgspec.json.decode(said)

    def draft(self, dialect: Dialect, *, exact: bool = False, salt: str = "", **body: Any) -> Draft:
        """What comes, for this engine's model."""
        return Draft(dialect, {"model": self.model, **body}, (b"",), exact=exact, salt=salt)

    async def until_idle(self) -> None:
        """Engines count a request for a moment longer than its client waits for it."""
        while await self.engine.load():
            await asyncio.sleep(0.01)

    async def warm(self, rendered: Rendered, piece: int = 64) -> list[tuple[int, int]]:
        """Piece by piece, each ending at a multiple of `piece`: for each its end, and what was found of it."""
        found, end = [], 0
        while end < rendered.tokens:
            request = rendered.request(min(end - end % piece + piece, rendered.tokens))
            assert request.end > end
            status, said = await self.link.post(request.path, request.body)
            assert status == 200, said
            end = request.end
            found.append((end, cached_tokens(Dialect(request.path), msgspec.json.decode(said))))
        return found


@asynccontextmanager
async def found(real: RealEngine, **settings: Any) -> AsyncIterator[Found]:
    """The engine as the gateway finds it."""
    upstream = UpstreamSettings(real.url, **settings)
    async with open_links(GatewaySettings(upstreams=(upstream,))) as (link,):
        engine = await discover(link, upstream)
        yield Found(engine, link, real.model)
        await engine.close()


def cached_tokens(dialect: Dialect, answer: Json) -> int:
    """What its usage says was found in the engine's cache."""
    value: Any = answer["usage"]
    for name in CACHED[dialect]:
        value = value[name]
    return int(value)
