"""A request's body: bounded bytes, then one JSON object whose every string is text.

Promises: at most `limit` bytes and one chunk are held. Raises InvalidRequest, and starlette's HTTPException for
what has a status of its own (413, 415). No message repeats what the caller sent.
"""

import json
from typing import Any, NoReturn

from starlette.exceptions import HTTPException
from starlette.requests import Request

from kvprefetch.errors import InvalidRequest


async def read_body(request: Request, limit: int) -> bytes:
    """The body as it came. That it must be called JSON keeps other sites' pages in a browser from posting here."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise HTTPException(415, "send JSON, with the header Content-Type: application/json")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limit:
        raise _too_large(limit)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise _too_large(limit)
    return bytes(body)


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in `body`. One nested too deeply raises RecursionError, here or where it is read."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not UTF-8: byte {error.start} is no part of a character") from None
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
        if "\\u" in text:  # half a surrogate pair is JSON, but no text
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"the body is not JSON: {error.msg} at character {error.pos}") from None
    except UnicodeEncodeError:
        raise InvalidRequest("a string in the body holds half a surrogate pair, which is no character") from None
    except ValueError:  # a number of thousands of digits
        raise InvalidRequest("the body holds a number that is none here") from None
    if not isinstance(value, dict):
        raise InvalidRequest("the body must be a JSON object")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise InvalidRequest(f"the body is not JSON: {name} is no number there")


def _too_large(limit: int) -> HTTPException:
    return HTTPException(413, f"the body is larger than {limit} bytes (http.max_body_bytes)")
