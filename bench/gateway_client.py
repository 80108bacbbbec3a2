"""A client of an engine or of the gateway before it: streams answers and sees when each token came; gives hints.

It is plain httpx in the bench's own process, and the same for an engine alone and through the gateway.
"""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import httpx
from gateway_engine import MODEL

Json = dict[str, Any]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_PATIENCE_S = 600.0


@dataclass(frozen=True)
class Asked:
    """One answer."""

    ttft_s: float
    token_s: float  # between one token and the next, on the average; 0 for fewer than two
    text: str
    prompt_tokens: int
    cached: int  # tokens of the prompt that the engine found ready


@dataclass
class _Stream:
    """What came of an answer so far."""

    times: list[float] = field(default_factory=list)
    text: str = ""
    usage: Json = field(default_factory=dict)

    def take(self, chunk: Json) -> None:
        """The next event."""
        for choice in chunk.get("choices", ()):
            said = choice.get("text") or choice.get("delta", {}).get("content") or ""
            if said or choice.get("finish_reason"):
                self.times.append(time.perf_counter())
            self.text += said
        self.usage = chunk.get("usage") or self.usage


class Client:
    """One server's; use it in `async with`."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._http = httpx.AsyncClient(base_url=url, timeout=_PATIENCE_S, trust_env=False)

    async def chat(self, messages: list[Json], max_tokens: int = 8) -> Asked:
        """Ask for the next message."""
        return await self._ask(CHAT, {"messages": messages, "max_tokens": max_tokens})

    async def complete(self, prompt: Sequence[int], max_tokens: int = 4, first: asyncio.Event | None = None) -> Asked:
        """Ask for what follows these tokens. `first` is set when the first token comes."""
        return await self._ask(COMPLETIONS, {"prompt": list(prompt), "max_tokens": max_tokens}, first)

    async def prefetch(self, context: Json, session: str, wait_s: float = 0.0) -> Json:
        """Give the gateway a hint; what it says of it."""
        body = {"context": {"model": MODEL, **context}, "session": session, "wait_s": wait_s}
        answer = await self._http.post("/kvprefetch/v1/prefetch", json=body)
        return _checked(answer)

    async def look(self, hint: str) -> Json:
        """What became of it."""
        return _checked(await self._http.get(f"/kvprefetch/v1/prefetch/{hint}"))

    async def cancel(self, hint: str) -> None:
        """Withdraw it."""
        _checked(await self._http.delete(f"/kvprefetch/v1/prefetch/{hint}"))

    async def stats(self) -> Json:
        """The gateway's figures of its one engine."""
        found: Json = _checked(await self._http.get("/kvprefetch/v1/stats"))["upstreams"][0]
        return found

    async def settle(self, quiet_s: float = 0.4) -> None:
        """Of an engine: wait until it has served nothing for a while."""
        quiet_since = time.monotonic()
        while time.monotonic() - quiet_since < quiet_s:
            if _checked(await self._http.get("/load"))["server_load"]:
                quiet_since = time.monotonic()
            await asyncio.sleep(0.05)

    async def _ask(self, path: str, body: Json, first: asyncio.Event | None = None) -> Asked:
        more = {"model": MODEL, "temperature": 0, "ignore_eos": True}
        asked = {**body, **more, "stream": True, "stream_options": {"include_usage": True}}
        found, began = _Stream(), time.perf_counter()
        async with self._http.stream("POST", path, json=asked) as answer:
            if answer.status_code != 200:
                raise RuntimeError(f"{self.url}{path}: {answer.status_code} {(await answer.aread())[:500]!r}")
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    found.take(json.loads(line[6:]))
                if first is not None and found.times:
                    first.set()
        if not found.times or not found.usage:
            raise RuntimeError(f"{self.url}{path}: an answer without tokens or usage")
        details = found.usage.get("prompt_tokens_details") or {}
        between = max(int(found.usage["completion_tokens"]) - 1, 1)
        return Asked(
            found.times[0] - began,
            (found.times[-1] - found.times[0]) / between,
            found.text,
            int(found.usage["prompt_tokens"]),
            int(details.get("cached_tokens") or 0),
        )

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()


def _checked(answer: httpx.Response) -> Json:
    if answer.status_code not in (200, 202):
        raise RuntimeError(f"{answer.url}: {answer.status_code} {answer.text[:500]}")
    found: Json = answer.json()
    return found
