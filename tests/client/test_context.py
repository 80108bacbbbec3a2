"""Contexts on their way to a service."""

import json

import pytest

from kvprefetch.client.context import RemoteContext, to_wire
from kvprefetch.contexts import Context
from kvprefetch.errors import InvalidRequest

BOOK = ({"role": "system", "content": "Grüße"},)


def test_a_context_travels_as_json_with_all_that_shapes_its_prompt() -> None:
    wire = to_wire(RemoteContext(BOOK, ({"name": "f"},), {"date": "today"}, name="n", model="m", adapter="a"))
    assert [json.loads(each) for each in (wire.messages, wire.tools, wire.chat_template_kwargs)] == [
        list(BOOK),
        [{"name": "f"}],
        {"date": "today"},
    ]
    assert (wire.name, wire.model, wire.adapter, list(wire.token_ids)) == ("n", "m", "a", [])
    assert "Grüße".encode() in wire.messages  # not escaped: it is as long as it must be


def test_a_plain_context_travels_too_and_tokens_are_numbers() -> None:
    wire = to_wire(Context(token_ids=(1, 2, 70_000)))
    assert (list(wire.token_ids), wire.messages, wire.model) == ([1, 2, 70_000], b"", "")


def test_a_name_alone_is_a_context_and_nothing_at_all_is_none() -> None:
    assert to_wire(RemoteContext(name="handbook")).name == "handbook"
    for nothing in ({}, {"model": "m"}, {"messages": BOOK, "token_ids": (1,), "name": "n"}):
        with pytest.raises(InvalidRequest, match="either messages or token_ids"):
            RemoteContext(**nothing)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "messages", [({"content": b"bytes"},), ({"content": object()},), ({"content": float},), ({"content": "\ud800"},)]
)
def test_what_is_no_json_is_refused(messages: tuple[dict[str, object], ...]) -> None:
    with pytest.raises(InvalidRequest, match="messages cannot be written as JSON"):
        to_wire(RemoteContext(messages))


@pytest.mark.parametrize("token", [-1, 2**32, "one", 1.5])
def test_what_is_no_token_is_refused(token: object) -> None:
    with pytest.raises(InvalidRequest, match="token_ids are whole numbers"):
        to_wire(RemoteContext(token_ids=(token,)))  # type: ignore[arg-type]


def test_the_next_turns_context_has_the_answer_and_the_same_model_and_another_name() -> None:
    turn = RemoteContext(BOOK, name="n", model="m").with_answer("Hello")
    assert (turn.messages[-1], turn.model, turn.name) == ({"role": "assistant", "content": "Hello"}, "m", "")
    with pytest.raises(InvalidRequest):
        RemoteContext(name="n").with_answer("Hello")
