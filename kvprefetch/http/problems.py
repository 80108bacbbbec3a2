"""What goes wrong, in OpenAI's words: `{"error": {"message", "type", "param", "code"}}` and a status code."""

from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from kvprefetch.errors import (
    Closed,
    InvalidRequest,
    KVPrefetchError,
    LimitExceeded,
    PermissionDenied,
    PoolTooSmall,
    ServiceUnavailable,
    Unauthenticated,
    UnknownContext,
    UnknownModel,
)


class InvalidField(InvalidRequest):
    """A field of the body cannot be served; `param` is its name."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(f"{param}: {message}")
        self.param = param


_CALLER, _SERVER = "invalid_request_error", "server_error"
_KINDS: tuple[tuple[type[KVPrefetchError], int, str, str | None], ...] = (  # the first that fits
    (InvalidRequest, 400, _CALLER, None),
    (PoolTooSmall, 400, _CALLER, "context_length_exceeded"),
    (Unauthenticated, 401, _CALLER, "invalid_api_key"),
    (PermissionDenied, 403, _CALLER, "permission_denied"),
    (UnknownModel, 404, _CALLER, "model_not_found"),
    (UnknownContext, 404, _CALLER, "context_not_found"),
    (LimitExceeded, 429, "rate_limit_error", "rate_limit_exceeded"),
    (Closed, 503, _SERVER, "unavailable"),
    (ServiceUnavailable, 503, _SERVER, "unavailable"),
)


def status_of(error: BaseException) -> int:
    """The status code that says `error`."""
    return error.status_code if isinstance(error, HTTPException) else _kind(error)[0]


def body_of(error: BaseException) -> dict[str, Any]:
    """The JSON that says `error`. What is not of our own making is not told to the caller in its own words."""
    if isinstance(error, HTTPException):
        return _body(error.detail, _CALLER if error.status_code < 500 else _SERVER, None, None)
    _, kind, code = _kind(error)
    message = str(error) if isinstance(error, KVPrefetchError) else "the server failed; its log says why"
    return _body(message, kind, error.param if isinstance(error, InvalidField) else None, code)


def response_to(error: BaseException) -> JSONResponse:
    """The whole answer that says `error`."""
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    if isinstance(error, Unauthenticated):
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(body_of(error), status_of(error), headers)


def _kind(error: BaseException) -> tuple[int, str, str | None]:
    return next(
        ((status, category, code) for kind, status, category, code in _KINDS if isinstance(error, kind)),
        (500, _SERVER, None),
    )


def _body(message: str, kind: str, param: str | None, code: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
