"""Streams: nothing waits for more, a slow reader slows the writer, and who leaves is gone for both ends."""

import asyncio
import select
import threading
import time

import pytest
from proxied import WHOLE, Caller, Seen, error_answer, proxied
from raw_upstream import PATIENCE_S, Peer, answering, upstream

from kvprefetch.gateway.link import open_links
from kvprefetch.gateway.proxy import Message, forward
from kvprefetch.settings import GatewaySettings, UpstreamSettings

STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
EVENT = b"5\r\ndata:\r\n"
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
MUCH = 200 * 2**20
BUFFERED = 24 * 2**20  # at most: four of the kernel's buffers, and little of our own


def test_an_event_arrives_before_the_next_is_sent() -> None:
    arrived = threading.Semaphore(0)

    def script(peer: Peer) -> None:
        peer.request()
        peer.send(STREAM)
        for _ in range(5):
            assert arrived.acquire(timeout=PATIENCE_S)
            peer.send(EVENT)
        assert arrived.acquire(timeout=PATIENCE_S)
        peer.send(b"0\r\n\r\n")

    with upstream(script) as engine, proxied(engine.url) as proxy, proxy.connect() as client:
        client.ask("POST", "/v1/chat/completions", body=b"{}")
        client.head()  # which waits for no body either
        chunks = client.chunks()
        for _ in range(5):
            arrived.release()
            assert next(chunks) == b"data:"
        arrived.release()
        assert list(chunks) == []


def test_a_part_of_an_upload_arrives_before_the_next_is_sent() -> None:
    arrived = threading.Semaphore(0)

    def script(peer: Peer) -> None:
        request = peer.request(body=False)
        assert request is not None
        for _ in peer.chunks():
            arrived.release()
        peer.send(OK)

    with upstream(script) as engine, proxied(engine.url) as proxy, proxy.connect() as client:
        client.ask("POST", "/v1/files", "Transfer-Encoding: chunked")
        for _ in range(5):
            client.send(EVENT)
            assert arrived.acquire(timeout=PATIENCE_S)
        client.send(b"0\r\n\r\n")
        assert client.answer()[2] == b"ok"


def _written(peer: Peer) -> int:
    """Send until nobody takes more; how much was taken."""
    peer.sock.settimeout(1.5)
    piece = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    try:
        while peer.sent < MUCH:
            peer.sent += peer.sock.send(piece)
    except TimeoutError:
        pass
    return peer.sent


def test_a_client_that_never_reads_stops_the_engine() -> None:
    written, left = [], threading.Event()

    def script(peer: Peer) -> None:
        peer.request()
        peer.send(STREAM)
        written.append(_written(peer))
        peer.sock.settimeout(PATIENCE_S)
        if peer.is_left():
            left.set()

    with upstream(script) as engine, proxied(engine.url, silence_s=0.5) as proxy:
        with proxy.connect() as client:
            client.ask("POST", "/v1/completions", body=b"{}")
            _until(lambda: bool(written))
            assert written[0] < BUFFERED
        assert left.wait(PATIENCE_S), "the engine's connection outlives the client's"
        assert proxy.seen[0].error() == "client left"


def test_an_engine_that_never_reads_stops_the_client() -> None:
    over = threading.Event()

    def script(peer: Peer) -> None:
        over.wait(PATIENCE_S)

    with upstream(script) as engine, proxied(engine.url) as proxy:
        with proxy.connect() as client:
            client.ask("POST", "/v1/files", "Transfer-Encoding: chunked")
            assert _written(client) < BUFFERED
        over.set()
        assert proxy.seen[0].error() != WHOLE


def test_a_slow_client_is_not_taken_for_a_silent_engine() -> None:
    body = bytes(range(256)) * 2**16

    def script(peer: Peer) -> None:
        peer.request()
        peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body), body)

    with upstream(script) as engine, proxied(engine.url, silence_s=0.5) as proxy:
        with proxy.connect(receive_buffer=32_768) as client:
            client.ask("GET", "/v1/files/1")
            client.head()
            got = b""
            for _ in range(3):
                time.sleep(0.5)
                got += client.exactly(100_000)
            assert got + client.exactly(len(body) - len(got)) == body
        assert proxy.seen[0].error() == WHOLE


