"""Engines that are down, slow, gone or confused: the client learns it at once, and no broken answer looks whole."""

import socket
import threading

import pytest
from proxied import Proxied, proxied
from raw_upstream import Peer, Request, answering, chunked, upstream

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
EVENT = b"5\r\ndata:\r\n"


def _asked(proxy: Proxied, body: bytes = b"{}") -> tuple[bytes, dict[bytes, bytes], bytes]:
    with proxy.connect() as client:
        client.ask("POST", "/v1/chat/completions", body=body)
        line, headers, answer = client.answer()
    return line, dict(headers), answer


def _refused(script: object, words: str, **settings: float) -> None:
    """The proxy answers 502 for an engine that does this."""
    with upstream(script) as engine, proxied(engine.url, **settings) as proxy:  # type: ignore[arg-type]
        line, headers, body = _asked(proxy)
        assert line == b"HTTP/1.1 502 Bad Gateway"
        assert words in body.decode()
        assert words in headers[b"x-kvprefetch-reason"].decode()
        assert proxy.seen[0].error().startswith("upstream ")


def _broken_off(script: object, **settings: float) -> None:
    """The client's connection breaks in the midst of the answer."""
    with upstream(script) as engine, proxied(engine.url, **settings) as proxy:  # type: ignore[arg-type]
        with proxy.connect() as client:
            client.ask("POST", "/v1/chat/completions", body=b"{}")
            with pytest.raises(EOFError):
                client.answer()
        assert proxy.seen[0].error().startswith("upstream ")


def test_an_engine_that_is_down_is_answered_for_with_502() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with proxied(f"http://127.0.0.1:{port}") as proxy:
        line, headers, body = _asked(proxy)
        assert line == b"HTTP/1.1 502 Bad Gateway"
        assert headers[b"x-kvprefetch-reason"] == b"upstream cannot be reached"
        assert b"cannot be reached" in body


def test_an_engine_that_takes_no_connection_in_time_is_answered_for_with_504() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        waiting = [socket.socket() for _ in range(4)]
        for sock in waiting:  # they fill its backlog
            sock.setblocking(False)
            sock.connect_ex(listener.getsockname())
        with proxied(f"http://127.0.0.1:{listener.getsockname()[1]}", connect_s=0.3) as proxy:
            line, headers, _ = _asked(proxy)
            assert line == b"HTTP/1.1 504 Gateway Timeout"
            assert headers[b"x-kvprefetch-reason"] == b"upstream does not take a connection in time"
        for sock in waiting:
            sock.close()


def test_an_engine_that_says_nothing_is_answered_for_with_504() -> None:
    left = threading.Event()

    def script(peer: Peer) -> None:
        peer.request()
        if peer.is_left():
            left.set()

    with upstream(script) as engine, proxied(engine.url, silence_s=0.3) as proxy:
        line, headers, _ = _asked(proxy)
        assert line == b"HTTP/1.1 504 Gateway Timeout"
        assert headers[b"x-kvprefetch-reason"] == b"upstream was silent for too long"
        assert left.wait(10), "its connection stays open"


def test_an_engine_that_reads_nothing_of_a_large_body_is_answered_for_with_504() -> None:
    over = threading.Event()
    with (
        upstream(lambda peer: void(over.wait(30))) as engine,
        proxied(engine.url, limit=64 * 2**20, connect_s=0.3, silence_s=0.3) as proxy,
    ):
        line, _, _ = _asked(proxy, body=b"x" * (30 * 2**20))
        assert line == b"HTTP/1.1 504 Gateway Timeout"
        over.set()


def void(value: object) -> None:
    """For what is done for its effect."""


def test_an_engine_that_closes_a_new_connection_is_asked_only_once() -> None:
    seen: list[Request | None] = []
    _refused(lambda peer: seen.append(peer.request()), "closed the connection before its answer was there", limit=1000)
    assert len(seen) == 1


@pytest.mark.parametrize(
    "nonsense",
    [
        b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
        b"\x00\x01\x02\x03" * 1000,
        b"HTTP/1.1 999 What\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx: a\x01b\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\na b: c\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab",
        b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n",
    ],
)
def test_nonsense_instead_of_a_head_is_answered_for_with_502(nonsense: bytes) -> None:
    _refused(answering(nonsense), "does not answer in HTTP")


