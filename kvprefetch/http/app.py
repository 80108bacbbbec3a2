"""The application: which path is answered by what, and what happens to everything else."""

import time

import anyio
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from kvprefetch.errors import Closed, KVPrefetchError
from kvprefetch.http.answer import Json
from kvprefetch.http.ask import check_model
from kvprefetch.http.backend import Backend
from kvprefetch.http.chat import CHAT, read_chat
from kvprefetch.http.completions import COMPLETION, read_completion
from kvprefetch.http.endpoint import Endpoint, Site
from kvprefetch.http.gate import Gate, check_host
from kvprefetch.http.metrics import Metrics
from kvprefetch.http.problems import response_to
from kvprefetch.inprocess import Local
from kvprefetch.settings import Settings


def make_app(local: Local, settings: Settings) -> Starlette:
    """The endpoints over `local`, which its owner closes. /health and /metrics ask for no token; tenants' own figures
    are in /metrics for an operator's alone.

    Raises SettingsError where it would be open to the network without credentials.
    """
    check_host(settings.http.host, settings, "http.host")
    backend = Backend.of(local)
    site = Site(backend, Gate(settings), Metrics(backend), settings.http.max_body_bytes)
    pages = _Pages(site)
    chat = Endpoint(site, "chat", CHAT, read_chat)
    completion = Endpoint(site, "completions", COMPLETION, read_completion)
    return Starlette(
        routes=[
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/completions", completion, methods=["POST"]),
            Route("/v1/models", pages.models),
            Route("/v1/models/{model:path}", pages.model),
            Route("/health", pages.health),
            Route("/metrics", pages.metrics),
        ],
        exception_handlers={HTTPException: _failed, KVPrefetchError: _failed, Exception: _failed},
    )


class _Pages:
    """What is only read."""

    def __init__(self, site: Site) -> None:
        self._site, self._since = site, int(time.time())

    async def models(self, request: Request) -> Response:
        """The one model."""
        self._site.gate.tenant(request.headers.get("authorization", ""))
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """The model of that name."""
        self._site.gate.tenant(request.headers.get("authorization", ""))
        check_model(request.path_params["model"], self._site.backend.model)
        return JSONResponse(self._model())

    async def health(self, request: Request) -> Response:
        """Whether requests are taken."""
        try:
            self._site.backend.ping()
        except Closed as error:
            return response_to(error)
        return JSONResponse({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        """For Prometheus."""
        metrics = self._site.metrics
        by_tenant = self._site.gate.is_operator(request.headers)
        text = await anyio.to_thread.run_sync(metrics.text_for_operators if by_tenant else metrics.text)
        return Response(text, headers={"content-type": CONTENT_TYPE_LATEST})

    def _model(self) -> Json:
        backend = self._site.backend
        return {
            "id": backend.model,
            "object": "model",
            "created": self._since,
            "owned_by": "kvprefetch",
            "root": backend.model,
            "max_model_len": backend.max_tokens,
        }


async def _failed(request: Request, error: Exception) -> Response:
    return response_to(error)
