"""POST to a dialect's path: read, given a session and a place, passed on, learnt from. And prewarm requests, answered.

A body that cannot be read is passed on as it is: the engine is the one to complain. But where engines keep tenants
apart by salt, nothing goes without one: what can be read loosely is salted, and the rest refused.
"""

import asyncio
import time
import uuid
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from kvprefetch.contexts import unqualified
from kvprefetch.errors import InvalidRequest, KVPrefetchError, ServiceUnavailable
from kvprefetch.gateway.contract import Asked, Dialect, Warmed
from kvprefetch.gateway.engines.answers import decoded
from kvprefetch.gateway.hints import Hint, Hints
from kvprefetch.gateway.link import RawHeaders
from kvprefetch.gateway.placement import choose
from kvprefetch.gateway.proxy import Message, Receive, Scope, Send, forward, read_body
from kvprefetch.gateway.site import Site, kept_headers, prepared
from kvprefetch.gateway.turn import Turn
from kvprefetch.gateway.upstream import Upstream
from kvprefetch.gateway.wire import error_answer, prewarm_answer, read_loosely, read_request, request_draft
from kvprefetch.gateway.wire.fields import text
from kvprefetch.http.ask import SESSION_HEADER
from kvprefetch.http.problems import status_of

_LONG = 64 * 2**10  # bytes whose reading is left to a thread
_SPACE = 256  # bytes; white space before a body's end is hardly longer
_LONGEST_NAME = 256
REASON = b"x-kvprefetch-reason"


class Traffic:
    """An ASGI application for one dialect. See the module's promises."""

    def __init__(self, site: Site, hints: Hints, dialect: Dialect) -> None:
        self.site, self.hints, self.dialect = site, hints, dialect

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        try:
            tenant = self.site.gate.tenant_of(Headers(scope=scope))
            body = await read_body(scope, receive, self.site.settings.gateway.max_body_bytes)
            asked = await self._read(body)
        except ClientDisconnect:
            return
        except (KVPrefetchError, HTTPException) as error:
            await self._refuse(error)(scope, receive, send)
            return
        named = Headers(scope=scope).get(SESSION_HEADER, "")[:_LONGEST_NAME]
        if asked is None:
            await self._pass_on(scope, receive, send, body)
        elif asked.prewarm:
            await self._prewarm(scope, receive, send, asked, tenant, named)
        else:
            await self._serve(scope, receive, send, asked, body, tenant, named)

    # -- within ----------------------------------------------------------------------------------------
    async def _read(self, body: bytes) -> Asked | None:
        """None where it is to be passed on unread. Raises InvalidRequest where that must not be."""
        try:
            return await self._read_by(read_request, body)
        except InvalidRequest:
            if not self.site.may_salt:
                return None
        return await self._read_by(read_loosely, body)

    async def _read_by(self, reader: Callable[[Dialect, bytes], Asked], body: bytes) -> Asked:
        if len(body) > _LONG:
            return await asyncio.to_thread(reader, self.dialect, body)
        return reader(self.dialect, body)

    async def _serve(
        self, scope: Scope, receive: Receive, send: Send, asked: Asked, body: bytes, tenant: str, named: str
    ) -> None:
        try:
            turn = await self.site.begin(tenant, asked, named, scope["headers"])
        except ServiceUnavailable as error:
            await self._refuse(error)(scope, receive, send)
            return
        await forward(
            scope,
            receive,
            send,
            turn.upstream.link,
            headers=self._headers(scope, turn, named),
            body=salted(body, turn.salt) if turn.salt != asked.salt else body,
            watch=turn,
            error_answer=self._error,
        )

    def _headers(self, scope: Scope, turn: Turn, named: str) -> RawHeaders:
        """As they came; one of our own workers is told the session, too, by a name that no other gateway gives."""
        headers: RawHeaders = scope["headers"]
        engine = turn.upstream.engine
        if named or engine is None or engine.traits.kind != "kvprefetch":
            return headers
        session = f"~{self.site.mark}{unqualified(turn.talk.session)}"
        return [*headers, (SESSION_HEADER.encode(), session.encode())]

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send, body: bytes) -> None:
        upstream = choose(self.site.upstreams, "")
        await forward(
            scope,
            receive,
            send,
            upstream.link,
            headers=scope["headers"],
            body=body,
            watch=Passing(upstream, is_live=True),
            error_answer=self._error,
            extra_headers=[(REASON, b"the body was not read")],
        )

    async def _prewarm(self, scope: Scope, receive: Receive, send: Send, asked: Asked, tenant: str, named: str) -> None:
        draft = request_draft(asked)
        if draft is None:
            await self._refuse(InvalidRequest("there is no one prompt here that could be warmed"))(scope, receive, send)
            return
        draft = prepared(draft, kept_headers(scope["headers"]), asked.salt)
        try:
            hint = await self.hints.prefetch(tenant, draft, named)
        except ServiceUnavailable as error:
            await self._refuse(error)(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self.site.settings.gateway.patience_s):
                if not await _done_before_the_client_leaves(hint, receive):
                    self.hints.cancel(hint)
                    return
        except TimeoutError:
            pass  # it lives on
        kind, body = prewarm_answer(asked, self._warmed(hint), time.time(), uuid.uuid4().hex)
        await Response(body, 200, media_type=kind)(scope, receive, send)

    def _warmed(self, hint: Hint) -> Warmed:
        total, result = hint.prompt_tokens, hint.result
        if result is None:
            reason = "the engine is busy; it will be warmed when it is idle"
            return Warmed("pending", total, hint.job.warm if hint.job else 0, hint.hold_s, reason)
        return Warmed(result.outcome.value, total, hint.tokens, hint.hold_s if hint.tokens else 0.0, result.reason)

    def _error(self, status: int, message: str) -> bytes:
        return error_answer(self.dialect, status, message)

    def _refuse(self, error: KVPrefetchError | HTTPException) -> Response:
        status = status_of(error)
        message = str(error.detail) if isinstance(error, HTTPException) else str(error)
        headers = {REASON.decode(): message} if isinstance(error, ServiceUnavailable) else {}
        return Response(self._error(status, message), status, headers, media_type="application/json")


