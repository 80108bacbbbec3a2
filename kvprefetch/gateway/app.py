"""The application: which path is answered by what. Everything that is not named here is passed on."""

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from kvprefetch.errors import InvalidRequest, KVPrefetchError
from kvprefetch.gateway.api import Api
from kvprefetch.gateway.contract import Dialect
from kvprefetch.gateway.hints import Hints
from kvprefetch.gateway.link import UpstreamLink
from kvprefetch.gateway.proxy import Receive, Scope, Send, forward
from kvprefetch.gateway.site import Site
from kvprefetch.gateway.traffic import Making, Passing, Traffic
from kvprefetch.gateway.upstream import Upstream
from kvprefetch.gateway.wire import error_answer
from kvprefetch.http.problems import response_to
from kvprefetch.settings import Settings

_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
_KEPT = re.compile(r"/v1/(?:responses|conversations)/([^/]+)")


@dataclass(frozen=True)
class Gateway:
    """`app` answers while `run` runs; its owner closes it."""

    app: Starlette
    site: Site
    hints: Hints

    async def run(self) -> None:
        """Find out what the engines are, and warm them, until cancelled."""
        await self.site.run()

    async def close(self) -> None:
        """Hang up on the cache service, if there is one."""
        if self.hints.service is not None:
            await asyncio.to_thread(self.hints.service.close)


def make_gateway(settings: Settings, links: Sequence[UpstreamLink]) -> Gateway:
    """A gateway over these links. /health and /metrics ask for no token."""
    site = Site(settings, links)
    hints = Hints(site)
    api, pages = Api(site, hints), _Pages(site)
    dialects = [Route(each.value, Traffic(site, hints, each), methods=["POST"]) for each in Dialect]
    own = [
        Route("/kvprefetch/v1/prefetch", api.prefetch, methods=["POST"]),
        Route("/kvprefetch/v1/prefetch/{id}", api.look, methods=["GET"]),
        Route("/kvprefetch/v1/prefetch/{id}", api.cancel, methods=["DELETE"]),
        Route("/kvprefetch/v1/signal", api.signal, methods=["POST"]),
        Route("/kvprefetch/v1/stats", api.stats, methods=["GET"]),
        Route("/health", pages.health, methods=["GET"]),
        Route("/metrics", pages.metrics, methods=["GET"]),
    ]
    rest = [
        WebSocketRoute("/{path:path}", _no_websocket),
        Route("/{path:path}", _PassedOn(site), methods=list(_METHODS)),
    ]
    app = Starlette(
        routes=[*dialects, *own, *rest],
        exception_handlers={
            **dict.fromkeys((HTTPException, KVPrefetchError, Exception), _failed),
            RecursionError: _too_deep,
        },
    )
    return Gateway(app, site, hints)


class _Pages:
    """What is only read."""

    def __init__(self, site: Site) -> None:
        self._site = site

    async def health(self, request: Request) -> Response:
        """Whether any engine can be reached."""
        up = {upstream.name: upstream.is_up for upstream in self._site.upstreams}
        is_up = any(up.values())
        return JSONResponse({"status": "ok" if is_up else "no engine can be reached", "up": up}, 200 if is_up else 503)

    async def metrics(self, request: Request) -> Response:
        """For Prometheus."""
        return Response(self._site.metrics.text(), headers={"content-type": CONTENT_TYPE_LATEST})


class _PassedOn:
    """All other paths: an ASGI application."""

    def __init__(self, site: Site) -> None:
        self._site = site

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer what the engine answers."""
        try:
            tenant = self._tenant(scope)
        except KVPrefetchError as error:
            await response_to(error)(scope, receive, send)
            return
        upstream = self._site.place(tenant, "", _kept_id(scope["path"]))
        watch = self._watch(scope, upstream, tenant)
        await forward(
            scope,
            watch.heard(receive) if scope["method"] == "POST" else receive,  # what bears prompts is posted
            send,
            upstream.link,
            headers=scope["headers"],
            body=None,
            watch=watch,
            error_answer=lambda status, message: error_answer(None, status, message),
        )

    def _watch(self, scope: Scope, upstream: Upstream, tenant: str) -> Passing:
        if scope["method"] == "POST" and scope["path"] == "/v1/conversations":
            return Making(upstream, lambda number: self._site.kept.put(tenant, number, upstream.name))
        return Passing(upstream, is_live=False)

    def _tenant(self, scope: Scope) -> str:
        """A browser asks first, without a token, whether it may ask with one; the engine says so."""
        return "" if scope["method"] == "OPTIONS" else self._site.gate.tenant_of(Headers(scope=scope))


def _kept_id(path: str) -> str:
    """Of a response or conversation that its engine keeps; "" for another path."""
    found = _KEPT.match(path)
    return found[1] if found else ""


async def _no_websocket(websocket: WebSocket) -> None:
    await websocket.close(1008, "no WebSockets here")


async def _failed(request: Request, error: Exception) -> Response:
    return response_to(error)


async def _too_deep(request: Request, error: Exception) -> Response:
    return response_to(InvalidRequest("the body is nested too deeply"))
