"""/v1/responses: its prompt and its answers.

An answer is several items; here all that the model made without interruption is one turn, as it is elsewhere.
"""

from collections.abc import Iterable
from itertools import groupby

from kvprefetch.gateway.contract import Answered, Dialect, Json
from kvprefetch.gateway.wire import canonical
from kvprefetch.gateway.wire.answers import kind_of
from kvprefetch.gateway.wire.fields import an_object, count, objects, text

KEY = "input"
# Beside the input, what shapes the prompt; the rest is sampling or bookkeeping.
FIELDS: tuple[str, ...] = (
    *("model", "lora", "lora_path", "instructions", "prompt", "previous_response_id", "conversation"),
    *("previous_input_messages", "tools", "tool_choice", "parallel_tool_calls", "reasoning", "text", "truncation"),
    *("chat_template_kwargs", "mm_processor_kwargs", "media_io_kwargs"),
)
ENDING: tuple[str, ...] = ()
_LAST = ("response.completed", "response.incomplete", "response.failed")


def opening(body: Json) -> bytes:
    """Canonical: all but the input."""
    return canonical.opening(
        Dialect.RESPONSES,
        body,
        FIELDS,
        instructions=canonical.content(body.get("instructions")),
        tool_choice=canonical.tool_choice(body.get("tool_choice")),
    )


def items(body: Json) -> list[Json]:
    """The input; none if it is not what it should be."""
    said = body.get(KEY)
    if isinstance(said, str):
        return [{"role": "user", "content": said}] if said else []
    found = objects(said)
    return found if isinstance(said, list) and len(found) == len(said) else []


def turns(said: list[Json]) -> tuple[bytes, ...]:
    """Canonical: each item, or what the model made at once. Reasoning is nothing."""
    found: list[bytes] = []
    for made, group in groupby(said, is_answer):
        pieces = [_item(item) for item in group]
        found += [b"".join(pieces)] if made else pieces
    return tuple(filter(None, found))


def is_leading(item: Json) -> bool:
    """Whether it belongs to the opening, where it stands before all others."""
    return item.get("role") in ("system", "developer")


def is_answer(item: Json) -> bool:
    """Whether the model made it: a message of the assistant, a call, or reasoning."""
    kind = text(item.get("type"))
    if kind in ("", "message"):
        return item.get("role") == "assistant"
    return not kind.endswith(("_output", "_response", "_reference"))


def is_text(item: Json) -> bool:
    """Whether there are no images, audio or files in it."""
    if text(item.get("type")) not in ("", "message", "function_call", "function_call_output", "reasoning"):
        return False
    return canonical.is_text(item.get("content")) and canonical.is_text(item.get("output"))


def whole(answer: Json, body: Json) -> Answered:
    """Read an answer to the request `body`."""
    output = objects(answer.get("output"))
    calls = [item.get("name") for item in output if item.get("type") == "function_call"]
    kind = kind_of(_finish(answer), calls)
    usage = an_object(answer.get("usage"))
    return Answered(
        kind,
        b"".join(turns(output)) if kind else b"",
        output if kind else None,
        count(usage.get("input_tokens")),
        count(an_object(usage.get("input_tokens_details")).get("cached_tokens")),
        count(usage.get("output_tokens")),
        text(answer.get("id")),
    )


def assembled(events: Iterable[Json]) -> Json:
    """The whole answer: the last event holds it."""
    answer: Json = {}
    done: list[Json] = []
    for event in events:
        kind = event.get("type")
        if kind == "response.output_item.done":
            done.append(an_object(event.get("item")))
        elif kind == "response.created" or kind in _LAST:
            answer = an_object(event.get("response"))
    return answer if answer.get("output") else {**answer, "output": done}


def _finish(answer: Json) -> str:
    if answer.get("status") == "incomplete":
        reason = text(an_object(answer.get("incomplete_details")).get("reason"))
        return "length" if reason == "max_output_tokens" else reason
    return "stop" if answer.get("status") == "completed" else ""


def _item(item: Json) -> bytes:
    match text(item.get("type")) or "message":
        case "message":
            return canonical.frame(item.get("role"), canonical.content(item.get("content")))
        case "function_call":
            return canonical.frame(canonical.call(item.get("name"), item.get("arguments")))
        case "function_call_output":
            return canonical.frame("result", canonical.content(item.get("output")))
        case "reasoning":
            return b""
        case "item_reference":
            return canonical.frame("item", item.get("id"))
    rest = {
        name: value for name, value in item.items() if name not in ("id", "status", "call_id") and value is not None
    }
    return canonical.frame("other", canonical.digested(rest))
