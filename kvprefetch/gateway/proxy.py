"""One HTTP exchange passed on to an engine, and its answer back: plain ASGI, byte for byte.

Promises: status, headers (duplicates too) and body are the engine's own, but for the headers that belong to one
connection (RFC 9110, 7.6.1). What has come is passed on at once, never unpacked; a slow client slows the engine, and
little is held in between; one that reads nothing for longer than an engine may be silent is given up. A client that
leaves closes the engine's connection, whatever it is doing. An answer that breaks off breaks the client's connection
too: it never looks complete. The reason phrase alone is the server's, as ASGI has no word for it.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping, Sequence
from types import TracebackType
from typing import Any, Protocol

import aiohttp
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from kvprefetch.errors import InvalidRequest, UpstreamError
from kvprefetch.gateway.link import Body, RawHeaders, UpstreamLink

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ErrorAnswer = Callable[[int, str], bytes]

_OF_ONE_HOP = frozenset((b"connection", b"keep-alive", b"te", b"trailer", b"transfer-encoding", b"upgrade"))
_NO_HEADER = re.compile(rb"[^!#$%&'*+\-.^_`|~0-9A-Za-z]"), re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_WITHOUT_LENGTH = (204, 304)  # whose length, if they state one, is not that of what follows


class Watcher(Protocol):
    """Who follows an exchange. Its calls are made in the midst of it, and must be cheap."""

    def began(self, status: int, headers: RawHeaders) -> None:
        """The engine's head has come; not called where it never did."""

    def chunk(self, data: bytes) -> None:
        """A part of the engine's body, as it is passed on."""

    def ended(self, error: str | None) -> None:
        """Called once, last. None: complete; "client left" or "client does not read"; "upstream …"; "gateway stopped";
        "refused: …"."""


async def forward(
    scope: Scope,
    receive: Receive,
    send: Send,
    link: UpstreamLink,
    *,
    headers: RawHeaders,
    body: bytes | None,
    watch: Watcher,
    error_answer: ErrorAnswer,
    extra_headers: RawHeaders = (),
) -> None:
    """Ask the engine what the client asks, and answer what it answers.

    `body` is what has been read already; None: it is still to come, and is passed on as it comes. An engine that
    cannot be reached, is too slow or talks nonsense is answered for by `error_answer(status, message)`: 502 or 504.
    """
    ended: str | None = "gateway stopped"
    try:
        with _Client(receive) as client:
            exchange = _Exchange(client, scope, _within(send, link.patience_s), watch, extra_headers)
            try:
                await exchange.run(link, passed_on(headers), body)
                ended = None
            except UpstreamError as error:
                ended = f"upstream {error}"
                await exchange.fail(504 if isinstance(error.__cause__, TimeoutError) else 502, ended, error_answer)
            except InvalidRequest as error:
                ended = f"refused: {error}"
                await exchange.fail(400, str(error), error_answer)
        if client.has_left:
            ended = "client left"
    except ClientDisconnect:  # the server breaks the connection, as its answer is unfinished
        ended = "client does not read"
    finally:
        watch.ended(ended)


async def read_body(scope: Scope, receive: Receive, limit: int) -> bytes:
    """The whole body. Raises starlette's HTTPException (413) if it is larger, ClientDisconnect if it never ends."""
    too_large = HTTPException(413, f"the body is larger than {limit} bytes (gateway.max_body_bytes)")
    if any(name == b"content-length" and int(value) > limit for name, value in scope["headers"]):
        raise too_large
    pieces, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        piece = message.get("body", b"")
        size += len(piece)
        if size > limit:
            raise too_large
        pieces.append(piece)
        more = message.get("more_body", False)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def passed_on(headers: RawHeaders) -> list[tuple[bytes, bytes]]:
    """What of a message's headers is for the other end, names in lower case."""
    lowered = [(name.lower(), value) for name, value in headers]
    of_hop: set[bytes] | frozenset[bytes] = _OF_ONE_HOP
    for name, value in lowered:
        if name == b"connection":
            of_hop = of_hop | {token.strip().lower() for token in value.split(b",")}
    return [pair for pair in lowered if pair[0] not in of_hop and not pair[0].startswith(b"proxy-")]


async def refuse_websocket(receive: Receive, send: Send) -> None:
    """No engine speaks it on these paths; a close before the handshake is a 403."""
    await receive()
    await send({"type": "websocket.close", "code": 1008, "reason": "no WebSockets here"})


