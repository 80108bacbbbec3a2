"""Answers of the gateway's own: to a prewarm request, with no output, and errors; in the caller's dialect."""

from typing import Any

import msgspec

from kvprefetch.gateway.contract import Asked, Dialect, Json, Warmed
from kvprefetch.gateway.wire.events import DONE, event
from kvprefetch.gateway.wire.fields import an_object, objects

_JSON, _STREAM = "application/json", "text/event-stream; charset=utf-8"
_OPENAI_KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_ANTHROPIC_KINDS = {**_OPENAI_KINDS, 413: "request_too_large", 503: "overloaded_error", 529: "overloaded_error"}


def prewarm_answer(asked: Asked, warmed: Warmed, now: float, response_id: str) -> tuple[str, bytes]:
    """Content type and body. `now` in seconds since 1970; beside the dialect's own fields, `kvprefetch` says what
    became of it."""
    expires = int(now + warmed.expires_in_s) if warmed.expires_in_s > 0 else None
    said = {
        "outcome": warmed.outcome,
        "tokens": warmed.cached_tokens,
        "expires_at": expires,
        "reason": warmed.reason,
    }
    writer = {
        Dialect.CHAT: _chat,
        Dialect.COMPLETIONS: _completion,
        Dialect.RESPONSES: _response,
        Dialect.MESSAGES: _message,
    }[asked.dialect]
    body = writer(asked, warmed, int(now), response_id, {"kvprefetch": said})
    return (_STREAM if asked.stream else _JSON), body


def error_answer(dialect: Dialect | None, status: int, message: str) -> bytes:
    """An error of the gateway's own, in Anthropic's shape or OpenAI's."""
    usual = "invalid_request_error" if status < 500 else "api_error"
    if dialect is Dialect.MESSAGES:
        kind = _ANTHROPIC_KINDS.get(status, usual)
        return msgspec.json.encode({"type": "error", "error": {"type": kind, "message": message}})
    kind = _OPENAI_KINDS.get(status, usual)
    return msgspec.json.encode({"error": {"message": message, "type": kind, "param": None, "code": None}})


def _chat(asked: Asked, warmed: Warmed, created: int, response_id: str, said: Json) -> bytes:
    head = {"id": response_id, "created": created, "model": asked.model}
    words = {"role": "assistant", "content": ""}
    end = {"index": 0, "logprobs": None, "finish_reason": "length"}
    if not asked.stream:
        choice = {**end, "message": {**words, "refusal": None}}
        return msgspec.json.encode({**head, "object": "chat.completion", "choices": [choice], **_usage(warmed), **said})
    return _chunks({**head, "object": "chat.completion.chunk"}, {**end, "delta": words}, asked, warmed, said)


def _completion(asked: Asked, warmed: Warmed, created: int, response_id: str, said: Json) -> bytes:
    head = {"id": response_id, "object": "text_completion", "created": created, "model": asked.model}
    choice = {"index": 0, "text": "", "logprobs": None, "finish_reason": "length"}
    if not asked.stream:
        return msgspec.json.encode({**head, "choices": [choice], **_usage(warmed), **said})
    return _chunks(head, choice, asked, warmed, said)


def _chunks(head: Json, choice: Json, asked: Asked, warmed: Warmed, said: Json) -> bytes:
    """One chunk, and one with the usage where the caller asks for it; the last says what became of it."""
    if an_object(asked.body.get("stream_options")).get("include_usage") is not True:
        return event({**head, "choices": [choice], **said}) + DONE
    first = event({**head, "choices": [choice], "usage": None})
    return first + event({**head, "choices": [], **_usage(warmed), **said}) + DONE


def _usage(warmed: Warmed) -> Json:
    return {
        "usage": {
            "prompt_tokens": warmed.prompt_tokens,
            "completion_tokens": 0,
            "total_tokens": warmed.prompt_tokens,
            "prompt_tokens_details": {"cached_tokens": warmed.cached_tokens},
        }
    }


def _response(asked: Asked, warmed: Warmed, created: int, response_id: str, said: Json) -> bytes:
    begun = _empty_response(asked, created, response_id)
    usage = {
        "input_tokens": warmed.prompt_tokens,
        "input_tokens_details": {"cached_tokens": warmed.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": 0,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": warmed.prompt_tokens,
    }
    why = {"reason": "max_output_tokens"}
    ended = {**begun, "status": "incomplete", "incomplete_details": why, "usage": usage, **said}
    if not asked.stream:
        return msgspec.json.encode(ended)
    states = (("response.created", begun), ("response.in_progress", begun), ("response.incomplete", ended))
    return b"".join(
        event({"type": name, "sequence_number": at, "response": state}, name) for at, (name, state) in enumerate(states)
    )


def _empty_response(asked: Asked, created: int, response_id: str) -> Json:
    body = asked.body
    echoed: dict[str, Any] = {name: body.get(name) for name in ("instructions", "temperature", "top_p")}
    return {
        **echoed,
        "id": response_id,
        "object": "response",
        "created_at": created,
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "model": asked.model,
        "output": [],
        "metadata": an_object(body.get("metadata")),
        "parallel_tool_calls": body.get("parallel_tool_calls") is not False,
        "previous_response_id": body.get("previous_response_id"),
        "tool_choice": body.get("tool_choice") or "auto",
        "tools": objects(body.get("tools")),
        "usage": None,
    }


def _message(asked: Asked, warmed: Warmed, created: int, response_id: str, said: Json) -> bytes:
    usage = {
        "input_tokens": max(0, warmed.prompt_tokens - warmed.cached_tokens),  # those beside the cached ones
        "cache_read_input_tokens": warmed.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": 0,
    }
    begun = {"id": response_id, "type": "message", "role": "assistant", "model": asked.model, "content": []}
    stop = {"stop_reason": "max_tokens", "stop_sequence": None}
    if not asked.stream:
        return msgspec.json.encode({**begun, **stop, "usage": usage, **said})
    start = {**begun, "stop_reason": None, "stop_sequence": None, "usage": usage}
    events: list[Json] = [
        {"type": "message_start", "message": start},
        {"type": "message_delta", "delta": stop, "usage": usage, **said},
        {"type": "message_stop"},
    ]
    return b"".join(event(each, each["type"]) for each in events)
