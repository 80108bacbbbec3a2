"""Canonical bytes: what a prompt is made of, without what differs between two ways to write the same.

Each piece is a line of JSON, which never holds a line's end itself: pieces put behind one another stay apart, and a
conversation that goes on begins with the bytes that it had. Objects keep their order, since a template writes them
in that order. A message with one text part is the same as one with a string; several parts stay several, because
engines join them differently. Left out are ids of calls, marks for caches, and reasoning, which clients do not send
back. Images and the like are there as SHA-256.
"""

import hashlib
from collections.abc import Iterable
from typing import Any

import msgspec

from kvprefetch.gateway.contract import Dialect, Json
from kvprefetch.gateway.wire.fields import an_object, is_said, text

_LONGEST = 1_024  # characters of a string in a part that is no text
_TEXT = frozenset({"text", "input_text", "output_text"})
_REASONING = frozenset({"thinking", "redacted_thinking", "reasoning", "reasoning_text"})
_TEXTUAL = _TEXT | _REASONING | {"refusal", "tool_use", "tool_reference"}


def frame(*values: Any) -> bytes:
    """One piece."""
    return msgspec.json.encode(values) + b"\n"


def opening(dialect: Dialect, body: Json, names: Iterable[str], **instead: Any) -> bytes:
    """The fields `names` of `body` that say something; `instead` of some, what they come to."""
    said = {name: instead.get(name, body.get(name)) for name in names}
    return frame(dialect.value, {name: value for name, value in said.items() if is_said(value)})


def content(value: Any) -> Any:
    """A message's content: None for an empty one, a string, or a list of parts."""
    if isinstance(value, str):
        return value or None
    if isinstance(value, list):
        parts = [_part(part) for part in value if not _is_reasoning(part)]
        value = parts[0] if len(parts) == 1 and isinstance(parts[0], str) else parts
    elif isinstance(value, dict):
        value = [_part(value)]
    return value if is_said(value) else None


def call(name: Any, arguments: Any) -> list[Any]:
    """A tool call. `arguments` in JSON count as what they say, however they are spaced."""
    if not isinstance(arguments, str):
        return ["call", name, arguments or {}]
    try:
        return ["call", name, msgspec.json.decode(arguments or "{}")]
    except (msgspec.MsgspecError, RecursionError):
        return ["call", name, None, arguments]


def tools(value: Any) -> Any:
    """Definitions of tools, without marks for caches."""
    if not isinstance(value, list):
        return value
    return [
        {k: v for k, v in tool.items() if k != "cache_control"} if isinstance(tool, dict) else tool for tool in value
    ]


def tool_choice(value: Any) -> Any:
    """Only "none" shapes a prompt: some engines then leave the tools out."""
    return "none" if value == "none" or an_object(value).get("type") == "none" else None


def is_text(value: Any) -> bool:
    """Whether a message's content has no images, audio or files."""
    return (
        isinstance(value, str)
        or not isinstance(value, list | dict)
        or all(
            isinstance(part, str) or _is_text_part(an_object(part))
            for part in (value if isinstance(value, list) else [value])
        )
    )


def digested(value: Any) -> Any:
    """Any JSON, with long strings as their SHA-256."""
    if isinstance(value, dict):
        return {name: digested(each) for name, each in value.items() if name != "cache_control"}
    if isinstance(value, list):
        return [digested(each) for each in value]
    if isinstance(value, str) and len(value) > _LONGEST:
        return {"sha256": hashlib.sha256(value.encode()).hexdigest()}
    return value


def _part(part: Any) -> Any:
    said = an_object(part)
    kind = said.get("type")
    if kind in ("tool_use", "tool_result"):
        if kind == "tool_use":
            return call(said.get("name"), said.get("input"))
        return ["result", content(said.get("content")), said.get("is_error") is True]
    is_words = isinstance(kind, str) and kind in _TEXT and isinstance(said.get("text"), str)
    return said["text"] if is_words else digested(part)


def _is_reasoning(part: Any) -> bool:
    return text(an_object(part).get("type")) in _REASONING


def _is_text_part(part: Json) -> bool:
    if part.get("type") == "tool_result":
        return is_text(part.get("content"))
    return text(part.get("type")) in _TEXTUAL
