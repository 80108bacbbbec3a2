"""SGLang: warmed as any other server, with what it says of itself and its load. Written from its documentation.

A completion of token ids is warmed by its ids. Everything else goes through the request's own endpoint: its `/tokenize`
knows no chat template. `cached_tokens` are in its answers with --enable-cache-report alone. Its newer versions call
`/get_load` `/v1/loads` and `/get_server_info` `/server_info`.
"""

from typing import Any

from kvprefetch.gateway.contract import Dialect, Draft, Json, Link, Rendered, Traits
from kvprefetch.gateway.engines.answers import decoded, decoded_list
from kvprefetch.gateway.engines.text import TextRenderer
from kvprefetch.gateway.engines.tokens import RenderedIds
from kvprefetch.gateway.wire.completions import prompt
from kvprefetch.settings import UpstreamSettings


class SGLang:
    """One SGLang server."""

    def __init__(self, link: Link, traits: Traits) -> None:
        self.traits = traits
        self._link = link
        self._text = TextRenderer()

    async def render(self, draft: Draft) -> Rendered:
        """By its ids, if it has come as ids; by its text."""
        said = prompt(draft.body) if draft.dialect is Dialect.COMPLETIONS else ""
        if isinstance(said, list):
            return RenderedIds(tuple(said), str(draft.body.get("model", "")), draft.salt)
        return self._text.render(draft)

    async def load(self) -> int | None:
        """Running and waiting, of all its data-parallel ranks."""
        status, body = await self._link.get("/v1/loads")
        ranks = decoded(body).get("loads") if status == 200 else None
        if isinstance(ranks, list):
            return sum(_count(rank, "num_running_reqs") + _count(rank, "num_waiting_reqs") for rank in ranks)
        status, body = await self._link.get("/get_load")
        return sum(_count(rank, "num_reqs") for rank in decoded_list(body)) if status == 200 else None

    def cached(self, rendered: Rendered, salt: str) -> int | None:
        """It does not say."""
        return None

    def learn(self, rendered: Rendered, end: int, prompt_tokens: int) -> None:
        """Estimates become better by it."""
        self._text.learn(rendered, end, prompt_tokens)

    async def close(self) -> None:
        """Nothing is held."""


async def server_info(link: Link) -> Json:
    """What it says of itself; nothing where it is no SGLang."""
    for path in ("/server_info", "/get_server_info"):
        status, body = await link.get(path)
        said = decoded(body) if status == 200 else {}
        if "disable_radix_cache" in said:
            return said
    return {}


def sglang_traits(info: Json, settings: UpstreamSettings) -> Traits:
    """Capacity 0: its prefix cache is off, and nothing can be warmed."""
    capacity = 0 if info.get("disable_radix_cache") else _count(info, "max_total_num_tokens") or None
    return Traits("sglang", max(1, _count(info, "page_size")), settings.capacity_tokens or capacity)


def _count(said: Any, name: str) -> int:
    value = said.get(name) if isinstance(said, dict) else None
    return value if isinstance(value, int) else 0
