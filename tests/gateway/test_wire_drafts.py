"""Drafts hold what shapes a coming prompt; cut shorter, they still begin as it does."""

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_examples import ASKED, CALL, EXAMPLES, JSON, TOOL_USE, TOOLS

from kvprefetch.gateway.contract import Answered, Asked, Dialect, Draft, Json
from kvprefetch.gateway.wire import (
    next_draft,
    one_token,
    opening_draft,
    read_answer,
    read_request,
    request_draft,
    text_length,
    truncated,
)

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "What is the weather?"}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "Rain, then sun."}
SAMPLING = {"temperature": 1, "max_tokens": 9, "stream": True, "cache_salt": "s", "user": "u", "seed": 3}


def read(dialect: Dialect, **more: Any) -> Asked:
    return read_request(dialect, msgspec.json.encode(ASKED[dialect] | more))


def draft_of(dialect: Dialect, **more: Any) -> Draft:
    draft = request_draft(read(dialect, **more))
    assert draft is not None
    return draft


@pytest.mark.parametrize("dialect", Dialect)
def test_a_draft_of_a_request_is_its_prompt_as_it_stands(dialect: Dialect) -> None:
    asked = read(dialect, **SAMPLING)
    draft = request_draft(asked)
    assert draft is not None
    assert set(draft.body) == {"model", set(ASKED[dialect]).difference(["model", "max_tokens"]).pop()}
    assert (draft.exact, draft.salt, draft.canonical) == (True, "s", (asked.opening, *asked.turns))
    again = read_request(dialect, msgspec.json.encode(draft.body))
    assert (again.opening, *again.turns) == draft.canonical


def test_only_the_request_itself_ends_as_it_asks() -> None:
    asked = read(Dialect.CHAT, add_generation_prompt=False, tools=TOOLS)
    itself, coming = request_draft(asked), next_draft(asked, Answered())
    assert itself is not None
    assert coming is not None
    assert itself.body["add_generation_prompt"] is False
    assert "add_generation_prompt" not in coming.body
    assert itself.body["tools"] == coming.body["tools"] == TOOLS


@pytest.mark.parametrize("dialect", Dialect)
def test_the_next_prompt_begins_with_prompt_and_answer(dialect: Dialect) -> None:
    asked = read(dialect)
    answered = read_answer(asked, 200, JSON, EXAMPLES[dialect]["text"])
    draft = next_draft(asked, answered)
    assert draft is not None
    assert b"".join(draft.canonical) == b"".join((asked.opening, *asked.turns, answered.turn))
    assert not draft.exact
    again = read_request(dialect, msgspec.json.encode(draft.body))
    assert (again.opening, *again.turns) == draft.canonical
    cut_off = next_draft(asked, Answered())
    assert cut_off is not None
    assert cut_off.canonical == (asked.opening, *asked.turns)
    limit = "max_output_tokens" if dialect is Dialect.RESPONSES else "max_tokens"
    prewarm = read(dialect, **{limit: 0})
    warm = next_draft(prewarm, answered)
    assert warm is not None
    assert warm.canonical == cut_off.canonical


def test_nothing_is_known_of_what_the_engine_keeps() -> None:
    asked = read(Dialect.RESPONSES, previous_response_id="resp_1", instructions="Be brief.")
    answered = read_answer(asked, 200, JSON, EXAMPLES[Dialect.RESPONSES]["text"])
    assert next_draft(asked, answered) is opening_draft(asked) is None
    assert request_draft(asked) is not None


def test_of_an_answer_that_the_client_began_only_what_came_before_is_sure() -> None:
    asked = read(Dialect.MESSAGES, messages=[USER, {"role": "assistant", "content": "It is"}])
    answered = read_answer(asked, 200, JSON, EXAMPLES[Dialect.MESSAGES]["text"])
    draft = next_draft(asked, answered)
    assert draft is not None
    assert draft.body["messages"] == [USER]
    assert draft.canonical == (asked.opening, asked.turns[0])
    assert next_draft(read(Dialect.MESSAGES, messages=[{"role": "assistant", "content": "I"}]), answered) is None


@pytest.mark.parametrize(
    ("dialect", "more", "kept"),
    [
        (Dialect.CHAT, {"messages": [SYSTEM, USER]}, {"messages": [SYSTEM]}),
        (Dialect.CHAT, {"messages": [USER], "tools": TOOLS}, {"messages": [], "tools": TOOLS}),
        (Dialect.RESPONSES, {"instructions": "Be brief."}, {"instructions": "Be brief.", "input": []}),
        (Dialect.RESPONSES, {"input": [SYSTEM, USER]}, {"input": [SYSTEM]}),
        (Dialect.MESSAGES, {"system": "Be brief."}, {"system": "Be brief.", "messages": []}),
        (Dialect.MESSAGES, {}, None),
        (Dialect.CHAT, {"tools": []}, None),
        (Dialect.COMPLETIONS, {}, None),
    ],
    ids=str,
)
def test_the_opening_alone(dialect: Dialect, more: Json, kept: Json | None) -> None:
    asked = read(dialect, **more, **SAMPLING)
    draft = opening_draft(asked)
    if kept is None:
        assert draft is None
    else:
        assert draft is not None
        assert draft.body == {"model": "m", **kept}
        assert (draft.canonical, draft.exact) == ((asked.opening,), False)
        assert list(truncated(draft, 1).values())[-1]  # engines want a message


