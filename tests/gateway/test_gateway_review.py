"""The gateway, in this process, before engines that a test scripts: what must not slip through between the parts."""

import asyncio
import hashlib
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from proxied import proxied
from raw_upstream import PATIENCE_S, Peer, Request, chunked, upstream

from kvprefetch.gateway.app import Gateway, make_gateway
from kvprefetch.gateway.contract import Dialect
from kvprefetch.gateway.engines.answers import decoded, samples
from kvprefetch.gateway.engines.discover import discover
from kvprefetch.gateway.link import open_links
from kvprefetch.gateway.placement import Kept, choose
from kvprefetch.gateway.run import again_and_again
from kvprefetch.gateway.site import kept_headers
from kvprefetch.settings import Credential, GatewaySettings, Settings, UpstreamSettings

CHAT = Dialect.CHAT.value
ASKED = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
TENANT = Credential("a", token_sha256=hashlib.sha256(b"token").hexdigest())
BEARER = {"authorization": "Bearer token"}


def whole(body: bytes, status: bytes = b"200 OK") -> bytes:
    return b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (status, len(body), body)


@dataclass
class Scripted:
    """An engine that says what it is by its models; each answer of it has its name."""

    name: str = "one"
    owner: str = "vllm"
    models: tuple[str, ...] = ("m",)
    seen: list[Request] = field(default_factory=list)
    broken: int = 0  # looks that are answered with 503

    def script(self, peer: Peer) -> None:
        while (request := peer.request()) is not None:
            peer.send(self.answer(request))

    def answer(self, request: Request) -> bytes:
        path = request.line.split(b" ")[1]
        if path == b"/v1/models":
            self.broken -= 1
            said = [{"id": model, "owned_by": self.owner} for model in self.models]
            return whole(json.dumps({"data": said}).encode()) if self.broken < 0 else whole(b"", b"503 Loading")
        if path in (b"/metrics", b"/load", b"/tokenize") or b'_tokens":1,' in request.body:
            return whole(b"{}", b"404 Not Found")
        self.seen.append(request)
        made = {"id": f"resp_{self.name}", "object": "response", "status": "completed", "output": []}
        return whole(json.dumps(made).encode())


Story = Callable[[Gateway, httpx.AsyncClient], Awaitable[None]]


@asynccontextmanager
async def standing(*urls: str, tenants: tuple[Credential, ...] = (), **own: Any) -> AsyncIterator[Gateway]:
    settings = GatewaySettings(upstreams=tuple(map(UpstreamSettings, urls)), **own)
    async with open_links(settings) as links:
        gateway = make_gateway(Settings(gateway=settings, credentials=tenants), links)
        warming = asyncio.create_task(gateway.run())
        try:
            yield gateway
        finally:
            warming.cancel()
            await asyncio.gather(warming, return_exceptions=True)


