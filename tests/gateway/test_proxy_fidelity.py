"""Byte for byte: what the client asks comes to the engine, and what the engine answers comes to the client."""

import asyncio
import gzip
from collections.abc import Callable, Iterator

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from proxied import WHOLE, Proxied, proxied
from raw_upstream import Peer, Request, answering, chunked, upstream

from kvprefetch.errors import InvalidRequest, UpstreamError
from kvprefetch.gateway.link import UpstreamLink, open_links
from kvprefetch.gateway.proxy import refuse_websocket
from kvprefetch.settings import GatewaySettings, UpstreamSettings

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
_TOKEN = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789!#$%&'*+-.^_`|~"
_OF_HTTP = (
    *("connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "host", "content-length", "expect"),
    *("content-encoding", "sec-websocket-key1"),
)
_NAMES = st.text(_TOKEN, min_size=1, max_size=20).filter(
    lambda name: name.lower() not in _OF_HTTP and not name.lower().startswith("proxy-")
)
_VALUES = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x2FF, exclude_categories=("Cc",)), max_size=40)
_FIELDS = st.lists(st.tuples(_NAMES, _VALUES.map(lambda value: value.strip(" \t\xa0\x85"))), max_size=12).map(
    lambda fields: [(name.encode(), value.encode()) for name, value in fields]
)
_PATHS = st.text(_TOKEN.replace("#", "") + "/%:@,;=()", max_size=40)


class Stage:
    """One proxy before one engine, whose next answer can be set."""

    def __init__(self, proxy: Proxied, seen: list[Request]) -> None:
        self.proxy, self.seen = proxy, seen
        self.answer: list[bytes] = [OK]


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    seen: list[Request] = []
    on: list[Stage] = []

    def script(peer: Peer) -> None:
        while (request := peer.request()) is not None:
            seen.append(request)
            peer.send(*on[0].answer)

    with upstream(script) as engine, proxied(engine.url) as proxy:
        on.append(Stage(proxy, seen))
        yield on[0]


