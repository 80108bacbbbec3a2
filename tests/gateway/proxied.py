"""The proxy alone, before one upstream, on a real server; and a client that sees every byte."""

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from raw_upstream import PATIENCE_S, Peer

from kvprefetch.gateway.link import RawHeaders, UpstreamLink, open_links
from kvprefetch.gateway.proxy import PassThrough, Receive, Scope, Send, forward, read_body
from kvprefetch.settings import GatewaySettings, UpstreamSettings

WHOLE = "whole"  # what `Seen.error` says of an exchange that came to its end


@dataclass
class Seen:
    """What the watcher of one exchange was told."""

    status: int = 0
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    chunks: list[bytes] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def began(self, status: int, headers: RawHeaders) -> None:
        self.status, self.headers = status, list(headers)

    def chunk(self, data: bytes) -> None:
        self.chunks.append(data)

    def ended(self, error: str | None) -> None:
        self.ends.append(error or WHOLE)
        self.over.set()

    def error(self) -> str:
        """How it ended; waits until it has."""
        assert self.over.wait(PATIENCE_S), "the exchange does not end"
        assert len(self.ends) == 1
        return self.ends[0]


@dataclass
class Proxied:
    """The running proxy, and what its watchers were told, exchange by exchange."""

    port: int
    seen: list[Seen] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self, receive_buffer: int = 0) -> "Caller":
        """A connection of a client."""
        return Caller(self.port, receive_buffer)

    def watch(self) -> Seen:
        self.seen.append(Seen())
        return self.seen[-1]


class Caller(Peer):
    """A client's end of one connection to the proxy."""

    def __init__(self, port: int, receive_buffer: int = 0) -> None:
        sock = socket.socket()
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.settimeout(PATIENCE_S)
        sock.connect(("127.0.0.1", port))
        super().__init__(sock)

    def __enter__(self) -> "Caller":
        return self

    def __exit__(self, *exception: object) -> None:
        self.sock.close()

    def ask(self, method: str, path: str, *headers: str, body: bytes = b"") -> None:
        """Send a request; a body of known length."""
        fields = ["Host: proxy", *headers, *([f"Content-Length: {len(body)}"] if body else [])]
        self.send("\r\n".join([f"{method} {path} HTTP/1.1", *fields, "", ""]).encode() + body)

    def head(self) -> tuple[bytes, list[tuple[bytes, bytes]]]:
        """The status line and headers of an answer."""
        answer = self.request(body=False)
        assert answer is not None, "closed without an answer"
        return answer.line, answer.headers

    def answer(self) -> tuple[bytes, list[tuple[bytes, bytes]], bytes]:
        """A whole answer that has a body. Raises EOFError where it breaks off."""
        answer = self.request()
        assert answer is not None, "closed without an answer"
        return answer.line, answer.headers, answer.body


@contextmanager
def proxied(url: str, *, limit: int = 0, api_key: str = "", **changes: Any) -> Iterator[Proxied]:
    """The proxy before `url`. With a `limit` it reads each body whole before it passes it on."""
    settings = GatewaySettings(upstreams=(UpstreamSettings(url, api_key=api_key),), **changes)
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    running = Proxied(listener.getsockname()[1])
    started, servers = threading.Event(), []

    async def serve() -> None:
        async with open_links(settings) as links:
            through = PassThrough(links[0], error_answer, running.watch)
            app = _reading_first(links[0], limit, running) if limit else through
            config = uvicorn.Config(app, lifespan="off", ws="none", log_config=None, server_header=False)
            config.date_header, config.timeout_graceful_shutdown = False, 1
            servers.append(uvicorn.Server(config))
            asyncio.get_running_loop().call_soon(started.set)
            await servers[0].serve(sockets=[listener])

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert started.wait(PATIENCE_S)
        yield running
    finally:
        servers[0].should_exit = True
        thread.join(PATIENCE_S)
    assert not thread.is_alive(), "the proxy does not end"
    assert all(len(seen.ends) == 1 for seen in running.seen), "each exchange ends once"


def error_answer(status: int, message: str) -> bytes:
    return json.dumps({"error": {"message": message, "code": status}}).encode()


def _reading_first(link: UpstreamLink, limit: int, running: Proxied) -> Any:
    from starlette.exceptions import HTTPException
    from starlette.responses import PlainTextResponse

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await read_body(scope, receive, limit)
        except HTTPException as error:
            await PlainTextResponse(error.detail, error.status_code)(scope, receive, send)
            return
        await forward(
            scope,
            receive,
            send,
            link,
            headers=scope["headers"],
            body=body,
            watch=running.watch(),
            error_answer=error_answer,
            extra_headers=[(b"x-ours", b"1")],
        )

    return app
