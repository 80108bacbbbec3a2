"""The way to an engine behind the gateway, over one shared pool of connections.

Promises: bytes go and come as they are: nothing is unpacked, redirected, remembered or added. What fails is an
UpstreamError with a short reason, whose cause is a TimeoutError where the engine took too long. A connection that the
engine closed while it was idle is not an error: the request is sent once more, over a new one. Leaving `stream` before
its end, or being cancelled, closes the connection at once. One event loop; nothing here blocks it.
"""

import asyncio
import io
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import aiohttp
from yarl import URL

from kvprefetch.errors import InvalidRequest, UpstreamError, UpstreamGone
from kvprefetch.gateway.contract import Headers
from kvprefetch.settings import GatewaySettings, UpstreamSettings

RawHeaders = Sequence[tuple[bytes, bytes]]
Body = bytes | AsyncIterator[bytes] | None

_MOST_BYTES = 64 * 2**20  # of an answer that is kept whole
_MOST_HEADER_BYTES, _MOST_HEADERS = 64 * 2**10, 256
_READ_AHEAD_BYTES = 64 * 2**10
_IDLE_S = 4.0  # engines on uvicorn close an idle connection after 5
_PIECEWISE_FROM = 2**20  # larger bodies are written piece by piece
_AUTOMATIC = ("Accept", "Accept-Encoding", "User-Agent", "Content-Type")
_NOT_COPIED = frozenset(
    ("accept-encoding", "connection", "content-encoding", "content-type", "expect", "te", "upgrade")
)
_SET_HERE = (b"host", b"content-length", b"transfer-encoding")


@dataclass
class _Attempt:
    """One try of a request."""

    reused: bool = False  # over a connection that had served another request


@dataclass(frozen=True)
class _Sessions:
    """`pooled` reuses connections; `fresh` makes a new one each time."""

    pooled: aiohttp.ClientSession
    fresh: aiohttp.ClientSession


