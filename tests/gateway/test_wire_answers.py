"""Answers are read for what a client will send back, whatever comes over the wire."""

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_examples import (
    ASKED,
    CALL,
    EXAMPLES,
    JSON,
    STREAM,
    TOOLS,
    Desk,
    chat_answer,
    content_type,
    desk,
    response,
    sse,
)

from kvprefetch.gateway.contract import Answered, Asked, Dialect, Json
from kvprefetch.gateway.wire import next_draft, read_answer, read_request

ALL = [(dialect, name) for dialect, named in EXAMPLES.items() for name in named]
TALKS = [(dialect, name) for dialect, name in ALL if dialect is not Dialect.COMPLETIONS]
ids = st.sampled_from(ALL)
anything = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.text(max_size=5) | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def asked(dialect: Dialect, **more: Any) -> Asked:
    return read_request(dialect, msgspec.json.encode(ASKED[dialect] | more))


@pytest.fixture(scope="module")
def served() -> Iterator[Desk]:
    with desk() as found:
        yield found


@pytest.mark.parametrize(("dialect", "name"), ALL, ids=str)
def test_an_answer_says_how_it_ended_and_what_it_cost(dialect: Dialect, name: str) -> None:
    found = read_answer(asked(dialect), 200, content_type(name), EXAMPLES[dialect][name])
    assert (found.prompt_tokens, found.cached_tokens, found.output_tokens) == (30, 16, 7)
    assert found.kind == ("tool weather" if name.startswith("tools") else found.kind)
    assert found.kind
    assert found.turn
    assert found.response_id.endswith("1")


@pytest.mark.parametrize(("dialect", "name"), TALKS, ids=str)
def test_what_the_official_client_sends_back_is_the_turn_that_was_read(
    served: Desk, dialect: Dialect, name: str
) -> None:
    served.kind, served.raw = content_type(name), EXAMPLES[dialect][name]
    first, second = exchange(served, dialect, name.endswith("streamed"))
    answered = read_answer(first, 200, content_type(name), EXAMPLES[dialect][name])
    assert second.opening == first.opening
    assert second.turns[:2] == (*first.turns, answered.turn)
    draft = next_draft(first, answered)
    assert draft is not None
    again = read_request(dialect, msgspec.json.encode(draft.body))
    assert draft.canonical == (again.opening, *again.turns) == (second.opening, *second.turns[:-1])


def exchange(served: Desk, dialect: Dialect, is_stream: bool) -> tuple[Asked, Asked]:
    """Two requests, the second one with the answer to the first sent back as the client's manual says."""
    talk = {Dialect.CHAT: _chat, Dialect.RESPONSES: _responses, Dialect.MESSAGES: _messages}[dialect]
    said: list[Any] = [{"role": "user", "content": "Hi"}]
    said = said + talk(served, said, is_stream)
    first = read_request(dialect, served.body)
    served.raw = EXAMPLES[dialect]["text"]
    served.kind = JSON
    talk(served, [*said, {"role": "user", "content": "And?"}], False)
    return first, read_request(dialect, served.body)


def _chat(served: Desk, said: list[Any], is_stream: bool) -> list[Any]:
    ask: Any = {"model": "m", "messages": said, "tools": TOOLS}
    with served.openai() as client:
        if not is_stream:
            return [client.chat.completions.create(**ask).choices[0].message]
        with client.chat.completions.stream(**ask) as stream:
            return [stream.get_final_completion().choices[0].message]


def _responses(served: Desk, said: list[Any], is_stream: bool) -> list[Any]:
    ask: Any = {"model": "m", "input": said, "instructions": "Be brief."}
    with served.openai() as client:
        if not is_stream:
            return list(client.responses.create(**ask).output)
        with client.responses.stream(**ask) as stream:
            return list(stream.get_final_response().output)


def _messages(served: Desk, said: list[Any], is_stream: bool) -> list[Any]:
    ask: Any = {"model": "m", "max_tokens": 99, "messages": said, "system": "Be brief."}
    with served.anthropic() as client:
        if not is_stream:
            return [{"role": "assistant", "content": client.messages.create(**ask).content}]
        with client.messages.stream(**ask) as stream:
            return [{"role": "assistant", "content": stream.get_final_message().content}]


@settings(deadline=None)
@given(ids, st.integers(0, 10_000))
def test_a_stream_that_is_cut_off_has_an_end_or_no_kind(which: tuple[Dialect, str], end: int) -> None:
    dialect, name = which
    raw = EXAMPLES[dialect][name]
    whole, part = (read_answer(asked(dialect), 200, content_type(name), bytes_) for bytes_ in (raw, raw[:end]))
    assert part.kind in ("", whole.kind)
    assert (part.turn, part.message) == ((whole.turn, whole.message) if part.kind else (b"", None))


@settings(deadline=None)
@given(st.sampled_from(Dialect), st.sampled_from([200, 500, 0]), st.sampled_from([STREAM, JSON, ""]), st.binary())
def test_no_bytes_are_too_odd(dialect: Dialect, status: int, kind: str, raw: bytes) -> None:
    assert isinstance(read_answer(asked(dialect), status, kind, raw), Answered)
    assert read_answer(asked(dialect), status, kind, raw).kind == ""


