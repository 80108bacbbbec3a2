"""Which engine is behind a URL: by what it says of itself, and by nothing that it would have to work for."""

from dataclasses import replace

from kvprefetch.errors import UpstreamError
from kvprefetch.gateway.contract import Engine, Json, Link
from kvprefetch.gateway.engines.answers import decoded
from kvprefetch.gateway.engines.generic import Generic
from kvprefetch.gateway.engines.llamacpp import llamacpp
from kvprefetch.gateway.engines.sglang import SGLang, server_info, sglang_traits
from kvprefetch.gateway.engines.vllm import Residency, Vllm, vllm_traits
from kvprefetch.gateway.engines.worker import Worker
from kvprefetch.gateway.wire.fields import objects, text
from kvprefetch.settings import UpstreamSettings

_NOT_YET = (502, 503, 504)  # it starts, or a router has no engine yet


async def discover(link: Link, settings: UpstreamSettings, residency: Residency | None = None) -> Engine:
    """The engine there; `residency` is what its KV events say. Raises UpstreamError where it cannot be reached."""
    models = await _models(link)
    engine = await _engine(link, settings, residency, models)
    engine.traits = replace(engine.traits, models=frozenset(text(model.get("id")) for model in models) - {""})
    return engine


async def _engine(link: Link, settings: UpstreamSettings, residency: Residency | None, models: list[Json]) -> Engine:
    owner = str(models[0].get("owned_by", "")) if models else ""
    figures = await _metrics(link) if not owner else b""  # a list of models may be shown to its callers alone
    if owner == "kvprefetch" or b"\nkvprefetch_live_requests" in figures:
        return Worker(link, settings)
    if owner == "vllm" or b"\nvllm:" in figures:
        adapters = frozenset(str(model.get("id")) for model in models if model.get("parent"))
        return Vllm(link, await vllm_traits(link, settings), residency, adapters)
    if owner == "llamacpp":
        return await llamacpp(link, settings)
    info = await server_info(link) if owner in ("", "sglang") else {}
    if owner == "sglang" or info:
        return SGLang(link, sglang_traits(info, settings))
    return Generic(link, settings)


async def _models(link: Link) -> list[Json]:
    """What it serves, with who owns it and, for an adapter, its parent."""
    status, body = await link.get("/v1/models")
    if status in _NOT_YET:
        raise UpstreamError(f"answers /v1/models with status {status}")
    return objects(decoded(body).get("data")) if status == 200 else []


async def _metrics(link: Link) -> bytes:
    status, text = await link.get("/metrics")
    return text if status == 200 else b""
