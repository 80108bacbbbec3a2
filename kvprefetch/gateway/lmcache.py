"""LMCache: has a prompt's KV brought from its slow tiers into host memory, from where the engine loads it in a moment.

For its multiprocess server with an HTTP port (`lmcache server`, 0.5): `POST /cache/prefetches` takes the token ids of
a prompt and answers at once; `GET /cache/prefetches/ID` tells when it is done, once. What it loads stays in host memory
until it is evicted there, and is not yet in the engine: a request for the same tokens brings it in.

Which models it caches, under which names and for how many ranks, is read from its `/status`: an engine's name for a
model need not be the one that its clients use. Only whole chunks are cached (256 tokens, if nothing else is set).

Promises: `prefetch` raises nothing of its own: it is a help alone, and the reason is told where there was none. It
waits for `patience_s` at most, and stops waiting when cancelled; what LMCache has begun it goes on with.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvprefetch.errors import UpstreamError
from kvprefetch.gateway.contract import Json, Link
from kvprefetch.gateway.engines.answers import decoded, encode

_MOST_TOKENS = 1_000_000  # it takes no more at once
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.01, 0.5
_CONTEXTS = ("cache_context_meta", "non_cuda_context_meta")  # in /status: engines with a GPU, and others
_OF_SALTS = "/@"  # which it refuses in them


@dataclass(frozen=True)
class Prefetched:
    """`tokens` that are in host memory now, by whole chunks; None: not known, for the `reason`."""

    tokens: int | None
    reason: str = ""


@dataclass(frozen=True)
class _Place:
    """Under what an engine's blocks are kept."""

    model_name: str
    world_size: int


async def prefetch(
    link: Link, token_ids: Sequence[int], salt: str = "", *, model: str = "", patience_s: float = 10.0
) -> Prefetched:
    """Bring what is cached of these tokens into host memory. `link` leads to LMCache's HTTP server.

    `model`: which one, where it caches several. Of what was not found whole, the leading tokens need not be there.
    """
    if any(each in salt for each in _OF_SALTS):
        return Prefetched(None, "LMCache takes no such salt")
    try:
        async with asyncio.timeout(patience_s):
            return await _prefetch(link, list(token_ids[:_MOST_TOKENS]), salt, model)
    except TimeoutError:
        return Prefetched(None, f"LMCache was not done after {patience_s:g} s")
    except UpstreamError as error:
        return Prefetched(None, str(error))


async def _prefetch(link: Link, token_ids: list[int], salt: str, model: str) -> Prefetched:
    said = await _ask(link, "/status")
    chunk, place = _count(said, "chunk_size"), _place(said, model)
    if place is None:
        return Prefetched(None, "LMCache serves no engine with this model")
    body = {"model_name": place.model_name, "world_size": place.world_size, "token_ids": token_ids, "cache_salt": salt}
    submitted = await _ask(link, "/cache/prefetches", body)
    chunks, job = _count(submitted, "chunks"), submitted.get("request_id")
    if submitted.get("status") == "noop":
        return Prefetched(0, "shorter than a chunk")
    if not isinstance(job, str) or not job.isalnum():
        raise UpstreamError("LMCache names no prefetch")
    wait_s = _FIRST_WAIT_S
    while (done := await _ask(link, f"/cache/prefetches/{job}")).get("status") == "pending":
        await asyncio.sleep(wait_s)
        wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
    # A key for each chunk, rank and group of layers.
    found, keys = _count(done, "found_keys"), _count(done, "total_keys")
    return Prefetched(chunks * found // keys * chunk if keys else 0)


async def _ask(link: Link, path: str, body: Json | None = None) -> Json:
    """The answer. Raises UpstreamError."""
    status, raw = await (link.get(path) if body is None else link.post(path, encode(body)))
    if status not in (200, 202):
        raise UpstreamError(f"LMCache answers {path.rsplit('/', 1)[0] or path} with status {status}")
    return decoded(raw)


def _place(status: Json, model: str) -> _Place | None:
    """The only one there is, or the one that `model` is called by."""
    engines = [each for name in _CONTEXTS for each in _values(status.get(name))]
    places = {_Place(str(each["model_name"]), _count(each, "world_size")) for each in engines if "model_name" in each}
    named = {place for place in places if model in (place.model_name, place.model_name.rsplit("/", 1)[-1])}
    chosen = named if len(places) > 1 else places
    return chosen.pop() if len(chosen) == 1 else None


def _values(said: Any) -> list[Json]:
    return [each for each in said.values() if isinstance(each, dict)] if isinstance(said, dict) else []


def _count(said: Any, name: str) -> int:
    value = said.get(name) if isinstance(said, dict) else None
    return value if isinstance(value, int) else 0
