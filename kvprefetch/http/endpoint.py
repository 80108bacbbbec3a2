"""One POST endpoint: from the request's bytes to its answer.

Promises: nothing here blocks the event loop: parsing, rendering and the look-up run on a thread, and the answer is
followed without one. A client that goes away has its request cancelled at once. A status other than 200 is sent
wherever the request fails before its first token; later, the error is the stream's last event.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace

import anyio
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from kvprefetch.contexts import Context
from kvprefetch.engines.render import Renderer
from kvprefetch.errors import InvalidRequest, KVPrefetchError, PoolTooSmall
from kvprefetch.http.answer import EventStream, Form, Usage, Writer, streamed
from kvprefetch.http.ask import Ask
from kvprefetch.http.backend import Backend
from kvprefetch.http.body import parse_object, read_body
from kvprefetch.http.fields import Fields
from kvprefetch.http.follow import Follower, Relay
from kvprefetch.http.gate import Gate
from kvprefetch.http.metrics import Metrics
from kvprefetch.http.problems import response_to
from kvprefetch.http.warm import outcome_of, said_of
from kvprefetch.worker.hints import Prefetch
from kvprefetch.worker.request import Generation

_UNSAID = (1_024, 128, 16)  # tokens of an answer whose length nobody says: the most of these that fits
Read = Callable[[Fields, Headers, str, Renderer], Ask]


@dataclass
class Site:
    """What all endpoints share."""

    backend: Backend
    gate: Gate
    metrics: Metrics
    max_body_bytes: int
    _relay: Relay | None = None

    def relay(self) -> Relay:
        """From the worker to the loop that this runs on."""
        if self._relay is None:
            self._relay = Relay(asyncio.get_running_loop())
        return self._relay


class Endpoint:
    """An ASGI application. See the module's promises."""

    def __init__(self, site: Site, name: str, form: Form, read: Read) -> None:
        self.site, self.name, self.form, self.read = site, name, form, read

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        request, arrived = Request(scope, receive), time.monotonic()
        async with AsyncExitStack() as stack:
            try:
                response = await self._respond(request, arrived, stack)
            except (KVPrefetchError, HTTPException) as error:
                response = response_to(error)
            except ClientDisconnect:
                return
            self.site.metrics.requests.labels(self.name, str(response.status_code)).inc()
            await response(scope, receive, send)

    async def _respond(self, request: Request, arrived: float, stack: AsyncExitStack) -> Response:
        tenant = self.site.gate.tenant(request.headers.get("authorization", ""))
        body = await read_body(request, self.site.max_body_bytes)
        self.site.metrics.live.inc()
        stack.callback(self.site.metrics.live.dec)
        ask, work = await anyio.to_thread.run_sync(self._start, tenant, body, request.headers)
        await stack.enter_async_context(_cancelled_when_gone(request.receive, work.cancel))
        writer = Writer(self.form, self.site.backend.model, ask.include_usage)
        if isinstance(work, Prefetch):
            return await self._warmed(ask, work, writer)
        stack.callback(work.cancel)
        stack.callback(lambda: self.site.metrics.generated.inc(len(work.tokens)))
        return await self._answered(ask, work, writer, arrived)

    # -- on a thread -----------------------------------------------------------------------------------
    def _start(self, tenant: str, body: bytes, headers: Headers) -> tuple[Ask, Generation | Prefetch]:
        """Read the body and hand the request to the worker."""
        backend = self.site.backend
        try:
            ask = self.read(Fields(parse_object(body)), headers, backend.model, backend.renderer)
            return self._hint(ask, tenant) if ask.max_tokens == 0 else (ask, self._generate(ask, tenant))
        except RecursionError:
            raise InvalidRequest("the body is nested too deeply") from None

    def _generate(self, ask: Ask, tenant: str) -> Generation:
        lengths = _UNSAID if ask.max_tokens is None else (ask.max_tokens,)
        for length in lengths:
            try:
                return self.site.backend.as_tenant(tenant).generate(
                    ask.messages,
                    tools=ask.tools,
                    chat_template_kwargs=ask.chat_template_kwargs,
                    token_ids=ask.token_ids,
                    session=ask.session,
                    namespace=ask.namespace,
                    max_tokens=length,
                    **ask.sampling,
                )
            except PoolTooSmall:
                if length == lengths[-1]:
                    raise
        raise AssertionError("the last length raises")

    def _hint(self, ask: Ask, tenant: str) -> tuple[Ask, Prefetch]:
        """Have the exact prompt warmed."""
        backend, tokens = self.site.backend, list(ask.token_ids)
        if ask.messages:
            context = Context(ask.messages, ask.tools, ask.chat_template_kwargs)
            tokens = backend.renderer.prompt(context)
        backend.validate(tokens)
        ask = replace(ask, token_ids=tuple(tokens))
        exact = Context(token_ids=ask.token_ids, namespace=ask.namespace)
        return ask, backend.as_tenant(tenant).prefetch(exact, session=ask.session)

    # -- on the loop -----------------------------------------------------------------------------------
    async def _warmed(self, ask: Ask, hint: Prefetch, writer: Writer) -> Response:
        result = await outcome_of(hint)
        usage = Usage(len(ask.token_ids), 0, result.tokens if result else 0)
        writer.extra = said_of(result)
        if not ask.stream:
            return JSONResponse(writer.whole("", "length", usage))
        return EventStream(_only(writer.chunks([], "length") + writer.last(usage)))

    async def _answered(self, ask: Ask, generation: Generation, writer: Writer, arrived: float) -> Response:
        follower = Follower(generation, self.site.relay())
        first = _, ended = await follower.batch()
        self.site.metrics.first_token(generation, time.monotonic() - arrived)
        if ask.stream:
            return EventStream(
                streamed(writer, first, follower, lambda: _reason(generation), lambda: _usage(generation))
            )
        while not ended:
            _, ended = await follower.batch()
        return JSONResponse(writer.whole(generation.text, _reason(generation), _usage(generation)))


@asynccontextmanager
async def _cancelled_when_gone(receive: Receive, cancel: Callable[[], None]) -> AsyncIterator[None]:
    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()


async def _only(chunk: bytes) -> AsyncIterator[bytes]:
    yield chunk


def _reason(generation: Generation) -> str:
    return generation.finish_reason.value if generation.finish_reason else "stop"


def _usage(generation: Generation) -> Usage:
    cached = generation.reused_tokens + generation.loaded_tokens
    return Usage(generation.prompt_tokens, len(generation.tokens), cached)
