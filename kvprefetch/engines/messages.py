"""Messages as chat templates expect them, whatever client wrote them.

Clients write the same message in several ways: text as a list of parts, fields that are null, a tool call's
arguments as JSON in a string. Templates know one of them, and the warm path and the request path must agree
on it. Pure.
"""

import json
from collections.abc import Iterable
from typing import Any

from kvprefetch.contexts import Message
from kvprefetch.errors import InvalidRequest


def plain(messages: Iterable[Message]) -> tuple[dict[str, Any], ...]:
    """The same messages in one way; what is plain already stays as it is. Raises InvalidRequest."""
    return tuple(_message(message) for message in messages)


def _message(message: Message) -> dict[str, Any]:
    said = {name: value for name, value in message.items() if value is not None}
    if not isinstance(said.get("role"), str):
        raise InvalidRequest("every message must be a mapping with a role")
    if "content" not in said and not said.get("tool_calls"):
        raise InvalidRequest("every message must have a content, or tool calls")
    said["content"] = _text(said.get("content", ""))
    if "tool_calls" in said:
        said["tool_calls"] = [_call(call) for call in _list(said["tool_calls"], "tool_calls")]
    return said


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = []
    for part in _list(content, "content"):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise InvalidRequest("a message's content must be a string, or a list of parts of the type text")
        parts.append(part["text"])
    return "\n".join(parts)


def _call(call: Any) -> Any:
    """A tool call with its arguments as an object."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(arguments := function.get("arguments"), str):
        return call
    try:
        parsed = json.loads(arguments or "{}")
    except (json.JSONDecodeError, RecursionError):
        return call  # the model's own words, which it may see again
    return {**call, "function": {**function, "arguments": parsed}} if isinstance(parsed, dict) else call


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise InvalidRequest(f"a message's {name} must be a list")
    return list(value)
