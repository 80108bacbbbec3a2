"""The listener: against a publisher that comes and goes, and against vLLM's own where KVPREFETCH_TEST_VLLM names it."""

import asyncio
import json
import random
from collections.abc import Callable

import httpx
import pytest
import zmq
import zmq.asyncio
from real_engines import free_port, needs_vllm, tiny_folder, vllm
from test_residency import PROMPT, Engine

from kvprefetch.errors import SettingsError
from kvprefetch.gateway.kv_events import Listener
from kvprefetch.gateway.residency import Residency

PATIENCE_S = 30.0


class Publisher:
    """Publishes what an engine says, on a port that it keeps when it is started again."""

    def __init__(self, engine: Engine, port: int = 0) -> None:
        self.engine, self.context = engine, zmq.asyncio.Context()
        self.socket = self.context.socket(zmq.PUB)
        self.socket.bind(f"tcp://127.0.0.1:{port or '*'}")
        self.port = int(self.socket.getsockopt_string(zmq.LAST_ENDPOINT).rsplit(":", 1)[1])

    @property
    def address(self) -> str:
        return f"tcp://127.0.0.1:{self.port}"

    async def says(self, *events) -> None:
        await self.socket.send_multipart(self.engine.message(*events))

    async def until(self, holds: Callable[[], bool]) -> None:
        """Send empty messages until it holds."""
        async with asyncio.timeout(PATIENCE_S):
            while not holds():
                await self.says()
                await asyncio.sleep(0.02)

    def close(self) -> None:
        self.context.destroy(linger=0)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not holds():
            await asyncio.sleep(0.02)


class Listening:
    """A listener's task, for as long as the block lasts."""

    def __init__(self, address: str) -> None:
        self.listener = Listener(address)

    async def __aenter__(self) -> Residency:
        self.task = asyncio.create_task(self.listener.listen())
        return self.listener.residency

    async def __aexit__(self, *exception: object) -> None:
        assert not self.task.done()
        self.task.cancel()
        await asyncio.wait([self.task])
        assert self.task.cancelled()


@pytest.mark.parametrize(
    "address", ["", "localhost:5557", "tcp://*:5557", "http://host:1", "tcp://host", "tcp://a:1,b"]
)
def test_an_address_that_is_none_is_told_of_at_once(address):
    with pytest.raises(SettingsError, match="kv_events"):
        Listener(address)


def test_what_the_engine_says_arrives():
    async def story() -> None:
        publisher = Publisher(Engine())
        async with Listening(publisher.address) as residency:
            await publisher.until(lambda: residency.cached(PROMPT) is not None)
            await publisher.says(publisher.engine.stored(PROMPT, salt="a"))
            await until(lambda: residency.cached(PROMPT, "a") == 16)
        publisher.close()

    asyncio.run(story())


def test_all_is_forgotten_when_the_engine_goes_and_heard_again_when_it_comes_back():
    async def story() -> None:
        publisher = Publisher(Engine())
        async with Listening(publisher.address) as residency:
            await publisher.until(lambda: residency.cached(PROMPT) is not None)
            await publisher.says(publisher.engine.stored(PROMPT))
            await until(lambda: residency.cached(PROMPT) == 16)
            publisher.close()
            await until(lambda: residency.cached(PROMPT) is None)
            again = Publisher(publisher.engine, publisher.port)
            await again.until(lambda: residency.cached(PROMPT) == 0)
            await again.says(again.engine.stored(PROMPT))
            await until(lambda: residency.cached(PROMPT) == 16)
            again.close()

    asyncio.run(story())


def test_two_ranks_are_heard_by_one_listener():
    async def story() -> None:
        first, second = Publisher(Engine(0)), Publisher(Engine(1))
        async with Listening(f"{first.address}, {second.address}") as residency:
            for publisher, length in ((first, 18), (second, 8)):
                rank = publisher.engine.rank
                await publisher.until(lambda rank=rank: residency.cached(PROMPT, rank=rank) is not None)
                await publisher.says(publisher.engine.stored(PROMPT[:length]))
            await until(lambda: residency.cached(PROMPT) == 8)
        first.close()
        second.close()

    asyncio.run(story())