class Passing:
    """Of an exchange from which nothing is learnt, but that warming makes way for it while it `is_live`."""

    def __init__(self, upstream: Upstream, *, is_live: bool) -> None:
        self.upstream, self._is_live = upstream, False
        if is_live:
            self.sent()

    def sent(self) -> None:
        """The engine has all of it to work on."""
        if not self._is_live:
            self._is_live = True
            self.upstream.warmer.live_began()

    def heard(self, receive: Receive) -> Receive:
        """The client's end of it, which is live once all of its body has come: a client may never send it."""

        async def message() -> Message:
            heard = await receive()
            if heard["type"] == "http.request" and not heard.get("more_body", False):
                self.sent()
            return heard

        return message

    def began(self, status: int, headers: object) -> None:
        """Nothing."""

    def chunk(self, data: bytes) -> None:
        """Nothing."""

    def ended(self, error: str | None) -> None:
        """It is over."""
        if self._is_live:
            self.upstream.warmer.live_ended()


class Making(Passing):
    """The same of one that has the engine make what it keeps; `made` is told its id."""

    def __init__(self, upstream: Upstream, made: Callable[[str], None]) -> None:
        super().__init__(upstream, is_live=False)
        self._made, self._raw = made, b""

    def chunk(self, data: bytes) -> None:
        """A part of the answer; of a long one the beginning is kept, which is no JSON."""
        if len(self._raw) < _LONG:
            self._raw += data

    def ended(self, error: str | None) -> None:
        """It is over."""
        super().ended(error)
        self._made(text(decoded(self._raw).get("id")))


def salted(body: bytes, salt: str) -> bytes:
    """The JSON object with its `cache_salt` said last, so that it counts; every other byte as it was."""
    end = body.rindex(b"}")
    before = body[max(end - _SPACE, 0) : end].rstrip() or body[:end].rstrip()
    comma = b"" if before.endswith(b"{") else b","
    return b"".join((memoryview(body)[:end], comma, b'"cache_salt":"%b"' % salt.encode(), body[end:]))


async def _done_before_the_client_leaves(hint: Hint, receive: Receive) -> bool:
    async def leaves() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    done, left = asyncio.ensure_future(hint.done.wait()), asyncio.ensure_future(leaves())
    try:
        await asyncio.wait([done, left], return_when=asyncio.FIRST_COMPLETED)
        return hint.done.is_set()
    finally:
        done.cancel()
        left.cancel()
