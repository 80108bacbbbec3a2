"""What happens around every RPC: the caller is told, refused or counted, and errors become status codes.

Promises
- Handlers raise the errors of `kvprefetch.errors`; here they become a status code with the error's own line. What else
  they raise is logged with its traceback and told as INTERNAL, without particulars.
- While draining, nothing new begins, except what tells how things are (`Health`, `Admin.Stats`).
- `in_flight` counts the calls being answered, without those that last as long as a client wants (`ENDLESS`).
"""

import asyncio
import inspect
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from kvprefetch import errors
from kvprefetch.service.auth import Gate, certificate_names, set_caller

log = logging.getLogger(__name__)
Context = grpc.aio.ServicerContext[Any, Any]

ENDLESS = frozenset(
    {
        "/kvprefetch.v1.Workers/Work",
        "/kvprefetch.v1.Hints/Prefetch",
        "/grpc.health.v1.Health/Watch",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    }
)
_WHILE_DRAINING = frozenset(
    {
        "/kvprefetch.v1.Admin/Stats",
        "/kvprefetch.v1.Admin/Drain",
        "/grpc.health.v1.Health/Check",
        "/grpc.health.v1.Health/Watch",
    }
)
_CODES: tuple[tuple[type[Exception], grpc.StatusCode], ...] = (
    (errors.InvalidRequest, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.Unauthenticated, grpc.StatusCode.UNAUTHENTICATED),
    (errors.PermissionDenied, grpc.StatusCode.PERMISSION_DENIED),
    (errors.UnknownContext, grpc.StatusCode.NOT_FOUND),
    (errors.UnknownModel, grpc.StatusCode.NOT_FOUND),
    (errors.LimitExceeded, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.ArenaRefused, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.AccountingError, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.SettingsError, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.ServiceUnavailable, grpc.StatusCode.UNAVAILABLE),
    (errors.TierUnavailable, grpc.StatusCode.UNAVAILABLE),
    (errors.Closed, grpc.StatusCode.UNAVAILABLE),
)


def status_of(error: errors.KVPrefetchError) -> grpc.StatusCode:
    """The standard code that says the same."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), grpc.StatusCode.INTERNAL)


@dataclass(frozen=True, slots=True)
class Unreadable:
    """In place of a message whose bytes are none; a handler of single messages never sees it."""

    why: str


class Calls(grpc.aio.ServerInterceptor):
    """See the module's promises. One for a server; used from its event loop alone."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._wrapped: dict[str, Any] = {}  # handlers by method: only registered ones, so it is bounded
        self._running: Counter[str] = Counter()
        self._idle = asyncio.Event()
        self._idle.set()
        self.is_draining = False
        self.refused: Counter[str] = Counter()  # calls by status code

    @property
    def in_flight(self) -> int:
        """Calls being answered, without endless ones."""
        return sum(n for method, n in self._running.items() if method not in ENDLESS)

    async def wait_idle(self) -> None:
        """Until nothing is in flight."""
        await self._idle.wait()

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        """gRPC's way in. A method that nobody registered is UNIMPLEMENTED."""
        wrapped = self._wrapped.get(details.method)
        if wrapped is None:
            handler = await continuation(details)
            if handler is None:
                return None
            wrapped = self._wrapped[details.method] = self._wrap(handler, details.method)
        return wrapped

    # -- within ----------------------------------------------------------------------------------------
    def _wrap(self, handler: Any, method: str) -> Any:
        """The same handler with all that in front of it."""
        inner = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        outer = self._stream(inner, method) if inspect.isasyncgenfunction(inner) else self._single(inner, method)
        kind = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }[handler.request_streaming, handler.response_streaming]
        parse = handler.request_deserializer
        read = _reader(parse) if method.startswith("/kvprefetch.") else parse  # of gRPC's own services, as it is
        return kind(outer, read, handler.response_serializer)

    def _single(self, inner: Callable[[Any, Context], Awaitable[Any]], method: str) -> Any:
        """For handlers that return their answer, or write the answers themselves."""

        async def call(request: Any, context: Context) -> Any:
            try:
                self._begin(method, context)
                return await inner(_readable(request), context)
            except Exception as error:  # noqa: BLE001 - the RPC's outermost line
                return await self._refuse(error, method, context)
            finally:
                self._end(method)

        return call

    def _stream(self, inner: Callable[[Any, Context], AsyncIterator[Any]], method: str) -> Any:
        """For handlers that yield their answers."""

        async def call(request: Any, context: Context) -> AsyncIterator[Any]:
            try:
                self._begin(method, context)
                async with aclosing(inner(_readable(request), context)) as answers:  # type: ignore[type-var]
                    async for answer in answers:
                        yield answer
            except Exception as error:  # noqa: BLE001 - the RPC's outermost line
                await self._refuse(error, method, context)
            finally:
                self._end(method)

        return call

    def _begin(self, method: str, context: Context) -> None:
        self._running[method] += 1
        if method not in ENDLESS:
            self._idle.clear()
        header = next((value for key, value in context.invocation_metadata() or () if key == "authorization"), None)
        authorization = header.decode("utf-8", "replace") if isinstance(header, bytes) else header
        set_caller(self._gate.admit(method, authorization, certificate_names(context.auth_context())))
        if self.is_draining and method not in _WHILE_DRAINING:
            raise errors.ServiceUnavailable("the service is draining; try again when it has restarted")

    def _end(self, method: str) -> None:
        self._running[method] -= 1
        if not self.in_flight:
            self._idle.set()

    async def _refuse(self, error: Exception, method: str, context: Context) -> None:
        """Tell the caller; always raises."""
        if isinstance(error, grpc.aio.AbortError):
            raise error
        code = status_of(error) if isinstance(error, errors.KVPrefetchError) else grpc.StatusCode.INTERNAL
        if code is grpc.StatusCode.INTERNAL:
            log.error("%s broke", method, exc_info=error)
            await context.abort(code, "the service broke on this call; its log says how")
        self.refused[code.name] += 1
        await context.abort(code, str(error))


def _reader(parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """gRPC would tell the caller UNKNOWN where parsing raises."""

    def read(data: bytes) -> Any:
        try:
            return parse(data)
        except DecodeError as error:
            return Unreadable(str(error))

    return read


def _readable(request: Any) -> Any:
    if isinstance(request, Unreadable):
        raise errors.InvalidRequest(f"the request's bytes are no message of this call ({request.why})")
    return request
