"""Requests are read for what shapes their prompt: canonical bytes tell prompts apart, and beginnings from others."""

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_examples import ASKED, CALL, TOOL_USE, TOOLS

from kvprefetch.errors import InvalidRequest
from kvprefetch.gateway.contract import Answered, Asked, Dialect, Json
from kvprefetch.gateway.wire import (
    dialect_of,
    next_draft,
    opening_draft,
    read_request,
    request_draft,
    text_length,
    truncated,
)

dialects = st.sampled_from(Dialect)
talks = st.sampled_from([Dialect.CHAT, Dialect.RESPONSES, Dialect.MESSAGES])
words = st.text(st.characters(codec="utf-8"), max_size=12)
json = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | words | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)
NAMES = ["model", "messages", "input", "prompt", "system", "instructions", "tools", "max_tokens", "stream", "thinking"]
NAMES += ["prompt_cache_options", "conversation", "tool_choice", "cache_salt", "echo", "function_call", "documents"]
KEYS = ["role", "content", "tool_calls", "function", "arguments", "type", "text", "name", "output", "input", "id"]
KINDS = ["text", "user", "assistant", "system", "tool_use", "tool_result", "function_call", "reasoning", "message"]
odd = st.recursive(
    json | st.sampled_from(KINDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)


def read(dialect: Dialect, **more: Any) -> Asked:
    return read_request(dialect, msgspec.json.encode(ASKED[dialect] | more))


def said(dialect: Dialect, messages: Any, **more: Any) -> Asked:
    return read(dialect, **{"input" if dialect is Dialect.RESPONSES else "messages": messages}, **more)


def user(content: Any) -> Json:
    return {"role": "user", "content": content}


def canonical(asked: Asked) -> bytes:
    return b"".join((asked.opening, *asked.turns))


def test_paths_name_dialects() -> None:
    assert [dialect_of(each.value) for each in Dialect] == list(Dialect)
    assert dialect_of("/v1/messages?beta=true") is Dialect.MESSAGES
    assert dialect_of("/v1/models") is dialect_of("/v1/messages/count_tokens") is None


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"1", b'"\xff"', b"{}x", b'{"a":' * 100_000, b'{"a":"\\ud800"}'])
@pytest.mark.parametrize("dialect", Dialect)
def test_what_is_no_json_object_is_refused(dialect: Dialect, body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        read_request(dialect, body)


@settings(deadline=None)
@given(dialects, st.dictionaries(st.sampled_from(NAMES), odd, max_size=6), st.integers(0, 50))
def test_odd_fields_are_passed_over(dialect: Dialect, body: Json, chars: int) -> None:
    asked = read_request(dialect, msgspec.json.encode(body))
    assert asked.body == body
    for draft in (request_draft(asked), opening_draft(asked), next_draft(asked, Answered())):
        if draft is not None:
            assert text_length(draft) >= 0
            truncated(draft, chars)
    assert asked.body == body


@pytest.mark.parametrize("messages", [None, "text", 3, {}, [], ["text"], [[]]])
def test_messages_that_are_no_messages_are_no_turns(messages: Any) -> None:
    for dialect in (Dialect.CHAT, Dialect.MESSAGES):
        asked = said(dialect, messages, tools=TOOLS)
        assert (asked.opening, asked.turns) == (b"", ())
        assert request_draft(asked) is opening_draft(asked) is next_draft(asked, Answered()) is None


turn = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": words})


@settings(deadline=None)
@given(talks, st.lists(turn, min_size=1, max_size=6), st.data())
def test_a_conversation_that_goes_on_begins_with_the_bytes_that_it_had(
    dialect: Dialect, messages: list[Json], data: st.DataObject
) -> None:
    end = data.draw(st.integers(1, len(messages)))
    assert canonical(said(dialect, messages)).startswith(canonical(said(dialect, messages[:end])))


@settings(deadline=None)
@given(talks, st.lists(turn, min_size=1, max_size=4), st.lists(turn, min_size=1, max_size=4))
def test_the_bytes_of_one_conversation_begin_another_only_if_its_messages_do(
    dialect: Dialect, some: list[Json], others: list[Json]
) -> None:
    is_beginning = canonical(said(dialect, others)).startswith(canonical(said(dialect, some)))
    assert is_beginning == (others[: len(some)] == some)


@settings(deadline=None)
@given(words.filter(bool), words)
def test_a_longer_prompt_begins_with_the_bytes_of_a_shorter_one(first: str, rest: str) -> None:
    short, long = read(Dialect.COMPLETIONS, prompt=first), read(Dialect.COMPLETIONS, prompt=first + rest)
    assert long.turns[0].startswith(short.turns[0])
    ids = list(map(ord, first + rest))
    short, long = read(Dialect.COMPLETIONS, prompt=ids[: len(first)]), read(Dialect.COMPLETIONS, prompt=[ids])
    assert long.turns[0].startswith(short.turns[0])
    assert long.opening == short.opening != read(Dialect.COMPLETIONS, prompt=first).opening


@pytest.mark.parametrize("prompt", ["", [], None, ["a", "b"], [[1], [2]], [-1], [2**32], [True], [1.5], {}])
def test_a_batch_of_prompts_is_not_prepared(prompt: Any) -> None:
    asked = read(Dialect.COMPLETIONS, prompt=prompt)
    assert (asked.opening, asked.turns, request_draft(asked)) == (b"", (), None)


@pytest.mark.parametrize(
    "other",
    [
        {"role": "assistant", "content": [], "tool_calls": [CALL], "refusal": None, "reasoning_content": "Hm."},
        {"role": "assistant", "content": "", "tool_calls": [CALL | {"id": "another"}], "audio": None},
        {"role": "assistant", "tool_calls": [CALL | {"function": {"name": "weather", "arguments": TOOL_USE["input"]}}]},
        {"role": "assistant", "content": None, "function_call": CALL["function"]},
    ],
)
def test_one_call_is_one_however_it_is_written(other: Json) -> None:
    usual = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    assert said(Dialect.CHAT, [usual]).turns == said(Dialect.CHAT, [other]).turns
    result = {"role": "tool", "tool_call_id": "call_1", "content": "Rain."}
    same = {"role": "tool", "tool_call_id": "call_9", "content": [{"type": "text", "text": "Rain."}]}
    assert said(Dialect.CHAT, [result]).turns == said(Dialect.CHAT, [same]).turns


def test_other_arguments_or_another_order_are_another_call() -> None:
    def call(arguments: str) -> tuple[bytes, ...]:
        function = {"name": "f", "arguments": arguments}
        return said(Dialect.CHAT, [{"role": "assistant", "tool_calls": [CALL | {"function": function}]}]).turns

    assert call('{"a":1,"b":2}') == call('{ "a": 1, "b": 2 }')
    assert len({call('{"a":1,"b":2}'), call('{"b":2,"a":1}'), call("{}"), call("{broken"), call('"{broken"')}) == 5
    assert call("") == call("{}")


@pytest.mark.parametrize(
    ("dialect", "change"),
    [
        (Dialect.CHAT, {"model": "n"}),
        (Dialect.CHAT, {"tools": TOOLS}),
        (Dialect.CHAT, {"tool_choice": "none"}),
        (Dialect.CHAT, {"chat_template": "{{ messages }}"}),
        (Dialect.CHAT, {"chat_template_kwargs": {"enable_thinking": False}}),
        (Dialect.CHAT, {"documents": [{"text": "x"}]}),
        (Dialect.CHAT, {"reasoning_effort": "low"}),
        (Dialect.CHAT, {"add_special_tokens": False}),
        (Dialect.COMPLETIONS, {"add_special_tokens": False}),
        (Dialect.RESPONSES, {"instructions": "Be brief."}),
        (Dialect.RESPONSES, {"previous_response_id": "resp_1"}),
        (Dialect.MESSAGES, {"system": "Be brief."}),
        (Dialect.MESSAGES, {"thinking": {"type": "disabled"}}),
        (Dialect.MESSAGES, {"tool_choice": {"type": "none"}}),
    ],
    ids=str,
)
def test_what_shapes_the_beginning_is_in_the_opening(dialect: Dialect, change: Json) -> None:
    assert read(dialect, **change).opening != read(dialect).opening


@pytest.mark.parametrize(
    ("dialect", "change"),
    [
        (Dialect.CHAT, {"temperature": 1, "max_tokens": 3, "user": "u", "metadata": {"a": 1}, "stream": True}),
        (Dialect.CHAT, {"tool_choice": "auto", "tools": [], "cache_salt": "s", "seed": 1, "unknown": [1]}),
        (Dialect.RESPONSES, {"store": False, "max_output_tokens": 3, "instructions": None}),
        (Dialect.MESSAGES, {"metadata": {"user_id": "u"}, "tool_choice": {"type": "any"}, "stop_sequences": ["x"]}),
        (Dialect.MESSAGES, {"system": [{"type": "text", "text": "x-anthropic-billing-header: cch=1"}]}),
    ],
    ids=str,
)
def test_what_does_not_shape_the_prompt_is_in_no_canonical_bytes(dialect: Dialect, change: Json) -> None:
    assert canonical(read(dialect, **change)) == canonical(read(dialect))


def test_marks_for_caches_are_no_part_of_a_prompt() -> None:
    mark = {"cache_control": {"type": "ephemeral"}}
    tools = [{"name": "f", "input_schema": {}}]
    words: Json = {"type": "text", "text": "Hi"}
    result = {"type": "tool_result", "tool_use_id": "t", "content": [words]}
    plain = said(Dialect.MESSAGES, [user("Hi"), user([result, words])], system="S", tools=tools)
    marked = said(
        Dialect.MESSAGES,
        [user([words | mark]), user([result | mark | {"content": "Hi"}, words | mark])],
        system=[{"type": "text", "text": "S"} | mark],
        tools=[tools[0] | mark],
    )
    assert canonical(plain) == canonical(marked)
    picture = {"type": "image", "source": {"type": "url", "url": "http://host/picture"}}
    assert canonical(said(Dialect.MESSAGES, [user([picture])])) == canonical(
        said(Dialect.MESSAGES, [user([picture | mark])])
    )


def test_a_budget_for_thinking_is_no_part_of_a_prompt() -> None:
    small, large = ({"type": "enabled", "budget_tokens": budget} for budget in (1024, 4096))
    assert read(Dialect.MESSAGES, thinking=small).opening == read(Dialect.MESSAGES, thinking=large).opening


def test_a_leading_system_message_belongs_to_the_opening() -> None:
    system = {"role": "system", "content": "Be brief."}
    for dialect in (Dialect.CHAT, Dialect.RESPONSES):
        first, second = said(dialect, [system, user("a")]), said(dialect, [system, user("b"), system])
        assert first.opening == second.opening != said(dialect, [user("a")]).opening
        assert (len(first.turns), len(second.turns)) == (1, 2)


def test_pictures_are_no_text_and_short_in_canonical_bytes() -> None:
    data = "data:image/png;base64," + "A" * 100_000
    image = {"type": "image_url", "image_url": {"url": data}}
    source = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}}
    for dialect, part in ((Dialect.CHAT, image), (Dialect.MESSAGES, source)):
        asked = said(dialect, [user([{"type": "text", "text": "Look"}, part])])
        assert not asked.is_text
        assert len(canonical(asked)) < 500
        changed = msgspec.json.decode(msgspec.json.encode(part).replace(b"AAAA", b"AAAB", 1))
        assert canonical(asked) != canonical(said(dialect, [user([{"type": "text", "text": "Look"}, changed])]))
    screen = {"type": "computer_call_output", "call_id": "c", "output": {"type": "computer_screenshot"}}
    assert not said(Dialect.RESPONSES, [user("Look"), screen]).is_text
    assert not said(Dialect.MESSAGES, [user([{"type": "tool_result", "content": [source]}])]).is_text
    assert said(Dialect.MESSAGES, [user([{"type": "tool_result", "content": "Rain."}])]).is_text


