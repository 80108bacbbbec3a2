"""Drafts cut by their text: each piece reaches as far as it says, and further than the last; the last is the whole."""

from dataclasses import replace
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from kvprefetch.gateway.contract import Dialect, Draft, Json
from kvprefetch.gateway.engines.probes import WORDS, followed, next_turn, two_ways
from kvprefetch.gateway.engines.text import RenderedText, TextRenderer
from kvprefetch.gateway.wire import text_length
from kvprefetch.gateway.wire.conversation import CONVERSATIONS

unhurried = settings(deadline=None, max_examples=60)  # busy machines are slow

USER = {"role": "user", "content": "What is in this handbook? " * 40}
ANSWER = {"role": "assistant", "content": "Parcels. " * 40}
CALLS: dict[Dialect, Json] = {  # a turn that calls two tools, or one
    Dialect.CHAT: {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": str(at), "type": "function", "function": {"name": "look"}} for at in (1, 2)],
    },
    Dialect.MESSAGES: {
        "role": "assistant",
        "content": [{"type": "tool_use", "id": str(at), "name": "look", "input": {"in": "x" * 300}} for at in (1, 2)],
    },
    Dialect.RESPONSES: {"type": "function_call", "call_id": "1", "name": "look", "arguments": "x" * 600},
}
OPENINGS: dict[Dialect, Json] = {
    Dialect.CHAT: {"tools": [{"type": "function", "function": {"name": "look", "description": "d" * 200}}]},
    Dialect.MESSAGES: {"system": "Read. " * 50},
    Dialect.RESPONSES: {"instructions": "Read. " * 50},
}


@st.composite
def drafts(draw: st.DrawFn) -> Draft:
    dialect = draw(st.sampled_from(list(Dialect)))
    exact, salt = draw(st.booleans()), draw(st.sampled_from(["", "salt"]))
    body: Json = {"model": "m"}
    if dialect is Dialect.COMPLETIONS:
        prompt = draw(st.one_of(st.text(min_size=1), st.lists(st.integers(0, 500), min_size=1)))
        return Draft(dialect, {**body, "prompt": prompt}, (b"",), exact=exact, salt=salt)
    turns = draw(st.lists(st.sampled_from([USER, ANSWER, CALLS[dialect]]), min_size=1, max_size=6))
    key = CONVERSATIONS[dialect].KEY
    return Draft(dialect, {**body, **OPENINGS[dialect], key: turns}, (b"",), exact=exact, salt=salt)


def rendered(draft: Draft) -> RenderedText:
    return TextRenderer().render(draft)


def sent(draft: Draft, end: int) -> dict[str, Any]:
    request = rendered(draft).request(end)
    assert request.path == draft.dialect.value
    body: dict[str, Any] = msgspec.json.decode(request.body)
    return body


@unhurried
@given(drafts(), st.integers(16, 500))
def test_pieces_reach_their_end_and_no_further_than_the_whole(draft: Draft, step: int) -> None:
    whole = rendered(draft)
    end = 0
    while end < whole.tokens:
        wanted = min(end + step, whole.tokens)
        request = whole.request(wanted)
        chars = text_length(replace(draft, body=msgspec.json.decode(request.body)))
        assert wanted <= request.end <= whole.tokens
        assert chars > (wanted - 1) * whole.chars_per_token - 4  # a token id counts as 4
        end = request.end


@unhurried
@given(drafts(), st.integers(1, 5_000))
def test_every_piece_asks_for_one_token_in_the_same_namespace(draft: Draft, end: int) -> None:
    body = sent(draft, min(end, rendered(draft).tokens))
    most = "max_output_tokens" if draft.dialect is Dialect.RESPONSES else "max_tokens"
    assert (body[most], body["model"], body.get("cache_salt", "")) == (1, "m", draft.salt)


@unhurried
@given(drafts())
def test_the_whole_is_the_draft_with_all_its_turns(draft: Draft) -> None:
    body = sent(draft, rendered(draft).tokens)
    if draft.dialect is Dialect.COMPLETIONS:
        assert body["prompt"] == draft.body["prompt"]
        return
    key = CONVERSATIONS[draft.dialect].KEY
    turns, whole = body[key], draft.body[key]
    assert turns[: len(whole)] == whole
    assert len(turns) == len(whole) or not draft.exact


@unhurried
@given(drafts(), st.integers(1, 5_000))
def test_no_piece_ends_with_calls_that_have_no_results(draft: Draft, end: int) -> None:
    whole = rendered(draft)
    request = whole.request(min(end, whole.tokens))
    if draft.dialect is not Dialect.COMPLETIONS and not (draft.exact and request.end == whole.tokens):
        last = msgspec.json.decode(request.body)[CONVERSATIONS[draft.dialect].KEY][-1]
        assert last != CALLS[draft.dialect]
        assert last.get("role") != "assistant"


def test_calls_are_followed_by_a_result_for_each() -> None:
    ids = [turn["tool_call_id"] for turn in next_turn(Dialect.CHAT, [USER, CALLS[Dialect.CHAT]], "0")]
    (answer,) = next_turn(Dialect.MESSAGES, [USER, CALLS[Dialect.MESSAGES]], "0")
    call = CALLS[Dialect.RESPONSES]
    outputs = next_turn(Dialect.RESPONSES, [USER, call, {**call, "call_id": "2"}], "0")
    assert ids == [block["tool_use_id"] for block in answer["content"]] == ["1", "2"]
    assert [(item["type"], item["call_id"]) for item in outputs] == [("function_call_output", each) for each in ids]
    assert answer["role"] == "user"


def test_two_ways_part_at_the_end_of_the_messages() -> None:
    for messages in ([], [USER], [USER, ANSWER], [USER, CALLS[Dialect.CHAT]]):
        one, other = two_ways(messages)
        at = len(messages)
        assert one[:at] == other[:at] == messages
        assert (one[at]["content"], other[at]["content"]) == WORDS


def test_an_answer_is_followed_and_a_question_is_not() -> None:
    asked, answered = {"messages": [USER]}, {"messages": [USER, ANSWER]}
    assert followed(Dialect.CHAT, asked) == asked
    assert [turn["role"] for turn in followed(Dialect.CHAT, answered)["messages"]] == ["user", "assistant", "user"]


@given(st.floats(0.5, 12))
def test_the_length_of_tokens_is_learnt(chars_per_token: float) -> None:
    renderer, draft = TextRenderer(), Draft(Dialect.COMPLETIONS, {"prompt": "x" * 12_000}, (b"",))
    for _ in range(30):
        whole = renderer.render(draft)
        renderer.learn(whole, whole.tokens, round(12_000 / chars_per_token))
    assert abs(renderer.render(draft).tokens * chars_per_token / 12_000 - 1) < 0.05


def test_short_prompts_teach_nothing() -> None:
    renderer, draft = TextRenderer(), Draft(Dialect.COMPLETIONS, {"prompt": "x" * 100}, (b"",))
    before = renderer.render(draft)
    renderer.learn(before, before.tokens, 63)
    assert renderer.render(draft) == before
