"""Contexts for a service: the same as elsewhere, with the model's name, or known there by their own name alone."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kvprefetch.contexts import Context
from kvprefetch.errors import InvalidRequest
from kvprefetch.v1 import hints_pb2 as pb


@dataclass(frozen=True)
class RemoteContext(Context):
    """A context of some model of the service. With a `name` alone: one that the service was given before."""

    model: str = ""  # "": the one that there is
    adapter: str = ""

    def __post_init__(self) -> None:
        if not (self.name and not self.messages and not self.token_ids):
            super().__post_init__()

    def with_answer(self, answer: str) -> "RemoteContext":
        """The context of the session's next turn."""
        if not self.messages:
            raise InvalidRequest("an answer follows messages; this context has none here")
        return replace(self, messages=(*self.messages, {"role": "assistant", "content": answer}), name="")


def to_wire(context: Context) -> pb.Context:
    """For a request. Raises InvalidRequest for what is no JSON or no token."""
    message = pb.Context(
        model=getattr(context, "model", ""),
        adapter=getattr(context, "adapter", ""),
        name=context.name,
        namespace=context.namespace,
        messages=_json(context.messages, "messages"),
        tools=_json(context.tools, "tools"),
        chat_template_kwargs=_json(context.chat_template_kwargs, "chat_template_kwargs"),
    )
    try:
        message.token_ids.extend(context.token_ids)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"token_ids are whole numbers from 0 to 2^32 - 1: {error}") from error
    return message


def _json(value: Sequence[Any] | Mapping[str, Any], what: str) -> bytes:
    return json_bytes(value, f"a context's {what}") if value else b""


def json_bytes(value: object, what: str) -> bytes:
    """As JSON in UTF-8. Raises InvalidRequest."""
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=_plain).encode()
    except (TypeError, ValueError) as error:  # lone surrogates are a ValueError too
        raise InvalidRequest(f"{what} cannot be written as JSON: {error}") from error


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return list(value)
    raise TypeError(f"{type(value).__name__} is no JSON")
