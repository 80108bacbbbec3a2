"""/kvprefetch/v1: signals, hints with their outcomes and uses, and figures, over HTTP.

A context is the beginning of a request: the fields of a chat request, or of another dialect that `endpoint` names, or
`{"name": …}` of one that was given before.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kvprefetch.errors import InvalidRequest
from kvprefetch.gateway.contract import Answered, Dialect, Draft, Json
from kvprefetch.gateway.hints import Hint, Hints
from kvprefetch.gateway.site import Site, kept_headers, prepared, token_of
from kvprefetch.gateway.stats import stats_of
from kvprefetch.gateway.wire import dialect_of, next_draft, read_request
from kvprefetch.http.body import parse_object, read_body
from kvprefetch.http.fields import Fields

_LONGEST_WAIT_S = 600.0
_FAR, _LONGEST_HOLD = 1e9, 86_400.0  # seconds
_CONTEXTS = 64  # that one signal names
_LONG = 64 * 2**10  # bytes whose reading is left to a thread
T = TypeVar("T")


class Api:
    """The endpoints. Each answers for the tenant whose token it is."""

    def __init__(self, site: Site, hints: Hints) -> None:
        self.site, self.hints = site, hints

    async def prefetch(self, request: Request) -> Response:
        """POST: a hint. 202 with its id, or 200 once it has an outcome, for which `wait_s` are waited."""
        tenant, fields, size = await self._ask(request)
        named, draft = await self._draft(tenant, fields.object("context"), request, size)
        expected_in_s, hold_s = fields.number("expected_in_s", 0, _FAR), fields.number("hold_s", 0, _LONGEST_HOLD)
        probability = fields.number("probability", 0, 1)
        wait_s = fields.number("wait_s", 0, _LONGEST_WAIT_S) or 0.0
        hint = await self.hints.prefetch(
            tenant,
            draft,
            fields.text("session"),
            probability=1.0 if probability is None else probability,
            expected_in_s=expected_in_s or 0.0,
            hold_s=hold_s,
            named=named,
        )
        if wait_s:
            with suppress(TimeoutError):  # it lives on
                await asyncio.wait_for(hint.done.wait(), wait_s)
        return JSONResponse(said_of(hint), 202 if hint.result is None else 200)

    async def look(self, request: Request) -> Response:
        """GET: what became of a hint."""
        return JSONResponse(said_of(self._hint(request)))

    async def cancel(self, request: Request) -> Response:
        """DELETE: withdraw it."""
        hint = self._hint(request)
        self.hints.cancel(hint)
        return JSONResponse(said_of(hint))

    async def signal(self, request: Request) -> Response:
        """POST: something was observed in a session. 202."""
        tenant, fields, size = await self._ask(request)
        contexts = fields.objects("contexts")
        if len(contexts) > _CONTEXTS:
            raise InvalidRequest(f"a signal names at most {_CONTEXTS} contexts")
        kind = fields.text("kind")
        if not kind:
            raise InvalidRequest("a signal has a kind, a word of your own such as 'document_opened'")
        drafts = [await self._draft(tenant, context, request, size) for context in contexts]
        given = await self.hints.signal(
            tenant, kind, fields.text("session"), drafts, token_of(kept_headers(request.headers.raw))
        )
        return JSONResponse({"hints": [hint.id for hint in given]}, 202)

    async def stats(self, request: Request) -> Response:
        """GET: figures since the start: of all for an operator, a tenant's own for a tenant."""
        tenant = self.site.gate.reader_of(request.headers)
        return JSONResponse(stats_of(self.site, self.hints, tenant))

    # -- within ----------------------------------------------------------------------------------------
    async def _ask(self, request: Request) -> tuple[str, Fields, int]:
        """Who asks, and what, in how many bytes."""
        tenant = self.site.gate.tenant_of(request.headers)
        body = await read_body(request, self.site.settings.gateway.max_body_bytes)
        return tenant, Fields(await _aside(len(body), parse_object, body)), len(body)

    def _hint(self, request: Request) -> Hint:
        return self.hints.find(self.site.gate.tenant_of(request.headers), request.path_params["id"])

    async def _draft(self, tenant: str, context: Json, request: Request, size: int) -> tuple[str, Draft]:
        """With its name, if it has one. Raises InvalidRequest, UnknownContext."""
        name, rest = str(context.get("name", "")), {k: v for k, v in context.items() if k not in ("name", "endpoint")}
        if name and not rest:
            known = self.hints.recall(tenant, name)  # sent as its present caller may, not as whoever named it
            return name, prepared(known, kept_headers(request.headers.raw), known.salt)
        dialect = dialect_of(str(context.get("endpoint", "/v1/chat/completions")))
        if dialect is None:
            raise InvalidRequest("endpoint: none that prompts are sent to, such as /v1/chat/completions")
        draft = await _aside(size, _read, dialect, rest)
        if draft is None:
            raise InvalidRequest("context: it needs messages, a prompt or an input, as the request will have them")
        draft = prepared(draft, kept_headers(request.headers.raw), draft.salt)
        if name:
            self.hints.remember(tenant, name, draft)
        return name, draft


async def _aside(size: int, work: Callable[..., T], *arguments: Any) -> T:
    """What `work` returns; on a thread, where so many bytes would keep others waiting."""
    return await asyncio.to_thread(work, *arguments) if size > _LONG else work(*arguments)


def _read(dialect: Dialect, context: Json) -> Draft | None:
    return next_draft(read_request(dialect, msgspec.json.encode(context)), Answered())


def said_of(hint: Hint) -> dict[str, Any]:
    """A hint in JSON: outcome and use are null while open, `because` says why it was worked on."""
    result = hint.result
    return {
        "id": hint.id,
        "outcome": result.outcome.value if result else None,
        "tokens": hint.tokens,
        "computed_tokens": hint.computed,
        "reason": result.reason if result else "",
        "use": hint.use.value if hint.use else None,
        "used_tokens": hint.used_tokens,
        "because": hint.because,
    }
