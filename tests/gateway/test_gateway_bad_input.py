"""The gateway among engines and clients that misbehave: clear, bounded, and what is in order goes on."""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psutil
import pytest
from gateways import Gateway, Json, gateway
from processes import until, written
from proxied import Caller
from raw_upstream import Peer, Request, upstream

from kvprefetch.gateway.app import make_gateway
from kvprefetch.gateway.contract import Dialect
from kvprefetch.gateway.link import open_links
from kvprefetch.gateway.wire import read_request
from kvprefetch.settings import GatewaySettings, Settings, SpeculationSettings, UpstreamSettings

PATIENT, LARGEST = 1.5, 3 * 2**20
SETTINGS = f"[gateway]\nmax_body_bytes = {LARGEST}\nconnect_s = 1.0\nsilence_s = {PATIENT}\n"
CHAT = "/v1/chat/completions"
ASKED = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
ANSWER = msgspec.json.encode(
    {
        "id": "1",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "Yes."}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 9, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 0}},
    }
)
Act = Callable[[Peer, Request], None]


def whole(body: bytes, status: bytes = b"200 OK", kind: bytes = b"application/json", more: bytes = b"") -> bytes:
    head = b"HTTP/1.1 %b\r\ncontent-type: %b\r\n%bcontent-length: %d\r\n\r\n" % (status, kind, more, len(body))
    return head + body


def says(answer: bytes) -> Act:
    return lambda peer, request: peer.send(answer)


@dataclass
class Engine:
    """It does with live requests and with warm-ups what a test tells it; it says nothing of itself."""

    live: Act
    warm: Act
    seen: list[Request] = field(default_factory=list)  # live ones
    warmed: list[Request] = field(default_factory=list)

    def script(self, peer: Peer) -> None:
        while (request := peer.request()) is not None:
            if not request.line.startswith(b"POST"):
                peer.send(whole(b"{}", b"404 Not Found"))
            elif b'_tokens":1,' in request.body:
                self.warmed.append(request)
                self.warm(peer, request)
            else:
                self.seen.append(request)
                self.live(peer, request)


IN_ORDER = says(whole(ANSWER))


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, Gateway]]:
    engine = Engine(IN_ORDER, IN_ORDER)
    with upstream(engine.script) as listening, standing(listening.url, tmp_path_factory.mktemp("gateway")) as site:
        yield engine, site


@contextmanager
def standing(url: str, folder: Path) -> Iterator[Gateway]:
    with gateway(url, settings=str(written(folder / "gateway.toml", SETTINGS))) as site:
        until(lambda: site.metric("upstream_up") == 1 and site.engine() == "openai", "the engine is not found")
        yield site


@pytest.fixture
def engine(stage: tuple[Engine, Gateway]) -> Engine:
    engine, _ = stage
    engine.live, engine.warm, engine.seen, engine.warmed = IN_ORDER, IN_ORDER, [], []
    return engine


@pytest.fixture
def site(stage: tuple[Engine, Gateway], engine: Engine) -> Iterator[Gateway]:
    """At its end all is in order again."""
    until(lambda: stage[1].metric("upstream_up") == 1, "the engine is not found again")
    yield stage[1]
    engine.live = IN_ORDER
    until(lambda: stage[1].metric("upstream_live") == 0, "a request is never over")
    until(lambda: stage[1].metric("upstream_up") == 1, "the engine is not found again")
    assert stage[1].http.post(CHAT, json=ASKED).content == ANSWER


# -- engines ---------------------------------------------------------------------------------------------------------
def silent(peer: Peer, request: Request) -> None:
    peer.is_left()