@settings(deadline=None)
@given(ids, st.data())
def test_no_value_is_too_odd(which: tuple[Dialect, str], data: st.DataObject) -> None:
    dialect, name = which
    raw = EXAMPLES[dialect][name]
    if name.endswith("streamed"):
        lines = [line[6:] for line in raw.splitlines() if line.startswith(b"data: {")]
        raw = sse(*(_bent(msgspec.json.decode(line), data) for line in lines))
    else:
        raw = msgspec.json.encode(_bent(msgspec.json.decode(raw), data))
    answered = read_answer(asked(dialect), 200, content_type(name), raw)
    next_draft(asked(dialect), answered)


def _bent(value: Any, data: st.DataObject) -> Any:
    """`value` with something in it replaced by anything."""
    if not isinstance(value, dict | list) or not value or data.draw(st.integers(0, 5)) == 0:
        return data.draw(anything)
    at = data.draw(st.sampled_from(list(value) if isinstance(value, dict) else range(len(value))))
    copy: Any = value.copy()
    copy[at] = _bent(value[at], data)
    return copy


def test_a_deep_nest_is_no_answer() -> None:
    raw = b'{"choices":' + b"[" * 200_000
    assert read_answer(asked(Dialect.CHAT), 200, JSON, raw) == Answered()
    arguments = "[" * 100_000
    call = {**CALL, "function": {"name": "dig", "arguments": arguments}}
    found = read_answer(asked(Dialect.CHAT), 200, JSON, chat_answer("tool_calls", tool_calls=[call]))
    assert found.kind == "tool dig"


@pytest.mark.parametrize("break_", [b"\n", b"\r\n", b"\r"])
def test_the_lines_of_a_stream_may_end_in_any_way(break_: bytes) -> None:
    raw = EXAMPLES[Dialect.CHAT]["tools, streamed"]
    whole, other = (read_answer(asked(Dialect.CHAT), 200, STREAM, r) for r in (raw, raw.replace(b"\n", break_)))
    assert whole == other
    assert whole.message["tool_calls"][0] == CALL


def test_of_several_answers_the_first_is_read() -> None:
    def chunk(index: int, text: str) -> Json:
        return {"choices": [{"index": index, "delta": {"content": text}, "finish_reason": "stop"}]}

    raw = sse(chunk(1, "no"), chunk(0, "yes"), chunk(1, "no"))
    found = read_answer(asked(Dialect.CHAT), 200, STREAM, raw)
    assert found.message == {"role": "assistant", "content": "yes"}


def test_a_call_that_ran_into_the_limit_was_not_made() -> None:
    raw = chat_answer("length", tool_calls=[CALL])
    assert read_answer(asked(Dialect.CHAT), 200, JSON, raw).kind == "length"
    long = {**CALL, "function": {"name": "n" * 100, "arguments": "{}"}}
    raw = chat_answer("tool_calls", tool_calls=[long])
    assert read_answer(asked(Dialect.CHAT), 200, JSON, raw).kind == "tool " + "n" * 64


def test_a_response_that_ran_into_the_limit_says_so() -> None:
    cut = {**response(), "status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
    assert read_answer(asked(Dialect.RESPONSES), 200, JSON, msgspec.json.encode(cut)).kind == "length"
    failed = {**response(), "status": "failed", "incomplete_details": None}
    assert read_answer(asked(Dialect.RESPONSES), 200, JSON, msgspec.json.encode(failed)).kind == ""


def test_an_answer_with_the_status_of_an_error_is_none() -> None:
    assert read_answer(asked(Dialect.CHAT), 500, JSON, EXAMPLES[Dialect.CHAT]["text"]) == Answered()


def test_an_error_in_the_midst_of_a_stream_is_no_end() -> None:
    raw = EXAMPLES[Dialect.CHAT]["text, streamed"].split(b"\n\n")[0] + b'\n\ndata: {"error": {"message": "no"}}\n\n'
    assert read_answer(asked(Dialect.CHAT), 200, STREAM, raw).kind == ""


def test_the_timings_of_llamacpp_say_what_its_stream_cost() -> None:
    chunk = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
    raw = sse(chunk | {"timings": {"cache_n": 5, "prompt_n": 3, "predicted_n": 2}})
    found = read_answer(asked(Dialect.CHAT), 200, STREAM, raw)
    assert (found.prompt_tokens, found.cached_tokens, found.output_tokens) == (8, 5, 2)


def test_an_echoed_prompt_is_no_part_of_the_answer() -> None:
    choice = {"index": 0, "text": "Hi there", "finish_reason": "stop"}
    raw = msgspec.json.encode({"choices": [choice]})
    found = read_answer(asked(Dialect.COMPLETIONS, echo=True), 200, JSON, raw)
    assert (found.turn, found.message) == (b" there", " there")
    choice["token_ids"] = [7]
    raw = msgspec.json.encode({"choices": [choice]})
    found = read_answer(asked(Dialect.COMPLETIONS, prompt=[1, 2]), 200, JSON, raw)
    assert (found.turn, found.message) == (b"\7\0\0\0", [7])
