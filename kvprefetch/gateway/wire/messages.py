"""Anthropic's /v1/messages: its prompt and its answers."""

from collections.abc import Iterable
from typing import Any

import msgspec

from kvprefetch.gateway.contract import Answered, Dialect, Json
from kvprefetch.gateway.wire import canonical
from kvprefetch.gateway.wire.answers import kind_of
from kvprefetch.gateway.wire.fields import an_object, count, objects, text

KEY = "messages"
# Beside the messages, what shapes the prompt; the rest is sampling or bookkeeping.
FIELDS: tuple[str, ...] = (
    *("model", "lora", "lora_path", "system", "tools", "tool_choice", "mcp_servers", "container"),
    *("thinking", "output_config", "chat_template_kwargs", "context_management"),
)
ENDING: tuple[str, ...] = ()
_BILLING = "x-anthropic-billing-header"  # a block that differs each time; engines leave it out of the prompt
_KINDS = {"end_turn": "stop", "stop_sequence": "stop", "max_tokens": "length"}


def opening(body: Json) -> bytes:
    """Canonical: all but the messages."""
    system = body.get("system")
    if isinstance(system, list):
        system = [block for block in system if not text(an_object(block).get("text")).startswith(_BILLING)]
    return canonical.opening(
        Dialect.MESSAGES,
        body,
        FIELDS,
        system=canonical.content(system),
        tools=canonical.tools(body.get("tools")),
        tool_choice=canonical.tool_choice(body.get("tool_choice")),
        thinking=an_object(body.get("thinking")).get("type"),  # its budget is no part of the prompt
    )


def items(body: Json) -> list[Json]:
    """The messages; none if they are not what they should be."""
    messages = body.get(KEY)
    said = objects(messages)
    return said if isinstance(messages, list) and len(said) == len(messages) else []


def turns(messages: list[Json]) -> tuple[bytes, ...]:
    """Canonical: each message."""
    return tuple(
        canonical.frame(message.get("role"), canonical.content(message.get("content"))) for message in messages
    )


def is_leading(message: Json) -> bool:
    """Whether it belongs to the opening: the system prompt has a field of its own here."""
    return False


def is_answer(message: Json) -> bool:
    """Whether the model wrote it."""
    return message.get("role") == "assistant"


def is_text(message: Json) -> bool:
    """Whether there are no images or files in it."""
    return canonical.is_text(message.get("content"))


def whole(answer: Json, body: Json) -> Answered:
    """Read an answer to the request `body`. Anthropic counts cached tokens beside the input's, not among them."""
    blocks, stopped = objects(answer.get("content")), text(answer.get("stop_reason"))
    kind = kind_of(
        _KINDS.get(stopped, stopped), [block.get("name") for block in blocks if block.get("type") == "tool_use"]
    )
    message = {"role": "assistant", "content": blocks}
    usage = an_object(answer.get("usage"))
    fresh, cached = count(usage.get("input_tokens")), count(usage.get("cache_read_input_tokens"))
    created = count(usage.get("cache_creation_input_tokens"))
    return Answered(
        kind,
        turns([message])[0] if kind else b"",
        message if kind else None,
        None if fresh is None else fresh + (cached or 0) + (created or 0),
        cached,
        count(usage.get("output_tokens")),
        text(answer.get("id")),
    )


def assembled(events: Iterable[Json]) -> Json:
    """The whole answer that the events of a stream make."""
    answer: Json = {}
    usage: Json = {}
    blocks: dict[int, Json] = {}
    inputs: dict[int, str] = {}
    for event in events:
        at = count(event.get("index")) or 0
        match event.get("type"):
            case "message_start":
                answer |= an_object(event.get("message"))
                usage |= an_object(answer.get("usage"))
            case "content_block_start":
                blocks[at] = dict(an_object(event.get("content_block")))
            case "content_block_delta":
                _add(blocks.setdefault(at, {}), inputs, at, an_object(event.get("delta")))
            case "message_delta":
                answer |= an_object(event.get("delta"))
                usage |= {name: value for name, value in an_object(event.get("usage")).items() if value is not None}
    for at, written in inputs.items():
        blocks[at]["input"] = _parsed(written)
    return {**answer, "content": [blocks[at] for at in sorted(blocks)], "usage": usage}


def _add(block: Json, inputs: dict[int, str], at: int, delta: Json) -> None:
    if piece := text(delta.get("partial_json")):
        inputs[at] = inputs.get(at, "") + piece
    for name in ("text", "thinking"):
        if piece := text(delta.get(name)):
            block[name] = text(block.get(name)) + piece
    if signature := text(delta.get("signature")):
        block["signature"] = signature


def _parsed(written: str) -> Any:
    try:
        return msgspec.json.decode(written)
    except (msgspec.MsgspecError, RecursionError):  # cut off
        return {}