def in_two(peer: Peer, request: Request) -> None:
    """It restarts in the midst of a stream."""
    peer.send(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
    peer.send(b'10\r\ndata: {"a":1}\n\n\n\r\n')
    peer.sock.close()


@pytest.mark.parametrize(
    ("act", "status", "words"),
    [
        (silent, 504, "silent"),
        (lambda peer, request: peer.reset(), 502, "upstream"),
        (says(b"\x00\x16garbage and no HTTP\r\n\r\n"), 502, "does not answer in HTTP"),
        (says(b"HTTP/1.1 200 OK\r\ncontent-le"), 504, "silent"),
        (says(b"HTTP/1.1 999999 Odd\r\n\r\n"), 502, "does not answer in HTTP"),
    ],
    ids=["slow", "reset", "garbage", "half a head", "an odd status"],
)
@pytest.mark.parametrize("path", [CHAT, "/v1/messages"])
def test_an_engine_that_misbehaves_is_answered_for(
    site: Gateway, engine: Engine, path: str, act: Act, status: int, words: str
) -> None:
    engine.live = act
    answer = site.http.post(path, json=ASKED)
    assert (answer.status_code, words in answer.json()["error"]["message"]) == (status, True), answer.text
    assert words in answer.headers["x-kvprefetch-reason"]


def test_a_stream_that_breaks_off_never_looks_complete(site: Gateway, engine: Engine) -> None:
    engine.live = in_two
    with site.http.stream("POST", CHAT, json=ASKED) as stream:
        pieces = stream.iter_raw()
        assert next(pieces) == b'data: {"a":1}\n\n\n'
        with pytest.raises(httpx.RemoteProtocolError):
            next(pieces)


@pytest.mark.parametrize("status", [b"400 Bad", b"401 No", b"404 None", b"429 Later", b"500 Broken", b"503 Busy"])
@pytest.mark.parametrize("body", [b"<html>\xff\x00</html>", b'{"error": {"message": "no"}}  \n', b"x" * 70_000])
def test_the_engines_errors_are_passed_on_byte_for_byte(
    site: Gateway, engine: Engine, status: bytes, body: bytes
) -> None:
    engine.live = says(whole(body, status, b"text/odd", b"retry-after: 7\r\nx-odd: a\r\nx-odd: b\r\n"))
    answer = site.http.post(CHAT, json=ASKED)
    assert (answer.status_code, answer.content) == (int(status[:3]), body)
    assert (answer.headers["retry-after"], answer.headers.get_list("x-odd")) == ("7", ["a", "b"])
    assert answer.headers["content-type"] == "text/odd"


ODD_ANSWERS = [
    *(b"", b"null", b"5", b"[]", b"{", b'"\xff"', b"[" * 50_000, b'{"choices": 5}', b'{"choices": [5]}'),
    b'{"choices": [{"message": 5, "finish_reason": 7}], "usage": "all"}',
    b'{"choices": [{"message": {"content": [[["a"]]], "tool_calls": [5, {"function": 5}]}}]}',
    b'{"choices": [], "usage": {"prompt_tokens": -5, "prompt_tokens_details": {"cached_tokens": 1e30}}}',
    b'{"choices": [], "usage": {"prompt_tokens": 3, "prompt_tokens_details": {"cached_tokens": 10000000000}}}',
    b'{"choices": [{"message": {"content": "\\ud800"}, "finish_reason": "\\ud800"}]}',
    b'{"id": {"a": 1}, "content": [5, {"type": []}], "output": [5], "status": [], "stop_reason": {}}',
]


@pytest.mark.parametrize("kind", [b"application/json", b"text/event-stream", b""])
@pytest.mark.parametrize("path", [each.value for each in Dialect])
def test_odd_answers_are_passed_on_and_nothing_is_learnt_from_them(
    site: Gateway, engine: Engine, path: str, kind: bytes
) -> None:
    for body in ODD_ANSWERS:
        body = b"data: %b\n\ndata\n\n:\n\nevent: x\ndata: %b\n\n" % (body, body) if b"stream" in kind else body
        engine.live = says(whole(body, kind=kind))
        assert site.http.post(path, json={**ASKED, "prompt": "a" * 600, "input": "b"}).content == body


def test_warm_ups_that_are_refused_are_tried_less_and_less_and_live_requests_are_served(
    site: Gateway, engine: Engine
) -> None:
    engine.warm = says(whole(b"{}", b"429 Too Many Requests"))
    context = {"model": "m", "messages": [{"role": "system", "content": "a document. " * 400}]}
    hint = site.asked("POST", "prefetch", {"context": context}).json()["id"]
    until(lambda: site.metric("pieces_refused_total") >= 3, "it does not try again")
    began = time.monotonic()
    while time.monotonic() < began + 1.0:
        assert site.http.post(CHAT, json=ASKED).content == ANSWER
        assert site.http.get("/health").status_code == 200
    assert len(engine.warmed) <= 4
    assert site.asked("DELETE", f"prefetch/{hint}").json()["outcome"] == "cancelled"


def test_a_warm_up_that_hangs_is_given_up_for_a_live_request(site: Gateway, engine: Engine) -> None:
    left = threading.Event()
    engine.warm = lambda peer, request: left.set() if peer.is_left() else None
    context = {"model": "m", "messages": [{"role": "system", "content": "another document. " * 400}]}
    hint = site.asked("POST", "prefetch", {"context": context}).json()["id"]
    until(lambda: len(engine.warmed) == 1, "nothing is warmed")
    before = site.metric("pieces_given_up_total")
    assert site.http.post(CHAT, json=ASKED).content == ANSWER
    until(lambda: site.metric("pieces_given_up_total") == before + 1, "the piece is not given up")
    assert left.wait(10)
    assert site.asked("DELETE", f"prefetch/{hint}").json()["outcome"] == "cancelled"


@pytest.mark.parametrize("answer", ODD_ANSWERS[:12:3], ids=range(4))
def test_odd_answers_to_warm_ups_end_a_hint(site: Gateway, engine: Engine, answer: bytes) -> None:
    engine.warm = says(whole(answer))
    words = f"{answer[:20]!r} " + "a third document. " * 100
    hint = site.hint({"context": {"model": "m", "messages": [{"role": "system", "content": words}]}})
    assert hint["outcome"] in ("warm", "failed")


# -- requests --------------------------------------------------------------------------------------------------------
def odd(**fields: Any) -> bytes:
    return json.dumps({**ASKED, "prompt": "a text", "input": "a text", **fields}).encode()


ODD_REQUESTS = [
    *(b"{", b"[]", b"5", b"null", b'""', b"\xff\xfe{}", b"\xef\xbb\xbf{}", b'{"model": "\xff"}', b"NaN", b"{} {}"),
    *(odd(messages=each, input=each, prompt=each) for each in (5, [5], [[]], [None], {}, [{}], "", [{"role": 5}])),
    *(odd(messages=[{"role": "user", "content": each}]) for each in (5, [5], [[]], {"a": {}}, [{"type": []}], None)),
    *(odd(messages=[{"role": "assistant", "tool_calls": each}]) for each in (5, [5], [{}], [{"function": 5}], {})),
    *(odd(prompt=each) for each in ([1.5], [-1], [2**70], [[1], [2]], ["a", 1], [True], {"a": 1})),
    *(odd(tools=each, tool_choice=each, functions=each, documents=each) for each in (7, [None], {}, "x", [[]])),
    *(odd(model=each) for each in (None, 5, {}, [], "m" * 2**20)),
    *(odd(stream=each, stream_options=each, metadata=each) for each in ("yes", 1, [], 0.0)),
    *(odd(cache_salt=each, previous_response_id=each, conversation=each) for each in (5, "", "\"}'", "s" * 99_999, [])),
    *(odd(max_tokens=each, max_completion_tokens=each) for each in (False, 0.5, "0", -0.5, 1e300, 10**400, None)),
    odd(prompt_cache_options=5, user=[], prompt_cache_key={}, system=5, instructions=[]),
    *(
        b'{"messages": [{"role": "user", "content": %b}]}' % each
        for each in (b"NaN", b"1e999", b"-Infinity", b'"\\ud800"')
    ),
    *(b'{"messages": %b}' % (each * 50_000) for each in (b"[", b'{"a":', b'[{"content":')),
    b'{"messages": %b%b}' % (b"[" * 400, b"]" * 400),
    b'{"messages": [], "messages": [{"role": "user", "content": "twice"}], "model": 1, "model": "m"}',
]


@pytest.mark.parametrize("path", [each.value for each in Dialect])
def test_odd_requests_come_to_the_engine_as_they_are(site: Gateway, engine: Engine, path: str) -> None:
    engine.live = says(whole(b"{}", b"400 Bad Request"))
    for at, body in enumerate(ODD_REQUESTS):
        answer = site.http.post(path, content=body, headers={"content-type": "application/json"})
        assert (answer.status_code, answer.content) == (400, b"{}"), (at, body[:80])
        assert engine.seen[-1].body == body, at
    assert len(engine.seen) == len(ODD_REQUESTS)


@pytest.mark.parametrize("path", [each.value for each in Dialect])
def test_odd_prewarm_requests_are_answered_or_refused(site: Gateway, engine: Engine, path: str) -> None:
    engine.warm = says(whole(b"{}", b"400 Bad Request"))
    for at, body in enumerate(ODD_REQUESTS):
        begun, end, rest = body.rpartition(b"}")
        if not begun or rest.strip():
            continue
        zero = begun + b', "max_tokens": 0, "prompt_cache_options": {"prewarm": true}' + end
        answer = site.http.post(path, content=zero, headers={"content-type": "application/json"})
        assert answer.status_code in (200, 400), (at, body[:80], answer.text[:200])


@pytest.mark.parametrize("kind", ["text/plain", "multipart/form-data", "json", ""])
def test_a_body_of_the_wrong_kind_is_the_engines_to_refuse(site: Gateway, engine: Engine, kind: str) -> None:
    body = msgspec.json.encode(ASKED)
    assert site.http.post(CHAT, content=body, headers={"content-type": kind}).content == ANSWER
    (seen,) = engine.seen
    assert (seen.body, seen.all(b"content-type")) == (body, [kind.encode()])


@pytest.mark.parametrize("stated", [True, False])
@pytest.mark.parametrize("path", [CHAT, "/v1/messages", "/kvprefetch/v1/prefetch"])
def test_too_large_a_body_is_refused_and_never_held(site: Gateway, engine: Engine, path: str, stated: bool) -> None:
    pieces = (b" " * 2**16 for _ in range(LARGEST // 2**16 + 2))
    content: Any = b" " * (LARGEST + 1) if stated else pieces
    try:
        answer = site.http.post(path, content=content, headers={"content-type": "application/json"})
    except httpx.WriteError:
        return  # it hung up before all was sent
    assert answer.status_code == 413
    assert str(LARGEST) in answer.json()["error"]["message"]
    assert engine.seen == []


def test_a_client_that_sends_half_a_request_keeps_nobody_waiting(site: Gateway, engine: Engine) -> None:
    with Caller(int(site.url.rpartition(":")[2])) as slow, Caller(int(site.url.rpartition(":")[2])) as odd:
        slow.send(b"POST %b HTTP/1.1\r\nhost: a\r\ncontent-length: 1000\r\n\r\n{" % CHAT.encode())
        odd.send(b"\x16\x03\x01 no HTTP at all\r\n\r\n")
        assert site.http.post(CHAT, json=ASKED).content == ANSWER
        assert odd.until(b"\r\n\r\n") is not None
    assert len(engine.seen) == 1


def test_a_client_that_never_reads_costs_little_memory(site: Gateway, engine: Engine) -> None:
    written_to: list[Peer] = []

    def flood(peer: Peer, request: Request) -> None:
        written_to.append(peer)
        peer.send(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 1000000000\r\n\r\n")
        for _ in range(500):
            peer.send(b"data: " + b"x" * 99_990 + b"\n\n\n\n")

    process = psutil.Process(site.process.pid)
    before = process.memory_info().rss
    engine.live = flood
    with Caller(int(site.url.rpartition(":")[2]), receive_buffer=4096) as caller:
        caller.ask("POST", CHAT, "content-type: application/json", body=msgspec.json.encode(ASKED))
        until(lambda: bool(written_to) and stalls(written_to[0]), "the engine is never held back")
        assert written_to[0].sent < 24 * 2**20
        assert process.memory_info().rss < before + 24 * 2**20
        engine.live = says(whole(ANSWER))
        assert site.http.post(CHAT, json=ASKED).content == ANSWER
    until(lambda: site.metric("upstream_live") == 0, "it is still served")


def stalls(peer: Peer) -> bool:
    before = peer.sent
    time.sleep(0.3)
    return peer.sent == before > 0


# -- hints -----------------------------------------------------------------------------------------------------------
BAD_HINTS: list[tuple[str, Any]] = [  # what is refused, and by which name
    *(("probability", each) for each in (-0.1, 1.1, "1", True, [], 1e300)),
    *(("expected_in_s", each) for each in (-1, 1e300, "soon", {})),
    *(("hold_s", each) for each in (-1, 1e300, "long")),
    *(("wait_s", each) for each in (-1, 1e9, "ever")),
    *(("session", each) for each in (5, [], "s" * 300)),
    *(("context", each) for each in (5, [], {}, {"messages": 5}, {"messages": []}, {"prompt": "of chat"})),
    *(("context", {"prompt": each, "endpoint": "/v1/completions"}) for each in ([[1], [2]], "", [], 5)),
]


@pytest.mark.parametrize(("name", "value"), BAD_HINTS, ids=str)
def test_hints_with_odd_values_are_refused_by_name(site: Gateway, name: str, value: Any) -> None:
    answer = site.asked("POST", "prefetch", {"context": ASKED, name: value})
    assert answer.status_code == 400, answer.text
    assert name in answer.json()["error"]["message"]


@pytest.mark.parametrize("endpoint", ["/v1/nothing", "", 5, None])
def test_a_context_of_no_known_dialect_is_refused(site: Gateway, endpoint: Any) -> None:
    answer = site.asked("POST", "prefetch", {"context": {**ASKED, "endpoint": endpoint}})
    assert answer.status_code == 400
    assert "endpoint" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        *({"kind": each} for each in (5, "", None, [], "k" * 300)),
        *({"kind": "k", "contexts": each} for each in (5, [5], {"a": 1}, [{}] * 65, [{"messages": 5}], [{"name": 5}])),
        {"kind": "k", "session": 5},
    ],
    ids=str,
)
def test_odd_signals_are_refused(site: Gateway, body: Json) -> None:
    assert site.asked("POST", "signal", body).status_code in (400, 404)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"\xff", b'{"probability": NaN}', b"[" * 50_000, b'{"kind": "\\ud800"}']
)
def test_hints_and_signals_that_are_no_json_are_refused(site: Gateway, body: bytes) -> None:
    for path in ("prefetch", "signal"):
        url, headers = f"/kvprefetch/v1/{path}", {"content-type": "application/json"}
        assert site.http.post(url, content=body, headers=headers).status_code == 400
        assert site.http.post(url, content=body, headers={"content-type": "text/plain"}).status_code == 415