@pytest.mark.parametrize("answered", [b"", STREAM, STREAM + EVENT], ids=["before the head", "after it", "midway"])
@pytest.mark.parametrize("limit", [0, 1000], ids=["streamed", "read first"])
def test_a_client_that_leaves_ends_the_request_upstream(answered: bytes, limit: int) -> None:
    asked, left = threading.Event(), threading.Event()

    def script(peer: Peer) -> None:
        peer.request()
        peer.send(answered)
        asked.set()
        if peer.is_left():
            left.set()

    with upstream(script) as engine, proxied(engine.url, limit=limit) as proxy:
        with proxy.connect() as client:
            client.ask("POST", "/v1/chat/completions", body=b"{}")
            assert asked.wait(PATIENCE_S)
            if answered:
                client.head()
        assert left.wait(PATIENCE_S)
        assert proxy.seen[0].error() == "client left"


def test_an_upload_that_breaks_off_does_not_look_complete_upstream() -> None:
    begun, outcome = threading.Event(), []

    def script(peer: Peer) -> None:
        peer.request(body=False)
        try:
            for _ in peer.chunks():
                begun.set()
            outcome.append("complete")
        except EOFError:
            outcome.append("broken")

    with upstream(script) as engine, proxied(engine.url) as proxy:
        with proxy.connect() as client:
            client.ask("POST", "/v1/files", "Transfer-Encoding: chunked")
            client.send(EVENT)
            assert begun.wait(PATIENCE_S)
        _until(lambda: bool(outcome))
        assert outcome == ["broken"]
        assert proxy.seen[0].error() == "client left"


def test_an_engine_may_answer_before_it_has_the_whole_upload() -> None:
    def script(peer: Peer) -> None:
        peer.request(body=False)
        peer.send(b"HTTP/1.1 413 Too Large\r\ncontent-length: 3\r\n\r\nbig")
        peer.is_left()

    with upstream(script) as engine, proxied(engine.url) as proxy, proxy.connect() as client:
        client.ask("POST", "/v1/files", "Transfer-Encoding: chunked")
        client.send(EVENT)
        assert client.answer()[2] == b"big"
        assert proxy.seen[0].error() == WHOLE


def test_one_connection_serves_request_after_request() -> None:
    with upstream(answering(OK)) as engine, proxied(engine.url) as proxy, proxy.connect() as client:
        for _ in range(20):
            client.ask("POST", "/v1/completions", body=b"{}")
            assert client.answer()[2] == b"ok"
        assert [seen.error() for seen in proxy.seen] == [WHOLE] * 20
        assert engine.connections == 1


def test_requests_sent_at_once_are_answered_in_their_order() -> None:
    def script(peer: Peer) -> None:
        while (request := peer.request()) is not None:
            peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\n" + request.line[4:8])

    with upstream(script) as engine, proxied(engine.url) as proxy, proxy.connect() as client:
        for number in range(5):
            client.ask("GET", f"/no{number}")
        assert [client.answer()[2] for _ in range(5)] == [b"/no%d" % number for number in range(5)]


def test_many_streams_at_once_keep_apart() -> None:
    def script(peer: Peer) -> None:
        while (request := peer.request()) is not None:
            peer.send(STREAM)
            for _ in range(50):
                peer.send(b"%x\r\n%b\r\n" % (len(request.body), request.body))
            peer.send(b"0\r\n\r\n")

    with upstream(script) as engine, proxied(engine.url) as proxy:
        clients: list[Caller] = []
        try:
            for number in range(40):
                clients.append(proxy.connect())
                clients[-1].ask("POST", "/v1/completions", body=b"[%d]" % number)
            for number, client in enumerate(clients):
                assert client.answer()[2] == b"[%d]" % number * 50
        finally:
            for client in clients:
                client.sock.close()


def _until(holds: object) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():  # type: ignore[operator]
        assert time.monotonic() < deadline
        select.select([], [], [], 0.02)


def test_a_client_that_goes_once_it_has_everything_has_not_left() -> None:
    """Servers say "disconnect" when an answer is complete, and may do so while its last part is being sent."""
    seen, over = Seen(), asyncio.Event()

    async def receive() -> Message:
        await over.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body" and not message.get("more_body"):
            over.set()
        await asyncio.sleep(0.01)

    async def run(url: str) -> None:
        scope = {"method": "POST", "raw_path": b"/v1/completions", "query_string": b"", "headers": []}
        async with open_links(GatewaySettings(upstreams=(UpstreamSettings(url),))) as links:
            await forward(scope, receive, send, links[0], headers=[], body=b"{}", watch=seen, error_answer=error_answer)

    with upstream(answering(OK)) as engine:
        asyncio.run(run(engine.url))
    assert seen.error() == WHOLE