def _lowered(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    return [(name.lower(), value) for name, value in headers]


@settings(max_examples=150, deadline=None)
@given(
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"]),
    path=_PATHS,
    query=st.none() | _PATHS.filter(bool),
    headers=_FIELDS,
    body=st.binary(max_size=5000),
    whole=st.booleans(),
)
def test_a_request_comes_to_the_engine_as_it_was_sent(
    stage: Stage,
    method: str,
    path: str,
    query: str | None,
    headers: list[tuple[bytes, bytes]],
    body: bytes,
    whole: bool,
) -> None:
    target = f"/{path}" + (f"?{query}" if query else "")
    stage.answer = [OK]
    with stage.proxy.connect() as client:
        framing = b"Content-Length: %d" % len(body) if whole else b"Transfer-Encoding: chunked"
        lines = [f"{method} {target} HTTP/1.1".encode(), b"Host: proxy", *(b"%b: %b" % field for field in headers)]
        client.send(b"\r\n".join([*lines, framing, b"", body if whole else chunked(body[:100], body[100:])]))
        assert client.answer()[2] == b"ok"
    came = stage.seen[-1]
    assert came.line == f"{method} {target} HTTP/1.1".encode()
    assert came.body == body
    assert _lowered(came.headers)[1:-1] == _lowered(headers)  # after Host, before the length


@settings(max_examples=150, deadline=None)
@given(
    status=st.sampled_from([200, 201, 202, 206, 301, 307, 400, 401, 404, 409, 422, 429, 499, 500, 503, 529]),
    headers=_FIELDS,
    pieces=st.lists(st.binary(min_size=1, max_size=3000), max_size=5),
    has_length=st.booleans(),
)
def test_an_answer_comes_to_the_client_as_it_was_given(
    stage: Stage, status: int, headers: list[tuple[bytes, bytes]], pieces: list[bytes], has_length: bool
) -> None:
    body = b"".join(pieces)
    lines = [b"HTTP/1.1 %d Whatever" % status, *(b"%b: %b" % field for field in headers)]
    if has_length:
        stage.answer = [b"\r\n".join([*lines, b"Content-Length: %d" % len(body), b"", b""]), *pieces]
    else:
        stage.answer = [b"\r\n".join([*lines, b"Transfer-Encoding: chunked", b"", b""]), chunked(*pieces)]
    with stage.proxy.connect() as client:
        client.ask("POST", "/v1/completions", body=b"{}")
        line, came, content = client.answer()
    assert line.split()[1] == b"%d" % status
    assert content == body
    assert came[:-1] == _lowered(headers)
    seen = stage.proxy.seen[-1]
    assert seen.error() == WHOLE
    assert (seen.status, b"".join(seen.chunks)) == (status, body)


def _exchange(
    script: Callable[[Peer], None], method: str = "POST", *headers: str, body: bytes = b"{}"
) -> tuple[bytes, list[tuple[bytes, bytes]], bytes]:
    with upstream(script) as engine, proxied(engine.url) as proxy, proxy.connect() as client:
        client.ask(method, "/v1/completions", *headers, body=body)
        return client.answer()


def test_headers_that_come_twice_stay_two_in_their_order() -> None:
    head = b"HTTP/1.1 200 OK\r\nSet-Cookie: a=1; Path=/\r\nx: 1\r\nSet-Cookie: b=2\r\ncontent-length: 0\r\n\r\n"
    _, headers, _ = _exchange(answering(head))
    assert [field for field in headers if field[0] == b"set-cookie"] == [
        (b"set-cookie", b"a=1; Path=/"),
        (b"set-cookie", b"b=2"),
    ]


def test_cookies_of_one_client_are_not_sent_for_another(stage: Stage) -> None:
    stage.answer = [b"HTTP/1.1 200 OK\r\nset-cookie: secret=1; Path=/\r\ncontent-length: 2\r\n\r\nok"]
    for _ in range(2):
        with stage.proxy.connect() as client:
            client.ask("GET", "/v1/models")
            client.answer()
    assert stage.seen[-1].all(b"cookie") == []


def test_a_packed_body_stays_packed() -> None:
    packed = gzip.compress(b"the answer " * 100)
    head = b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(packed)
    _, headers, body = _exchange(answering(head + packed))
    assert body == packed
    assert (b"content-encoding", b"gzip") in headers


def test_a_packed_request_stays_packed(stage: Stage) -> None:
    packed, stage.answer = gzip.compress(b"the question " * 100), [OK]
    with stage.proxy.connect() as client:
        client.ask("POST", "/v1/completions", "Content-Encoding: gzip", body=packed)
        client.answer()
    assert stage.seen[-1].body == packed
    assert stage.seen[-1].all(b"content-encoding") == [b"gzip"]


def test_what_belongs_to_one_connection_is_not_passed_on(stage: Stage) -> None:
    stage.answer = [
        b"HTTP/1.1 200 OK\r\nconnection: X-Theirs\r\nkeep-alive: timeout=5\r\nx-theirs: 1\r\n"
        b"proxy-authenticate: Basic\r\ntrailer: x\r\nupgrade: h2c\r\nx-kept: 1\r\ncontent-length: 2\r\n\r\nok"
    ]
    with stage.proxy.connect() as client:
        mine = ("Connection: X-Mine, keep-alive", "X-Mine: 1", "Keep-Alive: 5", "Proxy-Authorization: secret")
        client.ask("POST", "/v1/x", *mine, "TE: trailers", "Trailer: x", "X-Kept: 1", body=b"{}")
        _, headers, _ = client.answer()
    assert _lowered(stage.seen[-1].headers)[1:-1] == [(b"x-kept", b"1")]
    assert headers == [(b"x-kept", b"1"), (b"content-length", b"2")]


def test_the_engine_sees_its_own_name_as_host_and_nothing_of_the_proxy(stage: Stage) -> None:
    stage.answer = [OK]
    with stage.proxy.connect() as client:
        client.ask("GET", "/v1/models")
        client.answer()
    assert [name for name, _ in stage.seen[-1].headers] == [b"Host"]
    assert stage.seen[-1].all(b"host")[0].startswith(b"127.0.0.1:")


@pytest.mark.parametrize("status", [b"204 No Content", b"304 Not Modified"])
def test_an_answer_without_a_body_leaves_the_connection_in_order(stage: Stage, status: bytes) -> None:
    with stage.proxy.connect() as client:
        stage.answer = [b"HTTP/1.1 %b\r\netag: x\r\n%b\r\n" % (status, b"content-length: 5\r\n" * (b"304" in status))]
        client.ask("GET", "/v1/models")
        assert client.head() == (b"HTTP/1.1 " + status, [(b"etag", b"x")])
        stage.answer = [OK]
        client.ask("GET", "/v1/models")
        assert client.answer()[2] == b"ok"


def test_head_is_answered_with_the_length_and_no_body(stage: Stage) -> None:
    with stage.proxy.connect() as client:
        stage.answer = [b"HTTP/1.1 200 OK\r\ncontent-length: 500\r\n\r\n"]
        client.ask("HEAD", "/v1/models")
        assert client.head() == (b"HTTP/1.1 200 OK", [(b"content-length", b"500")])
        stage.answer = [OK]
        client.ask("GET", "/v1/models")
        assert client.answer()[2] == b"ok"
    assert stage.seen[-2].line == b"HEAD /v1/models HTTP/1.1"


def test_interim_answers_are_not_taken_for_the_answer() -> None:
    hints = b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n"
    assert _exchange(answering(hints + OK))[::2] == (b"HTTP/1.1 200 OK", b"ok")


def test_a_client_that_waits_to_be_told_to_go_on_is_told(stage: Stage) -> None:
    stage.answer = [OK]
    with stage.proxy.connect() as client:
        client.ask("POST", "/v1/completions", "Expect: 100-continue", "Content-Length: 4")
        assert client.head() == (b"HTTP/1.1 100 Continue", [])
        client.send(b"body")
        assert client.answer()[2] == b"ok"
    assert stage.seen[-1].body == b"body"
    assert stage.seen[-1].all(b"expect") == []


def test_a_redirect_is_the_clients_to_follow() -> None:
    head = b"HTTP/1.1 307 Temporary Redirect\r\nlocation: http://elsewhere/v1\r\ncontent-length: 0\r\n\r\n"
    line, headers, _ = _exchange(answering(head))
    assert line == b"HTTP/1.1 307 Temporary Redirect"
    assert (b"location", b"http://elsewhere/v1") in headers


def test_an_engine_of_http_1_0_ends_its_answer_by_closing() -> None:
    def script(peer: Peer) -> None:
        peer.request()
        peer.send(b"HTTP/1.0 200 OK\r\ncontent-type: text/plain\r\n\r\n", b"all of it")

    assert _exchange(script)[2] == b"all of it"


def test_bodies_that_are_neither_text_nor_json_are_passed_on(stage: Stage) -> None:
    stage.answer = [b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 3\r\n\r\n\xff\x00\xfe"]
    with stage.proxy.connect() as client:
        client.ask("POST", "/v1/chat/completions", "Content-Type: image/png", body=b"\xff\xfe{\x00")
        assert client.answer()[2] == b"\xff\x00\xfe"
    assert stage.seen[-1].body == b"\xff\xfe{\x00"
    assert stage.seen[-1].all(b"content-type") == [b"image/png"]


def test_an_engines_own_error_is_passed_on_with_our_headers_after_its_own() -> None:
    body = b'{"error":{"message":"no"}}'
    answer = b"HTTP/1.1 429 Too Many Requests\r\nretry-after: 3\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    with upstream(answering(answer)) as engine, proxied(engine.url, limit=1000) as proxy, proxy.connect() as client:
        client.ask("POST", "/v1/completions", body=b"{}")
        line, headers, content = client.answer()
    assert (line, content) == (b"HTTP/1.1 429 Too Many Requests", body)
    assert headers == [(b"retry-after", b"3"), (b"content-length", b"26"), (b"x-ours", b"1")]


def test_an_empty_post_says_that_it_is_empty(stage: Stage) -> None:
    stage.answer = [OK]
    with stage.proxy.connect() as client:
        client.ask("POST", "/v1/x", "Content-Length: 0")
        assert client.answer()[2] == b"ok"
    assert stage.seen[-1].all(b"content-length") == [b"0"]


def test_a_header_that_is_not_utf_8_is_refused(stage: Stage) -> None:
    with stage.proxy.connect() as client:
        client.send(b"GET /v1/models HTTP/1.1\r\nhost: x\r\nx: \xff\r\n\r\n")
        assert client.answer()[0] == b"HTTP/1.1 400 Bad Request"
    assert stage.proxy.seen[-1].error() == "refused: a header is not UTF-8"


def test_a_websocket_is_refused() -> None:
    sent: list[object] = []

    async def receive() -> dict[str, object]:
        return {"type": "websocket.connect"}

    async def send(message: object) -> None:
        sent.append(message)

    asyncio.run(refuse_websocket(receive, send))  # type: ignore[arg-type]
    assert sent == [{"type": "websocket.close", "code": 1008, "reason": "no WebSockets here"}]


def _by_link(url: str, use: Callable[[UpstreamLink], object], api_key: str = "") -> object:
    async def run() -> object:
        upstreams = (UpstreamSettings(url, api_key=api_key),)
        async with open_links(GatewaySettings(upstreams=upstreams)) as links:
            return await use(links[0])  # type: ignore[misc]

    return asyncio.run(run())


@pytest.mark.parametrize("ending", ["", "/", "/v1", "/v1/"])
def test_an_upstream_may_be_named_with_or_without_v1(ending: str) -> None:
    seen: list[Request] = []
    with upstream(answering(OK, seen=seen)) as engine:
        assert _by_link(engine.url + ending, lambda link: link.get("/v1/models")) == (200, b"ok")
    assert seen[0].line == b"GET /v1/models HTTP/1.1"


def test_the_upstreams_own_key_is_sent_instead_of_the_callers() -> None:
    seen: list[Request] = []
    with upstream(answering(OK, seen=seen)) as engine:
        with proxied(engine.url, api_key="ours") as proxy:
            httpx.get(proxy.url, headers={"authorization": "Bearer theirs", "x-api-key": "theirs"})
        _by_link(engine.url, lambda link: link.post("/v1/x", b"{}", headers={"X-Api-Key": "theirs"}), "ours")
    for request in seen:
        assert request.all(b"authorization") == [b"Bearer ours"]
        assert request.all(b"x-api-key") == []


def test_a_link_posts_json_with_what_it_is_given_but_for_what_describes_another_body() -> None:
    seen: list[Request] = []
    given_headers = (
        ("Content-Type", "text/plain"),
        ("Content-Length", "77"),
        ("Accept-Encoding", "gzip"),
        ("X-A", "b"),
    )
    with upstream(answering(OK, seen=seen)) as engine:
        assert _by_link(engine.url, lambda link: link.post("/v1/x", b"{}", headers=given_headers)) == (200, b"ok")
    assert seen[0].headers[1:] == [(b"X-A", b"b"), (b"content-type", b"application/json"), (b"Content-Length", b"2")]


def test_a_link_waits_no_longer_than_it_is_told() -> None:
    def script(peer: Peer) -> None:
        peer.request()
        peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nsom")
        peer.is_left()

    with upstream(script) as engine, pytest.raises(UpstreamError, match="does not answer within"):
        _by_link(engine.url, lambda link: link.get("/metrics", timeout_s=0.3))


def test_a_link_keeps_no_endless_answer() -> None:
    def script(peer: Peer) -> None:
        peer.request()
        peer.send(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            peer.send(b"x" * 2**20)

    with upstream(script) as engine, pytest.raises(UpstreamError, match="more than"):
        _by_link(engine.url, lambda link: link.get("/metrics", timeout_s=30))


def test_a_path_cannot_name_another_host() -> None:
    with pytest.raises(InvalidRequest):
        _by_link("http://127.0.0.1:1", lambda link: link.get("@elsewhere/"))
