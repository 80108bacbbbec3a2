"""Answers as engines write them, and a real server that gives them to the official clients."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import anthropic
import msgspec
import openai
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from kvprefetch.gateway.contract import Dialect, Json

STREAM, JSON = "text/event-stream; charset=utf-8", "application/json"
USAGE = {
    "prompt_tokens": 30,
    "completion_tokens": 7,
    "total_tokens": 37,
    "prompt_tokens_details": {"cached_tokens": 16},
}
ARGUMENTS = '{"city": "Z\\u00fcrich", "days": 2}'
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}
SECOND = {"id": "call_2", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": f"The {name}.", "parameters": {"type": "object"}}}
    for name in ("weather", "clock")
]


def sse(*events: Json, names: bool = False, done: bool = True) -> bytes:
    """A stream of `events`."""
    lines = [
        (f"event: {event['type']}\n".encode() if names else b"") + b"data: " + msgspec.json.encode(event) + b"\n\n"
        for event in events
    ]
    return b"".join(lines) + (b"data: [DONE]\n\n" if done else b"")


def chat_answer(finish: str, **message: object) -> bytes:
    said = {"role": "assistant", "content": None, "refusal": None, "reasoning": "Hm.", "tool_calls": [], **message}
    choice = {"index": 0, "message": said, "finish_reason": finish, "stop_reason": None, "token_ids": None}
    head = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "m"}
    return msgspec.json.encode({**head, "choices": [choice], "usage": USAGE})


def chat_stream(finish: str, *deltas: Json) -> bytes:
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    chunks = [{**head, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    last = {**head, "choices": [{"index": 0, "delta": {}, "finish_reason": finish}]}
    return sse({**head, "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}, *chunks, last)[
        : -len(b"data: [DONE]\n\n")
    ] + sse({**head, "choices": [], "usage": USAGE})


def _argument_deltas() -> list[Json]:
    first = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "weather", "arguments": ""}}
    rest = [{"index": 0, "function": {"arguments": ARGUMENTS[at : at + 5]}} for at in range(0, len(ARGUMENTS), 5)]
    return [{"tool_calls": [each]} for each in (first, *rest, {"index": 1, **SECOND})]


CHAT = {
    "text": chat_answer("stop", content="Hello, wörld."),
    "tools": chat_answer("tool_calls", tool_calls=[CALL, SECOND]),
    "text, streamed": chat_stream("stop", {"reasoning": "Hm."}, *[{"content": c} for c in "Hello, wörld."]),
    "tools, streamed": chat_stream("tool_calls", {"content": "Wait."}, *_argument_deltas()),
}

MESSAGE_USAGE = {
    "input_tokens": 14,
    "output_tokens": 7,
    "cache_read_input_tokens": 16,
    "cache_creation_input_tokens": 0,
}
MESSAGE = {"id": "msg_1", "type": "message", "role": "assistant", "model": "m", "stop_sequence": None}
TOOL_USE = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Zürich", "days": 2}}


def _message(stop: str, *content: Json) -> bytes:
    return msgspec.json.encode({**MESSAGE, "content": content, "stop_reason": stop, "usage": MESSAGE_USAGE})


def _message_stream(stop: str, *blocks: tuple[Json, list[Json]]) -> bytes:
    start = {**MESSAGE, "content": [], "stop_reason": None, "usage": MESSAGE_USAGE | {"output_tokens": 0}}
    events: list[Json] = [{"type": "message_start", "message": start}, {"type": "ping"}]
    for index, (block, deltas) in enumerate(blocks):
        events.append({"type": "content_block_start", "index": index, "content_block": block})
        events += [{"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas]
        events.append({"type": "content_block_stop", "index": index})
    end = {"stop_reason": stop, "stop_sequence": None}
    events += [
        {"type": "message_delta", "delta": end, "usage": {"output_tokens": 7, "input_tokens": None}},
        {"type": "message_stop"},
    ]
    return sse(*events, names=True, done=False)


_WORDS: tuple[Json, list[Json]] = (
    {"type": "text", "text": ""},
    [{"type": "text_delta", "text": piece} for piece in "Hello, wörld."],
)
_THOUGHT: tuple[Json, list[Json]] = (
    {"type": "thinking", "thinking": "", "signature": ""},
    [{"type": "thinking_delta", "thinking": "Hm."}, {"type": "signature_delta", "signature": "s"}],
)
_USE: tuple[Json, list[Json]] = (
    {**TOOL_USE, "input": {}},
    [{"type": "input_json_delta", "partial_json": ARGUMENTS[at : at + 5]} for at in range(0, len(ARGUMENTS), 5)],
)
MESSAGES = {
    "text": _message("end_turn", {"type": "text", "text": "Hello, wörld."}),
    "tools": _message("tool_use", {"type": "text", "text": "Wait."}, TOOL_USE),
    "text, streamed": _message_stream("end_turn", _WORDS),
    "tools, streamed": _message_stream("tool_use", _THOUGHT, _WORDS, _USE),
}

_REASONING = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]}
_TEXT = {"type": "output_text", "text": "Hello, wörld.", "annotations": [], "logprobs": None}
_SAID = {"type": "message", "id": "m_1", "role": "assistant", "status": "completed", "content": [_TEXT]}
_CALLED = {"type": "function_call", "id": "fc_1", "call_id": "call_1", "name": "weather", "arguments": ARGUMENTS}


def response(*output: Json) -> Json:
    usage = {"input_tokens": 30, "input_tokens_details": {"cached_tokens": 16, "cache_write_tokens": 0}}
    usage |= {"output_tokens": 7, "output_tokens_details": {"reasoning_tokens": 3}, "total_tokens": 37}
    head = {"id": "resp_1", "object": "response", "created_at": 1, "model": "m", "status": "completed"}
    rest = {"parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "error": None, "incomplete_details": None}
    return {**head, **rest, "output": output, "usage": usage}


def response_stream(*output: Json) -> bytes:
    begun = {**response(), "status": "in_progress", "usage": None}
    events: list[Json] = [{"type": "response.created", "response": begun}]
    for index, item in enumerate(output):
        events.append({"type": "response.output_item.added", "output_index": index, "item": item})
        events.append({"type": "response.output_item.done", "output_index": index, "item": item})
    events.append({"type": "response.completed", "response": response(*output)})
    return sse(*({**event, "sequence_number": at} for at, event in enumerate(events)), names=True, done=False)


RESPONSES = {
    "text": msgspec.json.encode(response(_REASONING, _SAID)),
    "tools": msgspec.json.encode(response(_REASONING, _SAID, _CALLED)),
    "text, streamed": response_stream(_REASONING, _SAID),
    "tools, streamed": response_stream(_SAID, _CALLED),
}


def _completion(text: str, finish: str | None = None) -> Json:
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}
    return {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "m", "choices": [choice]}


COMPLETIONS = {
    "text": msgspec.json.encode({**_completion("Hello, wörld.", "length"), "usage": USAGE}),
    "text, streamed": sse(
        *map(_completion, "Hello, wörld."), {**_completion("", "stop"), "usage": None}, {"choices": [], "usage": USAGE}
    ),
}
EXAMPLES = {
    Dialect.CHAT: CHAT,
    Dialect.COMPLETIONS: COMPLETIONS,
    Dialect.RESPONSES: RESPONSES,
    Dialect.MESSAGES: MESSAGES,
}
ASKED: dict[Dialect, Json] = {
    Dialect.CHAT: {"model": "m", "messages": [{"role": "user", "content": "Hi"}]},
    Dialect.COMPLETIONS: {"model": "m", "prompt": "Hi"},
    Dialect.RESPONSES: {"model": "m", "input": "Hi"},
    Dialect.MESSAGES: {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}]},
}


def content_type(name: str) -> str:
    """Of the example of that name."""
    return STREAM if name.endswith("streamed") else JSON


@dataclass
class Desk:
    """A server that notes the last request's body and answers with what lies in `status`, `kind` and `raw`."""

    status: int = 200
    kind: str = JSON
    raw: bytes = b"{}"
    body: bytes = b""
    url: str = field(default="")

    async def answer(self, request: Request) -> Response:
        """Any POST."""
        self.body = await request.body()
        return Response(self.raw, self.status, {"content-type": self.kind})

    def openai(self) -> openai.OpenAI:
        """OpenAI's client of it."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="k", max_retries=0)

    def anthropic(self) -> anthropic.Anthropic:
        """Anthropic's client of it."""
        return anthropic.Anthropic(base_url=self.url, api_key="k", max_retries=0)


@contextmanager
def desk() -> Iterator[Desk]:
    """A running one."""
    found = Desk()
    app = Starlette(routes=[Route("/{path:path}", found.answer, methods=["POST"])])
    listener = socket.create_server(("127.0.0.1", 0))
    found.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield found
    finally:
        server.should_exit = True
        thread.join()