@pytest.mark.parametrize(
    ("change", "is_prewarm"),
    [
        ({"prompt_cache_options": {"prewarm": True}, "max_tokens": 9}, True),
        ({"max_tokens": False}, False),
        ({"max_tokens": 0.0}, False),
        ({"max_tokens": "0"}, False),
        ({"max_tokens": 1}, False),
        ({"prompt_cache_options": {"prewarm": 1}}, False),
        ({"prompt_cache_options": True}, False),
    ],
    ids=str,
)
def test_a_prewarm_request_is_known(change: Json, is_prewarm: bool) -> None:
    assert all(read(dialect, **change).prewarm is is_prewarm for dialect in Dialect)


@pytest.mark.parametrize(
    ("dialect", "change", "is_prewarm"),
    [
        (Dialect.CHAT, {"max_tokens": 0}, True),
        (Dialect.CHAT, {"max_completion_tokens": 0, "max_tokens": 5}, True),
        (Dialect.CHAT, {"max_completion_tokens": 5, "max_tokens": 0}, False),
        (Dialect.CHAT, {"max_completion_tokens": None, "max_tokens": 0}, True),
        (Dialect.CHAT, {"max_tokens": 0, "prompt_logprobs": 1}, False),
        (Dialect.MESSAGES, {"max_tokens": 0}, True),
        (Dialect.RESPONSES, {"max_output_tokens": 0}, True),
        (Dialect.RESPONSES, {"max_tokens": 0}, False),
        (Dialect.COMPLETIONS, {"max_tokens": 0, "echo": False, "logprobs": None}, True),
        (Dialect.COMPLETIONS, {"max_tokens": 0, "echo": True}, False),
        (Dialect.COMPLETIONS, {"max_tokens": 0, "logprobs": 0}, False),
        (Dialect.COMPLETIONS, {"max_tokens": 0, "prompt_logprobs": 0}, False),
    ],
    ids=str,
)
def test_the_limit_that_counts_is_0_and_the_prompt_is_not_to_be_scored(
    dialect: Dialect, change: Json, is_prewarm: bool
) -> None:
    assert read(dialect, **change).prewarm is is_prewarm


def test_what_else_the_gateway_asks_of_a_request() -> None:
    asked = read(Dialect.RESPONSES, stream=True, cache_salt="s", previous_response_id="r")
    assert (asked.model, asked.stream, asked.salt, asked.previous) == ("m", True, "s", "r")
    assert read(Dialect.RESPONSES, conversation={"id": "c"}).previous == "c"
    assert read(Dialect.RESPONSES, conversation="c").previous == "c"
    assert "Hi" not in repr(asked)
    text = said(Dialect.RESPONSES, [user([{"type": "input_text", "text": "Hi"}])])
    assert canonical(text) == canonical(read(Dialect.RESPONSES, input="Hi"))