@pytest.mark.parametrize("endless", [b"x: y\r\n", b"x", b"x: " + b"y" * 100_000 + b"\r\n"])
def test_a_head_without_end_is_cut_short(endless: bytes) -> None:
    sent: list[int] = []

    def script(peer: Peer) -> None:
        peer.request()
        try:
            peer.send(b"HTTP/1.1 200 OK\r\n")
            while peer.sent < 200 * 2**20:
                peer.send(endless * (2**16 // len(endless) + 1))
        finally:
            sent.append(peer.sent)

    _refused(script, "does not answer in HTTP")
    assert sent[0] < 32 * 2**20


@pytest.mark.parametrize("closes", [Peer.reset, lambda peer: None], ids=["resets", "closes"])
@pytest.mark.parametrize("head", [STREAM + EVENT, b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nsome"])
def test_an_answer_that_breaks_off_breaks_off_for_the_client(head: bytes, closes: object) -> None:
    def script(peer: Peer) -> None:
        peer.request()
        peer.send(head)
        closes(peer)  # type: ignore[operator]

    _broken_off(script)


def test_what_came_before_it_broke_off_is_passed_on() -> None:
    more = threading.Event()

    def script(peer: Peer) -> None:
        peer.request()
        peer.send(STREAM, EVENT)
        more.wait(30)
        peer.reset()

    with upstream(script) as engine, proxied(engine.url) as proxy, proxy.connect() as client:
        client.ask("POST", "/v1/completions", body=b"{}")
        client.head()
        chunks = client.chunks()
        assert next(chunks) == b"data:"
        more.set()
        with pytest.raises(EOFError):
            next(chunks)


def test_a_stream_that_falls_silent_breaks_off() -> None:
    def script(peer: Peer) -> None:
        peer.request()
        peer.send(STREAM, EVENT)
        peer.is_left()

    _broken_off(script, silence_s=0.5)


@pytest.mark.parametrize("nonsense", [b"zz\r\nno size\r\n", b"5\r\nlonger than it says\r\n", b"-1\r\n\r\n"])
def test_nonsense_in_the_midst_of_a_stream_breaks_it_off(nonsense: bytes) -> None:
    arrived = threading.Event()

    def script(peer: Peer) -> None:
        peer.request()
        peer.send(STREAM, EVENT)
        arrived.wait(30)
        peer.send(nonsense)
        peer.is_left()

    with upstream(script) as engine, proxied(engine.url) as proxy, proxy.connect() as client:
        client.ask("POST", "/v1/completions", body=b"{}")
        client.head()
        chunks = client.chunks()
        assert next(chunks) == b"data:"
        arrived.set()
        with pytest.raises(EOFError):
            list(chunks)
        assert proxy.seen[0].error().startswith("upstream ")


def test_a_connection_closed_while_idle_costs_the_client_nothing() -> None:
    """The engine closes as the second request is on its way: what uvicorn's keep-alive timer does now and then."""
    seen: list[Request] = []

    def script(peer: Peer) -> None:
        first = peer.request()
        assert first is not None
        seen.append(first)
        peer.send(OK)
        if len(seen) == 1:
            again = peer.request()
            assert again is not None
            seen.append(again)

    with upstream(script) as engine, proxied(engine.url, limit=2**20) as proxy:
        assert [_asked(proxy)[0] for _ in range(2)] == [b"HTTP/1.1 200 OK"] * 2
        assert engine.connections == 2
        assert len(seen) == 3
        assert seen[1].body == seen[2].body == b"{}"


def test_a_reused_connection_that_breaks_amid_the_head_is_no_reason_to_ask_again() -> None:
    seen: list[Request | None] = []

    def script(peer: Peer) -> None:
        peer.request()
        peer.send(OK)
        seen.append(peer.request())
        peer.send(b"HTTP/1.1 200 OK\r\ncontent-")

    with upstream(script) as engine, proxied(engine.url, limit=2**20) as proxy:
        assert [_asked(proxy)[0] for _ in range(2)] == [b"HTTP/1.1 200 OK", b"HTTP/1.1 502 Bad Gateway"]
        assert len(seen) == 1
        assert engine.connections == 1


def test_connections_are_used_again() -> None:
    with upstream(answering(OK)) as engine, proxied(engine.url) as proxy:
        for _ in range(5):
            _asked(proxy)
        assert engine.connections == 1


def test_an_engine_that_restarts_is_served_again() -> None:
    with socket.create_server(("127.0.0.1", 0)) as first:
        port = first.getsockname()[1]

        def once() -> None:
            sock, _ = first.accept()
            with sock:
                peer = Peer(sock)
                peer.request()
                peer.send(STREAM, EVENT)
            first.close()

        thread = threading.Thread(target=once)
        thread.start()
        with proxied(f"http://127.0.0.1:{port}") as proxy:
            with proxy.connect() as client:
                client.ask("POST", "/v1/completions", body=b"{}")
                with pytest.raises(EOFError):
                    client.answer()
            thread.join(30)
            assert _asked(proxy)[0] == b"HTTP/1.1 502 Bad Gateway"
            with socket.create_server(("127.0.0.1", port)) as second:

                def again() -> None:
                    sock, _ = second.accept()
                    with sock:
                        answering(STREAM + chunked(b"back"))(Peer(sock))

                threading.Thread(target=again, daemon=True).start()
                assert _asked(proxy)[2] == b"back"


@pytest.mark.parametrize("stated", [True, False])
def test_a_body_too_large_is_answered_with_413(stated: bool) -> None:
    with upstream(answering(OK)) as engine, proxied(engine.url, limit=1000) as proxy, proxy.connect() as client:
        if stated:
            client.ask("POST", "/v1/completions", body=b"x" * 1001)
        else:
            client.ask("POST", "/v1/completions", "Transfer-Encoding: chunked")
            client.send(chunked(b"x" * 600, b"x" * 600))
        assert client.answer()[0].startswith(b"HTTP/1.1 413 ")
        assert engine.connections == 0
        assert _asked(proxy, b"x" * 1000)[0] == b"HTTP/1.1 200 OK"