class UpstreamLink:
    """A way to one upstream; a `Link` of the contract. Made by `open_links`."""

    def __init__(self, settings: UpstreamSettings, sessions: _Sessions, limits: GatewaySettings) -> None:
        self._base = settings.url.rstrip("/").removesuffix("/v1")
        self.url = _without_password(self._base)  # it is shown to many
        self._sessions, self._limits = sessions, limits
        self.patience_s = limits.connect_s + limits.silence_s  # an exchange may stand still so long, at either end
        self._authorization = f"Bearer {settings.api_key}" if settings.api_key else ""

    def beside(self, url: str) -> "UpstreamLink":
        """To another server that belongs to this one; without its key."""
        return UpstreamLink(UpstreamSettings(url), self._sessions, self._limits)

    async def get(self, path: str, *, timeout_s: float = 5.0) -> tuple[int, bytes]:
        """Status and body, at most 64 MiB of it."""
        return await self._whole("GET", path, (), None, timeout_s)

    async def post(
        self, path: str, body: bytes, *, headers: Mapping[str, str] | Headers = (), timeout_s: float = 60.0
    ) -> tuple[int, bytes]:
        """The same, of JSON. A cancelled call closes the connection at once."""
        pairs = headers.items() if isinstance(headers, Mapping) else headers
        kept = [pair for pair in pairs if pair[0].lower() not in _NOT_COPIED]
        copied = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in kept]  # as they were decoded
        return await self._whole("POST", path, [*copied, (b"content-type", b"application/json")], body, timeout_s)

    @asynccontextmanager
    async def stream(
        self, method: str, path: str, headers: RawHeaders, body: Body
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The answer as soon as its head is there; its content is read within.

        `path` has the query. Of `headers` Host is replaced, as is the length where `body` is bytes. Raises
        UpstreamError, also where the content is read, and InvalidRequest for a path or header that cannot be sent.
        """
        url, sent = self._address(path), self._headers(headers, body)
        answer: aiohttp.ClientResponse | None = None
        try:
            answer = await self._ask(method, url, sent, body)
            with _breaking_off(answer):
                yield answer
        except (aiohttp.ClientError, TimeoutError) as error:
            raise _said(error) from error
        finally:
            if answer is not None:
                answer.close()  # nothing where it was read to its end

    async def _ask(self, method: str, url: URL, headers: list[tuple[str, str]], body: Body) -> aiohttp.ClientResponse:
        attempt = _Attempt()
        try:
            return await self._try(self._sessions.pooled, attempt, method, url, headers, body)
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
            repeatable = attempt.reused and (body is None or isinstance(body, bytes))
            if not repeatable or not _is_unanswered(error):
                raise
        return await self._try(self._sessions.fresh, attempt, method, url, headers, body)

    async def _try(
        self,
        session: aiohttp.ClientSession,
        attempt: _Attempt,
        method: str,
        url: URL,
        headers: list[tuple[str, str]],
        body: Body,
    ) -> aiohttp.ClientResponse:
        if session.closed:
            raise UpstreamError("the gateway is closing")
        data = io.BytesIO(body) if isinstance(body, bytes) and len(body) > _PIECEWISE_FROM else body
        # aiohttp's own time runs from when the body is sent, which an engine that reads nothing would keep it from
        async with asyncio.timeout(self.patience_s if isinstance(body, bytes) else None):
            return await session.request(
                method, url, headers=headers, data=data or None, allow_redirects=False, trace_request_ctx=attempt
            )

    async def _whole(
        self, method: str, path: str, headers: RawHeaders, body: bytes | None, timeout_s: float
    ) -> tuple[int, bytes]:
        content = bytearray()
        try:
            async with asyncio.timeout(timeout_s), self.stream(method, path, headers, body) as answer:
                while piece := await answer.content.readany():
                    content += piece
                    if len(content) > _MOST_BYTES:
                        raise UpstreamError(f"answers with more than {_MOST_BYTES} bytes")
                return answer.status, bytes(content)
        except TimeoutError as error:
            raise UpstreamError(f"does not answer within {timeout_s:g} s") from error

    def _address(self, path: str) -> URL:
        if not path.startswith("/"):  # it must not become a part of the host's name
            raise InvalidRequest("the path must begin with /")
        return URL(self._base + path, encoded=True)

    def _headers(self, headers: RawHeaders, body: Body) -> list[tuple[str, str]]:
        try:
            sent = [(name.decode(), value.decode()) for name, value in headers if name.lower() not in _SET_HERE]
        except UnicodeDecodeError:
            raise InvalidRequest("a header is not UTF-8") from None
        if self._authorization:
            sent = [pair for pair in sent if pair[0].lower() not in ("authorization", "x-api-key")]
            sent.append(("Authorization", self._authorization))
        length = next((value for name, value in headers if name.lower() == b"content-length"), None)
        if isinstance(body, bytes):
            if body or length is not None:
                sent.append(("Content-Length", str(len(body))))
        elif length is not None:
            sent.append(("Content-Length", length.decode()))
        return sent


@asynccontextmanager
async def open_links(settings: GatewaySettings) -> AsyncIterator[list[UpstreamLink]]:
    """A link to each upstream of the settings, in their order; connections are closed at the end."""
    async with _session(settings, reuse=True) as pooled, _session(settings, reuse=False) as fresh:
        sessions = _Sessions(pooled, fresh)
        yield [UpstreamLink(upstream, sessions, settings) for upstream in settings.upstreams]


def _session(settings: GatewaySettings, *, reuse: bool) -> aiohttp.ClientSession:
    connector = (
        aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE_S)
        if reuse
        else aiohttp.TCPConnector(limit=0, force_close=True)
    )
    tracing = aiohttp.TraceConfig()
    tracing.on_connection_reuseconn.append(_note_reuse)
    return aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        skip_auto_headers=_AUTOMATIC,
        auto_decompress=False,
        timeout=aiohttp.ClientTimeout(total=None, connect=settings.connect_s, sock_read=settings.silence_s),
        read_bufsize=_READ_AHEAD_BYTES,
        max_line_size=_MOST_HEADER_BYTES,
        max_field_size=_MOST_HEADER_BYTES,
        max_headers=_MOST_HEADERS,
        trace_configs=[tracing],
    )


async def _note_reuse(
    session: aiohttp.ClientSession, context: SimpleNamespace, event: aiohttp.TraceConnectionReuseconnParams
) -> None:
    context.trace_request_ctx.reused = True


@contextmanager
def _breaking_off(answer: aiohttp.ClientResponse) -> Iterator[None]:
    """See to it that who reads learns of the connection's end.

    aiohttp closes a connection that brings nonsense in the midst of a body, but leaves its reader waiting.
    """

    def tell(_: object) -> None:
        if not answer.content.is_eof() and answer.content.exception() is None:
            answer.content.set_exception(aiohttp.ClientPayloadError())

    protocol = answer.connection.protocol if answer.connection is not None else None
    closed = protocol.closed if protocol is not None else None
    if closed is None:
        tell(None)  # already closed; nothing, where the whole answer is there
        yield
        return
    closed.remove_done_callback(_look)  # that of the connection's earlier exchanges
    closed.add_done_callback(_look)
    closed.add_done_callback(tell)
    try:
        yield
    finally:
        closed.remove_done_callback(tell)


def _look(closed: asyncio.Future[None]) -> None:
    """asyncio complains of errors that nobody has looked at; how an idle connection ended is of no interest."""
    if not closed.cancelled():
        closed.exception()


def _without_password(url: str) -> str:
    scheme, slashes, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{slashes}{host.rpartition('@')[2]}{slash}{path}"


def _is_unanswered(error: aiohttp.ClientError) -> bool:
    """Whether not a byte of an answer came; else the message is the head as far as it came."""
    return not isinstance(error, aiohttp.ServerDisconnectedError) or isinstance(error.message, str)


def _said(error: BaseException) -> UpstreamError:
    """In a few words, which hold nothing of the engine's answer."""
    for kind, said, words in _REASONS:
        if isinstance(error, kind):
            return said(words)
    return UpstreamGone("broke the connection")


_REASONS: Iterable[tuple[type[BaseException], type[UpstreamError], str]] = (  # the first that fits
    (aiohttp.ConnectionTimeoutError, UpstreamGone, "does not take a connection in time"),
    (aiohttp.ClientSSLError, UpstreamGone, "TLS failed"),
    (aiohttp.ClientConnectorError, UpstreamGone, "cannot be reached"),
    (TimeoutError, UpstreamError, "was silent for too long"),
    (aiohttp.ServerDisconnectedError, UpstreamGone, "closed the connection before its answer was there"),
    (aiohttp.ClientResponseError, UpstreamError, "does not answer in HTTP"),
    (aiohttp.ClientPayloadError, UpstreamError, "broke off in the midst of its answer"),
)