def test_garbage_and_a_flood_leave_the_event_loop_to_others():
    async def story() -> None:
        publisher = Publisher(Engine())
        async with Listening(publisher.address) as residency:
            await publisher.until(lambda: residency.cached(PROMPT) is not None)
            for number in range(3_000):
                await publisher.socket.send_multipart([b"kv", b"?" * (number % 12), b"\xc1" * 100])
            await publisher.until(lambda: residency.cached(PROMPT) is not None)
            await publisher.says(publisher.engine.stored(PROMPT))
            await until(lambda: residency.cached(PROMPT) == 16)
        publisher.close()

    asyncio.run(story())


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """A vLLM with 64 blocks of 32 tokens that tells what it caches: its URL, and the address at which it tells."""
    port = free_port()
    config = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": f"tcp://*:{port}", "topic": "kv"}
    flags = ["--kv-events-config", json.dumps(config), "--num-gpu-blocks-override", "65", "--max-model-len", "1024"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_SERVER_DEV_MODE", "1")  # for /reset_prefix_cache
        with vllm(tiny_folder(tmp_path_factory.mktemp("tiny")), *flags) as engine:
            yield engine, f"tcp://127.0.0.1:{port}"


def prompt(number: int, length: int = 500) -> list[int]:
    return random.Random(number).choices(range(8, 480), k=length)


@needs_vllm
def test_what_vllm_says_is_what_it_then_finds(spoken):
    engine, address = spoken

    async def story() -> None:
        async with Listening(address) as residency, httpx.AsyncClient(base_url=engine.url, timeout=60) as client:

            async def found(ids: list[int], **extra: object) -> int:
                body = {"model": engine.model, "prompt": ids, "max_tokens": 1, **extra}
                answer = await client.post("/v1/completions", json=body)
                return answer.raise_for_status().json()["usage"]["prompt_tokens_details"]["cached_tokens"]

            ids, other = prompt(1), [*prompt(1)[:200], *prompt(2)]
            async with asyncio.timeout(PATIENCE_S):
                while residency.cached(ids) is None:  # until it is connected, each makes the engine say something
                    await found(prompt(random.getrandbits(32), 40))
            await found(ids)
            await until(lambda: residency.cached(ids) == 480)
            assert residency.cached(other) == 192
            assert await found(other) == 192
            assert await found(ids) == 480

            assert residency.cached(ids, "of a tenant") == 0
            await found(ids, cache_salt="of a tenant")
            await until(lambda: residency.cached(ids, "of a tenant") == 480)
            assert await found(ids, cache_salt="of a tenant") == 480

            for number in range(10, 14):  # more than the cache holds: the oldest go
                await found(prompt(number, 900))
            await until(lambda: residency.cached(prompt(13, 900)) == 896)
            kept = [residency.cached(each) for each in (ids, other, prompt(12, 900), prompt(13, 900))]
            assert kept[0] < 480
            assert len(residency) <= 64
            for each, expected in zip((prompt(13, 900), prompt(12, 900)), reversed(kept), strict=False):
                assert await found(each) == expected

            await client.post("/reset_prefix_cache")
            await found(prompt(20))  # the next step tells of it
            await until(lambda: residency.cached(prompt(20)) == 480)
            assert len(residency) == 15
            assert residency.is_complete
            assert await found(prompt(13, 900)) == 0

    asyncio.run(story())


@needs_vllm
def test_a_full_report_tells_what_was_missed(spoken):
    engine, address = spoken

    async def story() -> None:
        async with httpx.AsyncClient(base_url=engine.url, timeout=60) as client:
            body = {"model": engine.model, "prompt": prompt(30), "max_tokens": 1}
            await client.post("/v1/completions", json=body)
            async with Listening(address) as residency:
                body["vllm_xargs"] = {"kv_cache_report_mode": "full"}
                async with asyncio.timeout(PATIENCE_S):
                    while residency.cached(prompt(30)) is None:
                        await client.post("/v1/completions", json=body)
                await until(lambda: residency.cached(prompt(30)) == 480)
                assert not residency.is_complete

    asyncio.run(story())