CONVERSATION = [SYSTEM, USER, CALLED, RESULT, {"role": "user", "content": [{"type": "text", "text": "Thanks, all."}]}]
BLOCKS = [
    USER,
    {"role": "assistant", "content": [{"type": "text", "text": "I look."}, TOOL_USE]},
    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "Rain, then sun."}]},
    {"role": "user", "content": [{"type": "text", "text": "Thanks,"}, {"type": "text", "text": "all."}]},
]
ITEMS = [
    USER,
    {"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "call_1", "output": "Rain, then sun."},
    {"role": "user", "content": [{"type": "input_text", "text": "Thanks, all."}]},
]
LONG = [
    draft_of(Dialect.CHAT, messages=CONVERSATION, tools=TOOLS),
    draft_of(Dialect.MESSAGES, messages=BLOCKS, system="Be brief."),
    draft_of(Dialect.RESPONSES, input=ITEMS, instructions="Be brief."),
    draft_of(Dialect.COMPLETIONS, prompt="Once upon a time, thrice."),
    draft_of(Dialect.COMPLETIONS, prompt=list(range(20))),
]


@settings(deadline=None)
@given(st.sampled_from(LONG), st.integers(0, 600), st.integers(0, 600))
def test_a_shorter_draft_is_a_beginning_of_a_longer_one(draft: Draft, some: int, more: int) -> None:
    some, more = sorted((some, more))
    short, long = (truncated(draft, chars) for chars in (some, more))
    for first, second in ((short, long), (long, draft.body)):
        beginning = linear(first)
        assert beginning
        assert linear(second)[: len(beginning)] == beginning
    assert truncated(draft, text_length(draft)) == draft.body


def linear(body: Json) -> list[Any]:
    """The prompt's text in order, each character with what it stands in; a call is one."""
    if "prompt" in body:
        return list(body["prompt"])
    found: list[Any] = []
    for at, item in enumerate(body.get("messages", body.get("input"))):
        content = item.get("output", item.get("content"))
        parts = content if isinstance(content, list) else [{"text": content or ""}]
        for number, part in enumerate(parts):
            words = part.get("text", part.get("content", ""))
            found += [(at, number, letter) for letter in words] if isinstance(words, str) and words else []
            found += [(at, "call")] if part.get("type") == "tool_use" else []
        found += [(at, "call")] if item.get("tool_calls") or "arguments" in item else []
    return found


@settings(deadline=None)
@given(st.sampled_from(LONG), st.integers(0, 600))
def test_a_shorter_draft_has_about_the_characters_asked_for(draft: Draft, chars: int) -> None:
    length = _length(draft, truncated(draft, chars))
    least = min(chars, text_length(draft))
    opening = _length(draft, truncated(draft, 0))
    assert length <= max(least, opening)
    assert length > least - 50  # a message with a call is there or not


def _length(draft: Draft, body: Json) -> int:
    return text_length(Draft(draft.dialect, body, draft.canonical))


def test_a_call_is_kept_whole_or_not_at_all() -> None:
    draft = LONG[0]
    seen = set()
    for chars in range(text_length(draft) + 1):
        kept = truncated(draft, chars)["messages"]
        assert kept[0] == SYSTEM
        assert len(kept) > 1
        assert all(message == CALLED for message in kept if message["role"] == "assistant")
        assert all(kept[at - 1] == CALLED for at, message in enumerate(kept) if message["role"] == "tool")
        seen.add(len(kept))
    assert seen == {2, 3, 4, 5}


@pytest.mark.parametrize("dialect", Dialect)
def test_a_request_for_one_token_is_cheap_and_not_kept(dialect: Dialect) -> None:
    body = one_token(draft_of(dialect).body, dialect)
    limit = "max_output_tokens" if dialect is Dialect.RESPONSES else "max_tokens"
    assert (body[limit], body["temperature"], body["stream"]) == (1, 0, False)
    assert body.get("store") is (False if dialect is Dialect.RESPONSES else None)


def test_a_budget_for_thinking_does_not_refuse_one_token() -> None:
    draft = draft_of(Dialect.MESSAGES, thinking={"type": "enabled", "budget_tokens": 2048})
    assert one_token(draft.body, Dialect.MESSAGES)["thinking"] == {"type": "adaptive"}
    assert draft.body["thinking"]["type"] == "enabled"