@pytest.mark.parametrize("number", ["0", "-1", "999999999", "none", "%00", "%ff", "1" * 5_000, "1%20"])
def test_ids_that_nobody_was_given_are_not_found(site: Gateway, number: str) -> None:
    for method in ("GET", "DELETE"):
        assert site.asked(method, f"prefetch/{number}").status_code == 404


def test_a_thousand_kinds_of_signals_and_names_of_sessions_do_no_harm(site: Gateway) -> None:
    for at in range(1_000):
        site.signal({"kind": f"kind {at}", "session": f"session {at}\x00é"})
    signals = site.stats()["signals"]
    assert len(signals) <= 65
    assert signals["other"] > 900
    odd = {"X-KVPrefetch-Session": "s" * 10_000}
    assert site.http.post(CHAT, json=ASKED, headers=odd).content == ANSWER
    odd = {b"X-KVPrefetch-Session": b"\xff\xfe\x80"}
    assert site.http.post(CHAT, json=ASKED, headers=odd).status_code == 400


# -- 10,000 sessions -------------------------------------------------------------------------------------------------
def test_ten_thousand_sessions_that_never_return_are_forgotten() -> None:
    most_sessions, most_bytes, megabyte = 1_000, 2 * 2**20, 2**20
    own = GatewaySettings(
        upstreams=(UpstreamSettings("http://127.0.0.1:9"),), max_sessions=most_sessions, max_context_bytes=most_bytes
    )
    process, sizes = psutil.Process(), []

    async def story() -> None:
        async with open_links(own) as links:
            running = make_gateway(Settings(gateway=own, speculation=SpeculationSettings(max_pending=64)), links).site
            desk = running.upstreams[0].desk
            for at in range(10_000):
                said = [{"role": "system", "content": f"{at} " * 500}, {"role": "user", "content": "And now?"}]
                asked = read_request(Dialect.CHAT, msgspec.json.encode({"model": "m", "messages": said}))
                turn = await running.begin("all", asked, "", [])
                turn.began(200, [(b"content-type", b"application/json")])
                turn.chunk(ANSWER)
                turn.ended(None)
                if at % 100 == 99:
                    await asyncio.sleep(0)  # what is learnt is learnt now
                    assert len(running.talks.known) <= most_sessions
                    assert running.talks.bytes <= most_bytes + 4_000
                    assert len(desk.preloads.jobs) <= 64
                if at % 2_500 == 2_499:
                    sizes.append(process.memory_info().rss)
            assert len(desk.replica.resident) <= 65_536
            ledger = desk.ledger.stats()
            assert ledger["issued"] == sum(ledger["outcomes"].values()) + ledger["pending"]
            assert running.upstreams[0].live == 0

    asyncio.run(story())
    growth = (sizes[-1] - sizes[0]) / megabyte
    assert growth < 48, f"RSS grew by {growth:.0f} MiB over the last 7,500 sessions"