def told(story: Story, *urls: str, **settings: Any) -> None:
    """The story, with a client of the gateway before these engines."""

    async def tell() -> None:
        async with standing(*urls, **settings) as gateway:
            transport = httpx.ASGITransport(gateway.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
                await asyncio.wait_for(story(gateway, client), PATIENCE_S)

    asyncio.run(tell())


async def known(gateway: Gateway) -> None:
    for each in gateway.site.upstreams:
        await each.known.wait()
        assert each.engine is not None


# -- where a request goes --------------------------------------------------------------------------------------------
def test_what_an_engine_keeps_is_asked_of_that_engine() -> None:
    one, two = Scripted("one"), Scripted("two")

    async def story(gateway: Gateway, client: httpx.AsyncClient) -> None:
        await known(gateway)
        first, second = gateway.site.upstreams
        first.warmer.live += 1  # so that the second is less loaded
        made = await client.post("/v1/responses", json={"model": "m", "input": "hello"})
        assert made.json()["id"] == "resp_two"
        await asyncio.sleep(0.05)  # it is learnt off the way of others
        first.warmer.live -= 1
        second.warmer.live += 1
        await client.post("/v1/responses", json={"model": "m", "input": "more", "previous_response_id": "resp_two"})
        await client.get("/v1/responses/resp_two")
        await client.post("/v1/responses/resp_two/cancel")
        await client.get("/v1/responses/another")
        assert len(two.seen) == 4
        assert [request.line for request in one.seen] == [b"GET /v1/responses/another HTTP/1.1"]

    with upstream(one.script) as first, upstream(two.script) as second:
        told(story, first.url, second.url)


def test_a_conversation_is_where_it_was_made() -> None:
    one, two = Scripted("one"), Scripted("two")

    async def story(gateway: Gateway, client: httpx.AsyncClient) -> None:
        await known(gateway)
        first, second = gateway.site.upstreams
        first.warmer.live += 1
        assert (await client.post("/v1/conversations", json={})).json()["id"] == "resp_two"
        second.warmer.live += 2
        await client.get("/v1/conversations/resp_two/items")
        await client.post("/v1/responses", json={"model": "m", "input": "more", "conversation": {"id": "resp_two"}})
        assert (len(one.seen), len(two.seen)) == (0, 3)

    with upstream(one.script) as first, upstream(two.script) as second:
        told(story, first.url, second.url)


def test_what_is_kept_is_known_by_tenant_and_forgotten_in_the_end() -> None:
    kept = Kept(most=2)
    kept.put("a", "r", "one")
    kept.put("b", "r", "two")
    assert (kept.find("a", "r"), kept.find("b", "r"), kept.find("c", "r"), kept.find("a", "")) == ("one", "two", "", "")
    kept.find("a", "r")
    kept.put("a", "s", "one")
    assert (kept.find("a", "r"), kept.find("b", "r")) == ("one", "")


def test_a_request_goes_to_an_engine_that_has_its_model() -> None:
    one, two = Scripted("one", models=("m",)), Scripted("two", models=("n", "adapter"))

    async def story(gateway: Gateway, client: httpx.AsyncClient) -> None:
        await known(gateway)
        for model in ("m", "n", "adapter", "n"):
            await client.post(CHAT, json={**ASKED, "model": model})
        assert (len(one.seen), len(two.seen)) == (1, 3)

    with upstream(one.script) as first, upstream(two.script) as second:
        told(story, first.url, second.url)


@dataclass(frozen=True)
class Place:
    name: str
    models: frozenset[str] = frozenset()
    is_up: bool = True
    live: int = 0


def test_a_model_that_no_engine_lists_is_asked_of_those_that_list_none() -> None:
    some, silent, gone = Place("a", frozenset("m")), Place("b", live=9), Place("c", frozenset("n"), is_up=False)
    assert choose([some, silent], "a", "n").name == "b"
    assert choose([some, gone], "a", "n").name == "c", "it is told that its engine is gone, not that there is no model"
    assert choose([some, gone], "", "x").name == "a"
    assert choose([some, silent], "a", "m").name == "a"
    assert choose([some, silent], "a").name == "a"


# -- tenants apart ---------------------------------------------------------------------------------------------------
def test_no_request_goes_unsalted_because_the_engine_was_looked_at_too_early() -> None:
    engine = Scripted(broken=2)

    async def story(gateway: Gateway, client: httpx.AsyncClient) -> None:
        answer = await client.post(CHAT, json=ASKED, headers=BEARER)
        assert answer.status_code == 200
        assert b'"cache_salt":"' in engine.seen[0].body
        gateway.site.upstreams[0].broke()
        engine.broken = 9
        assert (await client.post(CHAT, json=ASKED, headers=BEARER)).status_code == 200
        assert b'"cache_salt":"' in engine.seen[1].body, "what it is was forgotten"

    with upstream(engine.script) as listening:
        told(story, listening.url, tenants=(TENANT,))


@pytest.mark.parametrize("path", [CHAT, "/v1/messages"])
def test_where_an_engine_never_says_what_it_is_tenants_are_told(path: str) -> None:
    engine = Scripted(broken=10_000)

    async def story(gateway: Gateway, client: httpx.AsyncClient) -> None:
        for body in (ASKED, {**ASKED, "max_tokens": 0}):
            answer = await client.post(path, json=body, headers=BEARER)
            assert answer.status_code == 503
            assert "tenants apart" in answer.json()["error"]["message"]
            assert "tenants apart" in answer.headers["x-kvprefetch-reason"]
        assert (answer.json().get("type") == "error") is (path == "/v1/messages")
        assert engine.seen == []

    with upstream(engine.script) as listening:
        told(story, listening.url, tenants=(TENANT,), connect_s=0.2)


def test_a_look_is_not_waited_for_where_the_engine_is_there_meanwhile() -> None:
    engine = Scripted(broken=5)  # by its pauses alone it would be looked at for the sixth time after 15 s

    async def story(gateway: Gateway, client: httpx.AsyncClient) -> None:
        for _ in range(6):
            await client.post(CHAT, json=ASKED, headers=BEARER)
        assert b'"cache_salt":"' in engine.seen[0].body

    with upstream(engine.script) as listening:
        told(story, listening.url, tenants=(TENANT,), connect_s=1.0)


LOOSE = [
    b'{"model": "m", "temperature": NaN, "messages": []}',
    b'{"model": "m", "messages": [{"role": "user", "content": "\\ud800"}], "cache_salt": "\\udfff"}',
    b'\xef\xbb\xbf{"model": "m", "messages": [], "x": -Infinity}',
]
UNREADABLE = [
    b"{",
    b"[]",
    b"NaN",
    b'{"model": "\xff"}',
    b"{} {}",
    b'{"a": %b' % (b"[" * 50_000),
    '{"a": 1}'.encode("utf-16"),
]


@pytest.mark.parametrize("path", [each.value for each in Dialect])
def test_a_body_that_strict_json_is_not_has_its_salt_all_the_same(path: str) -> None:
    engine = Scripted()

    async def story(gateway: Gateway, client: httpx.AsyncClient) -> None:
        for body in LOOSE:
            assert (await client.post(path, content=body, headers=BEARER)).status_code == 200
        for sent, came in zip(LOOSE, engine.seen, strict=True):
            assert came.body.startswith(sent[:-1])
            salt = json.loads(came.body)["cache_salt"]
            assert len(salt) == 32
            assert salt.isalnum()
        for body in UNREADABLE:
            answer = await client.post(path, content=body, headers=BEARER)
            assert answer.status_code == 400, body
            assert "JSON" in answer.json()["error"]["message"]
        assert len(engine.seen) == len(LOOSE)

    with upstream(engine.script) as listening:
        told(story, listening.url, tenants=(TENANT,))


def test_where_no_engine_takes_salts_it_is_the_one_to_complain() -> None:
    engine = Scripted(owner="somebody")

    async def story(gateway: Gateway, client: httpx.AsyncClient) -> None:
        await known(gateway)
        for body in (*LOOSE, *UNREADABLE):
            await client.post(CHAT, content=body, headers=BEARER)
        assert [request.body for request in engine.seen] == [*LOOSE, *UNREADABLE]

    with upstream(engine.script) as listening:
        told(story, listening.url, tenants=(TENANT,))


# -- engines that say odd things -------------------------------------------------------------------------------------
def test_nothing_that_an_engine_says_raises() -> None:
    for deep in (b"[" * 100_000, b'{"a":' * 100_000):
        assert decoded(deep) == {}
    assert samples(b"x_a 1e308\nx_a -1e308\n", "x_a") == []
    lines = b'x_a{b="c"} NaN\nx_a +Inf\nx_a 3\nx_a{b= 5\n'
    assert samples(lines, "x_a") == []
    assert [each.value for each in samples(b'x_a{b="c"} NaN\nx_a +Inf\nx_a 3\n', "x_a")] == [3]


@pytest.mark.parametrize("size", ["\u00b2", "9" * 5_000, "-1", ""])
def test_odd_sizes_are_none(size: str) -> None:
    engine = Scripted()

    def script(peer: Peer) -> None:
        while (request := peer.request()) is not None:
            figures = f'vllm:cache_config_info{{block_size="{size}",num_gpu_blocks="{size}"}} 1.0\n'
            peer.send(whole(figures.encode()) if b" /metrics " in request.line else engine.answer(request))

    async def look(url: str) -> None:
        settings = GatewaySettings(upstreams=(UpstreamSettings(url),))
        async with open_links(settings) as links:
            traits = (await discover(links[0], settings.upstreams[0])).traits
            assert (traits.kind, traits.block_tokens, traits.capacity_tokens) == ("vllm", 1, None)

    with upstream(script) as listening:
        asyncio.run(look(listening.url))


def test_a_look_that_breaks_is_logged_and_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine, looks = Scripted(), []

    async def breaking(*arguments: Any) -> Any:
        looks.append(1)
        if len(looks) == 1:
            raise ZeroDivisionError
        return await discover(*arguments)

    monkeypatch.setattr("kvprefetch.gateway.upstream.discover", breaking)

    async def story(gateway: Gateway, client: httpx.AsyncClient) -> None:
        await known(gateway)
        assert "ZeroDivisionError" in caplog.text

    with upstream(engine.script) as listening:
        told(story, listening.url)


def test_warming_that_breaks_is_logged_and_begins_again(caplog: pytest.LogCaptureFixture) -> None:
    began: list[int] = []

    async def work() -> None:
        began.append(1)
        if len(began) < 3:
            raise ZeroDivisionError

    asyncio.run(again_and_again(work, 0.0))
    assert len(began) == 3
    assert caplog.text.count("warming broke") == caplog.text.count("raise ZeroDivisionError") == 2


# -- what is passed through ------------------------------------------------------------------------------------------
def test_a_browser_may_ask_whether_it_may_ask() -> None:
    engine = Scripted()

    async def story(gateway: Gateway, client: httpx.AsyncClient) -> None:
        assert (await client.options(CHAT, headers={"origin": "http://a"})).status_code == 200
        assert engine.seen[0].line == b"OPTIONS %b HTTP/1.1" % CHAT.encode()
        assert (await client.get("/v1/else")).status_code == 401

    with upstream(engine.script) as listening:
        told(story, listening.url, tenants=(TENANT,))


def test_only_what_bears_a_prompt_and_has_come_whole_makes_warming_wait() -> None:
    arrived, go_on, engine = threading.Event(), threading.Event(), Scripted()

    def script(peer: Peer) -> None:
        while (request := peer.request(body=False)) is not None:
            if b" /v1/models " in request.line or b" /metrics " in request.line:
                peer.send(engine.answer(request))
                continue
            peer.body_of(request)
            arrived.set()
            go_on.wait(PATIENCE_S)
            peer.send(whole(b"{}"))

    async def story(gateway: Gateway, client: httpx.AsyncClient) -> None:
        await known(gateway)
        rest = asyncio.Event()

        def live() -> int:
            return gateway.site.upstreams[0].live

        async def slowly() -> AsyncIterator[bytes]:
            yield b"{"
            await rest.wait()
            yield b"}"

        asked = asyncio.create_task(client.get("/v1/something"))
        await asyncio.to_thread(arrived.wait, PATIENCE_S)
        assert live() == 0
        go_on.set()
        await asked
        arrived.clear()
        go_on.clear()
        posted = asyncio.create_task(client.post("/v1/embeddings", content=slowly()))
        await asyncio.sleep(0.1)
        assert live() == 0, "a client that never sends all of its request stops the warming of others"
        rest.set()
        await asyncio.to_thread(arrived.wait, PATIENCE_S)
        assert live() == 1
        go_on.set()
        await posted
        assert live() == 0

    with upstream(script) as listening:
        told(story, listening.url)


# -- headers and names -----------------------------------------------------------------------------------------------
def test_a_warm_up_has_the_headers_of_its_session_but_what_signs_one_request() -> None:
    of_one = ("Content-MD5", "Digest", "Content-Digest", "Signature", "Signature-Input", "X-Amz-Date", "Range")
    of_one += ("X-Amz-Content-Sha256", "If-None-Match", "If-Match", "If-Modified-Since", "If-Range")
    sent = [(name.encode(), b"x") for name in (*of_one, "Cookie", "X-Route")]
    assert kept_headers(sent) == (("Cookie", "x"), ("X-Route", "x"))


def test_headers_beyond_ascii_are_the_same_bytes_in_a_warm_up() -> None:
    engine = Scripted()

    async def warm(url: str) -> None:
        async with open_links(GatewaySettings(upstreams=(UpstreamSettings(url),))) as links:
            await links[0].post("/v1/x", b"{}", headers=kept_headers([(b"x-route", "é".encode())]))

    with upstream(engine.script) as listening:
        asyncio.run(warm(listening.url))
    assert engine.seen[0].all(b"x-route") == ["é".encode()]


def test_two_gateways_never_give_a_worker_the_same_name_of_a_session() -> None:
    engine = Scripted(owner="kvprefetch")

    async def story(gateway: Gateway, client: httpx.AsyncClient) -> None:
        await known(gateway)
        await client.post(CHAT, json=ASKED)

    with upstream(engine.script) as listening:
        told(story, listening.url)
        told(story, listening.url)
    names = [request.all(b"x-kvprefetch-session") for request in engine.seen]
    assert len(names) == 2
    assert names[0] != names[1]


def test_nobody_is_shown_an_engines_password() -> None:
    engine = Scripted()

    async def story(gateway: Gateway, client: httpx.AsyncClient) -> None:
        await known(gateway)
        for path in ("/health", "/metrics", "/kvprefetch/v1/stats"):
            shown = (await client.get(path)).text
            assert "127.0.0.1" in shown
            assert "hunter2" not in shown
        await client.post(CHAT, json=ASKED)
        assert engine.seen[0].all(b"authorization")[0].startswith(b"Basic ")

    with upstream(engine.script) as listening:
        told(story, listening.url.replace("://", "://somebody:hunter2@"))


# -- clients that do not read ----------------------------------------------------------------------------------------
def test_a_client_that_reads_nothing_is_left_in_the_end() -> None:
    left = threading.Event()

    def flood(peer: Peer) -> None:
        peer.request()
        peer.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        try:
            for _ in range(1_000):
                peer.send(chunked(b"x" * 2**16)[:-5])
        except OSError:
            left.set()
            raise

    with (
        upstream(flood) as listening,
        proxied(listening.url, connect_s=0.3, silence_s=0.3) as proxy,
        proxy.connect(receive_buffer=4096) as caller,
    ):
        caller.ask("GET", "/")
        assert left.wait(PATIENCE_S), "the engine's connection is held for a client that does not read"
        assert proxy.seen[0].error() == "client does not read"
