"""/v1/chat/completions: its prompt and its answers."""

from collections.abc import Iterable
from typing import Any

from kvprefetch.gateway.contract import Answered, Dialect, Json
from kvprefetch.gateway.wire import canonical
from kvprefetch.gateway.wire.answers import answered, first_choice, kind_of
from kvprefetch.gateway.wire.fields import an_object, count, objects, text

KEY = "messages"
# Beside the messages, what engines give to the template or what chooses it; the rest is sampling or bookkeeping.
FIELDS: tuple[str, ...] = (
    *("model", "lora", "lora_path"),
    *("tools", "tool_choice", "functions", "parallel_tool_calls", "documents", "response_format"),
    *("chat_template", "chat_template_kwargs", "add_special_tokens", "truncate_prompt_tokens", "truncation_side"),
    *("reasoning_effort", "reasoning", "thinking", "enable_thinking"),
    *("mm_processor_kwargs", "media_io_kwargs"),
)
ENDING: tuple[str, ...] = ("add_generation_prompt", "continue_final_message")  # shapes the prompt's end alone


def opening(body: Json) -> bytes:
    """Canonical: all but the messages."""
    chosen = canonical.tool_choice(body.get("tool_choice"))
    tools = canonical.tools(body.get("tools"))
    return canonical.opening(Dialect.CHAT, body, FIELDS, tools=tools, tool_choice=chosen)


def items(body: Json) -> list[Json]:
    """The messages; none if they are not what they should be."""
    messages = body.get(KEY)
    said = objects(messages)
    return said if isinstance(messages, list) and len(said) == len(messages) else []


def turns(messages: list[Json]) -> tuple[bytes, ...]:
    """Canonical: each message."""
    return tuple(_turn(message) for message in messages)


def is_leading(message: Json) -> bool:
    """Whether it belongs to the opening, where it stands before all others."""
    return message.get("role") in ("system", "developer")


def is_answer(message: Json) -> bool:
    """Whether the model wrote it."""
    return message.get("role") == "assistant"


def is_text(message: Json) -> bool:
    """Whether there are no images, audio or files in it."""
    return canonical.is_text(message.get("content"))


def whole(answer: Json, body: Json) -> Answered:
    """Read an answer to the request `body`."""
    choice = first_choice(answer)
    message = an_object(choice.get("message"))
    calls = _calls(message)
    kind = kind_of(text(choice.get("finish_reason")), [name for _, name, *_ in calls])
    sent = {"role": "assistant", "content": message.get("content")}
    sent |= {name: message[name] for name in ("tool_calls", "function_call", "refusal") if message.get(name)}
    return answered(answer, kind, _turn(sent), sent)


def assembled(events: Iterable[Json]) -> Json:
    """The whole answer that the chunks of a stream make."""
    answer: Json = {}
    finish, pieces, refusals = "", [""], [""]
    calls: dict[int, Json] = {}
    for chunk in events:
        answer |= {name: chunk[name] for name in ("id", "usage", "timings") if chunk.get(name)}
        choice = first_choice(chunk)
        delta = an_object(choice.get("delta"))
        finish = text(choice.get("finish_reason")) or finish
        pieces.append(text(delta.get("content")))
        refusals.append(text(delta.get("refusal")))
        for call in objects(delta.get("tool_calls")):
            _add(calls, call)
    message = {"content": "".join(pieces), "tool_calls": [calls[at] for at in sorted(calls)]}
    if refusal := "".join(refusals):
        message["refusal"] = refusal
    return {**answer, "choices": [{"index": 0, "message": message, "finish_reason": finish}]}


def _add(calls: dict[int, Json], delta: Json) -> None:
    empty = {"id": "", "type": "function", "function": {"name": "", "arguments": ""}}
    call, said = calls.setdefault(count(delta.get("index")) or 0, empty), an_object(delta.get("function"))
    call["id"] = call["id"] or text(delta.get("id"))
    for name in ("name", "arguments"):
        call["function"][name] += text(said.get(name))


def _turn(message: Json) -> bytes:
    said = message.get
    rest = said("name") or None, said("refusal") or None, said("tools") or None, said("documents") or None
    return canonical.frame(said("role"), canonical.content(said("content")), _calls(message), *rest)


def _calls(message: Json) -> list[list[Any]]:
    if not message.get("tool_calls") and not message.get("function_call"):
        return []
    calls = [
        an_object(call.get("function")) or an_object(call.get("custom")) for call in objects(message.get("tool_calls"))
    ]
    if former := an_object(message.get("function_call")):
        calls.append(former)
    return [canonical.call(call.get("name"), call.get("arguments", call.get("input"))) for call in calls]
