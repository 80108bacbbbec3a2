"""One message, however a client writes it, is one message to the chat template."""

from typing import Any

import pytest

from kvprefetch.engines.messages import plain
from kvprefetch.errors import InvalidRequest

CALL = {"id": "c1", "type": "function", "function": {"name": "find", "arguments": {"shelf": 2, "of": ["a"]}}}
SAID = {"role": "assistant", "content": "", "tool_calls": [CALL]}


@pytest.mark.parametrize("arguments", ['{"shelf": 2, "of": ["a"]}', {"shelf": 2, "of": ["a"]}])
@pytest.mark.parametrize("content", [None, "", [], [{"type": "text", "text": ""}]], ids=str)
def test_a_tool_call_is_written_in_one_way(arguments: Any, content: Any) -> None:
    call = {**CALL, "function": {"name": "find", "arguments": arguments}}
    message = {"role": "assistant", "content": content, "tool_calls": [call], "refusal": None, "audio": None}
    assert plain([message]) == (SAID,)


def test_parts_of_text_are_lines_and_what_is_plain_stays() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    said = plain([{"role": "user", "content": parts, "name": None}, SAID])
    assert said == ({"role": "user", "content": "one\ntwo"}, SAID)
    assert plain(said) == said


@pytest.mark.parametrize("arguments", ["{broken", "[1]", '"text"', "[" * 100_000])
def test_arguments_that_are_no_object_stay_as_the_model_wrote_them(arguments: str) -> None:
    call = {"function": {"name": "find", "arguments": arguments}}
    assert plain([{"role": "assistant", "tool_calls": [call]}])[0]["tool_calls"] == [call]


def test_nothing_of_the_callers_is_changed() -> None:
    message = {"role": "user", "content": [{"type": "text", "text": "one"}], "name": None}
    before = {**message}
    plain([message])
    assert message == before


@pytest.mark.parametrize(
    "message",
    [
        {},
        {"role": None},
        {"role": "user", "content": 5},
        {"role": "user", "content": ["text"]},
        {"role": "user", "content": [{"type": "image_url", "image_url": {}}]},
        {"role": "assistant", "tool_calls": {"a": 1}},
    ],
    ids=str,
)
def test_what_no_template_can_render_is_refused(message: Any) -> None:
    with pytest.raises(InvalidRequest):
        plain([message])