class PassThrough:
    """An ASGI application that passes everything on to one upstream."""

    def __init__(self, link: UpstreamLink, error_answer: ErrorAnswer, watch: Callable[[], Watcher]) -> None:
        self._link, self._error_answer, self._watch = link, error_answer, watch

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await refuse_websocket(receive, send)
        else:
            await forward(
                scope,
                receive,
                send,
                self._link,
                headers=scope["headers"],
                body=None,
                watch=self._watch(),
                error_answer=self._error_answer,
            )


class _Client:
    """The client of one exchange: what it still sends, and whether it is there. If it leaves, the task is cancelled.

    To be entered in the task of the exchange; the cancellation ends where it is left.
    """

    def __init__(self, receive: Receive) -> None:
        self.has_left = False
        self._receive, self._served = receive, False
        self._listener: asyncio.Task[None] | None = None

    def __enter__(self) -> "_Client":
        task = asyncio.current_task()
        assert task is not None
        self._task, self._cancelled_before = task, task.cancelling()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> bool:
        if self._listener is not None:
            self._listener.cancel()
        if not self.has_left:
            return False
        return self._task.uncancel() <= self._cancelled_before and isinstance(error, asyncio.CancelledError)

    def listen(self) -> None:
        """Nothing more is to come but its leaving."""
        self._listener = asyncio.create_task(self._wait())

    def serve_last(self) -> None:
        """The last part of its answer is going out: from now on it may go."""
        self._served = True

    async def upload(self) -> AsyncIterator[bytes]:
        """The body as it comes; not ended where the client leaves."""
        more = True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self._leave()
                raise ConnectionResetError("client left")
            more = message.get("more_body", False)
            if piece := message.get("body", b""):
                yield piece
        self.listen()

    async def _wait(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._leave()

    def _leave(self) -> None:
        if not self._served:
            self.has_left = True
            self._task.cancel()


class _Exchange:
    """The answer of one exchange, on its way to the client."""

    def __init__(self, client: _Client, scope: Scope, send: Send, watch: Watcher, extra_headers: RawHeaders) -> None:
        self._client, self._scope, self._send, self._watch = client, scope, send, watch
        self._extra_headers, self._has_begun = extra_headers, False

    async def run(self, link: UpstreamLink, headers: RawHeaders, body: bytes | None) -> None:
        """Raises UpstreamError, and InvalidRequest for what cannot be sent."""
        sent = [pair for pair in headers if pair[0] != b"expect"]  # the server has answered it already
        content: Body = body
        if body is None and _has_body(self._scope["headers"]):
            content = self._client.upload()
        else:
            self._client.listen()
        async with link.stream(self._scope["method"], _path(self._scope), sent, content) as answer:
            await self._begin(answer)
            read, send, watch = answer.content.readany, self._send, self._watch
            while data := await read():
                watch.chunk(data)
                await send({"type": "http.response.body", "body": data, "more_body": True})
        await self._finish(b"")

    async def fail(self, status: int, message: str, error_answer: ErrorAnswer) -> None:
        """Tell the client. If the answer has begun, it is left unfinished: the server breaks the connection then."""
        if self._has_begun:
            return
        body = error_answer(status, message)
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"x-kvprefetch-reason", message.encode()),
            *self._extra_headers,
        ]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        await self._finish(body)

    async def _finish(self, body: bytes) -> None:
        self._client.serve_last()
        await self._send({"type": "http.response.body", "body": body})

    async def _begin(self, answer: aiohttp.ClientResponse) -> None:
        status, headers = answer.status, passed_on(answer.raw_headers)
        _check_head(status, headers)
        if status in _WITHOUT_LENGTH:
            headers = [pair for pair in headers if pair[0] != b"content-length"]
        self._watch.began(status, headers)
        self._has_begun = True
        await self._send({"type": "http.response.start", "status": status, "headers": [*headers, *self._extra_headers]})


def _within(send: Send, limit_s: float) -> Send:
    """To a client that reads; raises ClientDisconnect for another."""

    async def sent(message: Message) -> None:
        try:
            async with asyncio.timeout(limit_s):
                await send(message)
        except TimeoutError:
            raise ClientDisconnect from None

    return sent


def _path(scope: Scope) -> str:
    path: bytes = scope["raw_path"]
    if query := scope["query_string"]:
        path = path + b"?" + query
    try:
        return path.decode()
    except UnicodeDecodeError:
        raise InvalidRequest("the path is not UTF-8") from None


def _has_body(headers: RawHeaders) -> bool:
    return any(name in (b"content-length", b"transfer-encoding") for name, _ in headers)


def _check_head(status: int, headers: Sequence[tuple[bytes, bytes]]) -> None:
    """What no server can send on."""
    no_name, no_value = _NO_HEADER
    if not 200 <= status < 600 or any(no_name.search(name) or no_value.search(value) for name, value in headers):
        raise UpstreamError("does not answer in HTTP")
