"""What the gateway itself answers, read by the official clients."""

from collections.abc import Iterator
from typing import Any

import anthropic
import msgspec
import openai
import pytest
from wire_examples import ASKED, JSON, STREAM, Desk, desk

from kvprefetch.gateway.contract import Asked, Dialect, Json, Warmed
from kvprefetch.gateway.wire import error_answer, prewarm_answer, read_answer, read_request

WARM = Warmed("warm", prompt_tokens=100, cached_tokens=96, expires_in_s=300.0)
BUSY = Warmed("pending", prompt_tokens=100, cached_tokens=0, expires_in_s=0.0, reason="the engine is busy")
SAID = {"outcome": "warm", "tokens": 96, "expires_at": 1_300, "reason": ""}
MESSAGES: Any = [{"role": "user", "content": "Hi"}]
USAGE = {"include_usage": True}


@pytest.fixture(scope="module")
def served() -> Iterator[Desk]:
    with desk() as found:
        yield found


def read(dialect: Dialect, **more: Any) -> Asked:
    return read_request(dialect, msgspec.json.encode(ASKED[dialect] | {"max_tokens": 0} | more))


def answer(served: Desk, dialect: Dialect, **more: Any) -> None:
    """Have the next request answered as a prewarm request."""
    served.status = 200
    served.kind, served.raw = prewarm_answer(read(dialect, **more), WARM, 1_000.9, "id_1")
    assert served.kind == (STREAM if more.get("stream") else JSON)


def test_openai_reads_a_warm_chat(served: Desk) -> None:
    answer(served, Dialect.CHAT)
    with served.openai() as client:
        found = client.chat.completions.create(model="m", messages=MESSAGES, max_tokens=0)
    assert type(found).model_validate(found.model_dump()).to_dict()["kvprefetch"] == SAID
    assert (found.choices[0].message.content, found.choices[0].finish_reason) == ("", "length")
    assert (found.id, found.created, found.model) == ("id_1", 1_000, "m")
    assert found.usage is not None
    assert found.usage.prompt_tokens_details is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.total_tokens) == (100, 0, 100)
    assert found.usage.prompt_tokens_details.cached_tokens == 96


@pytest.mark.parametrize("options", [USAGE, None])
def test_openai_reads_a_warm_chat_in_a_stream(served: Desk, options: Json | None) -> None:
    answer(served, Dialect.CHAT, stream=True, stream_options=options)
    with served.openai() as client:
        with client.chat.completions.stream(model="m", messages=MESSAGES) as stream:
            stream.until_done()  # the helper gives no final completion of any that ended with "length"
            found = stream.current_completion_snapshot
        chunks = list(client.chat.completions.create(model="m", messages=MESSAGES, stream=True))
    assert (found.choices[0].message.content, found.choices[0].finish_reason) == ("", "length")
    assert [type(chunk).model_validate(chunk.model_dump()) for chunk in chunks] == chunks
    assert chunks[-1].to_dict()["kvprefetch"] == SAID
    assert (chunks[-1].usage is not None) == (options is not None)


@pytest.mark.parametrize("stream", [False, True])
def test_openai_reads_a_warm_completion(served: Desk, stream: bool) -> None:
    answer(served, Dialect.COMPLETIONS, stream=stream, stream_options=USAGE)
    with served.openai() as client:
        found: Any = client.completions.create(model="m", prompt="Hi", stream=stream)
        chunks = list(found) if stream else [found]
    assert (chunks[0].choices[0].text, chunks[0].choices[0].finish_reason) == ("", "length")
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == 96
    assert chunks[-1].kvprefetch == SAID


def test_openai_reads_a_warm_response(served: Desk) -> None:
    tools = [{"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": False}]
    answer(served, Dialect.RESPONSES, instructions="Be brief.", tools=tools)
    with served.openai() as client:
        found = client.responses.create(model="m", input="Hi")
    checked = type(found).model_validate(found.model_dump())
    assert checked.to_dict()["kvprefetch"] == SAID
    assert (checked.status, checked.output, checked.output_text) == ("incomplete", [], "")
    assert checked.incomplete_details is not None
    assert checked.incomplete_details.reason == "max_output_tokens"
    assert checked.usage is not None
    assert checked.usage.input_tokens_details.cached_tokens == 96


def test_openai_reads_a_warm_response_in_a_stream(served: Desk) -> None:
    answer(served, Dialect.RESPONSES, stream=True)
    with served.openai() as client:
        events = list(client.responses.create(model="m", input="Hi", stream=True))
        with client.responses.stream(model="m", input="Hi") as stream:
            helped = [event.type for event in stream]
    kinds = [event.type for event in events]
    assert kinds == helped == ["response.created", "response.in_progress", "response.incomplete"]
    assert [type(event).model_validate(event.model_dump()) for event in events] == events
    last: Any = events[-1]
    assert last.response.kvprefetch == SAID


@pytest.mark.parametrize("stream", [False, True])
def test_anthropic_reads_a_warm_message(served: Desk, stream: bool) -> None:
    answer(served, Dialect.MESSAGES, stream=stream)
    with served.anthropic() as client:
        if stream:
            with client.messages.stream(model="m", max_tokens=1, messages=MESSAGES) as events:
                found: Any = events.get_final_message()
            raw: Any = list(client.messages.create(model="m", max_tokens=1, messages=MESSAGES, stream=True))
            assert raw[1].kvprefetch == SAID
            assert [type(event).model_validate(event.model_dump()) for event in raw] == raw
        else:
            found = client.messages.create(model="m", max_tokens=1, messages=MESSAGES)
            assert found.kvprefetch == SAID
            assert type(found).model_validate(found.model_dump()) == found
    assert (found.content, found.stop_reason) == ([], "max_tokens")
    usage = found.usage
    assert (usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens) == (4, 96, 0)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("dialect", Dialect)
def test_a_gateway_before_another_reads_its_answer(dialect: Dialect, stream: bool) -> None:
    asked = read(dialect, stream=stream, stream_options=USAGE)
    kind, raw = prewarm_answer(asked, WARM, 1_000.0, "id_1")
    found = read_answer(asked, 200, kind, raw)
    assert (found.kind, found.prompt_tokens, found.cached_tokens, found.output_tokens) == ("length", 100, 96, 0)


def test_what_is_not_warm_has_a_reason_and_no_expiry() -> None:
    _, raw = prewarm_answer(read(Dialect.CHAT), BUSY, 1_000.0, "id_1")
    said = msgspec.json.decode(raw)["kvprefetch"]
    assert said == {"outcome": "pending", "tokens": 0, "expires_at": None, "reason": "the engine is busy"}


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 429, 500, 502, 503, 504])
def test_the_official_clients_read_an_error(served: Desk, status: int) -> None:
    served.status, served.kind = status, JSON
    served.raw = error_answer(Dialect.CHAT, status, "no engine is there")
    with served.openai() as client, pytest.raises(openai.APIStatusError, match="no engine is there") as refused:
        client.chat.completions.create(model="m", messages=MESSAGES)
    assert refused.value.type
    assert error_answer(None, status, "no engine is there") == served.raw
    served.raw = error_answer(Dialect.MESSAGES, status, "no engine is there")
    with served.anthropic() as client, pytest.raises(anthropic.APIStatusError, match="no engine is there") as error:
        client.messages.create(model="m", max_tokens=1, messages=MESSAGES)
    assert error.value.type
