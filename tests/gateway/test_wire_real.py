"""The dialects as a real vLLM speaks them: it takes what is written for it, and what it answers is read."""

from itertools import pairwise
from typing import Any

import httpx
import msgspec
import pytest
from real_engines import RealEngine, needs_vllm

from kvprefetch.gateway.contract import Answered, Asked, Dialect, Draft, Json
from kvprefetch.gateway.wire import (
    next_draft,
    one_token,
    read_answer,
    read_request,
    request_draft,
    text_length,
    truncated,
)

pytestmark = needs_vllm
LIMITS = {Dialect.RESPONSES: "max_output_tokens"}


def question(dialect: Dialect, model: str, stream: bool) -> Json:
    """A prompt that no other test has, some hundreds of tokens long."""
    words = f"{dialect.value} {stream} " + "the river runs to the sea and the road does not. " * 24
    said = [{"role": "user", "content": words}, {"role": "assistant", "content": "Yes."}]
    said.append({"role": "user", "content": words[::-1]})
    head: Json = {"model": model, "temperature": 0, "stream": stream, LIMITS.get(dialect, "max_tokens"): 6}
    head |= {"ignore_eos": True} if dialect is not Dialect.MESSAGES else {}
    if stream and dialect in (Dialect.CHAT, Dialect.COMPLETIONS):
        head["stream_options"] = {"include_usage": True}
    prompts: dict[Dialect, Json] = {
        Dialect.CHAT: {"messages": said},
        Dialect.COMPLETIONS: {"prompt": words},
        Dialect.RESPONSES: {"instructions": words, "input": said},
        Dialect.MESSAGES: {"system": words, "messages": said},
    }
    return head | prompts[dialect]


def ask(engine: RealEngine, dialect: Dialect, body: Json) -> tuple[Asked, Answered]:
    raw = msgspec.json.encode(body)
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{engine.url}{dialect.value}", content=raw, headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text
    asked = read_request(dialect, raw)
    return asked, read_answer(asked, answer.status_code, answer.headers["content-type"], answer.content)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("dialect", Dialect)
def test_pieces_of_one_token_warm_the_prompt_and_the_answer_says_so(
    tiny_vllm: RealEngine, dialect: Dialect, stream: bool
) -> None:
    body = question(dialect, tiny_vllm.model, stream)
    draft = request_draft(read_request(dialect, msgspec.json.encode(body)))
    assert draft is not None
    length = text_length(draft)
    pieces = [warm(tiny_vllm, draft, length * part // 4) for part in (1, 2, 3, 4)]
    assert all(after.cached_tokens >= before.prompt_tokens - 64 for before, after in pairwise(pieces))
    asked, answered = ask(tiny_vllm, dialect, body)
    assert (answered.kind, answered.output_tokens) == ("length", 6)
    assert answered.prompt_tokens is not None
    assert answered.cached_tokens is not None
    assert answered.cached_tokens > answered.prompt_tokens - 64
    coming = next_draft(asked, answered)
    assert coming is not None
    assert warm(tiny_vllm, coming, text_length(coming)).prompt_tokens > answered.prompt_tokens


def warm(engine: RealEngine, draft: Draft, chars: int) -> Any:
    """What the engine says of a request for one token."""
    _, answered = ask(engine, draft.dialect, one_token(truncated(draft, chars), draft.dialect))
    assert answered.output_tokens == 1
    return answered
