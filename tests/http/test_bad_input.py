"""What cannot be served gets a status code, in OpenAI's shape, with a line that says what to do; nothing breaks."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from served import ASKED, HANDBOOK, MODEL, QUESTION, Open, Served, served

from kvprefetch.settings import HttpSettings

LIMIT = 60_000


@pytest.fixture(scope="module")
def site(open_tiny: Open) -> Iterator[Served]:
    """One server for all; it must still answer at the end."""
    with served(open_tiny(), http=HttpSettings(max_body_bytes=LIMIT)) as running:
        yield running
        assert running.post("chat/completions", **ASKED).status_code == 200


def refused(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error of a response, which must have its four fields."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"n": 2}, "n"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 2.5}, "top_k"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 1e3}, "max_tokens"),
        ({"max_completion_tokens": "8"}, "max_completion_tokens"),
        ({"seed": "x"}, "seed"),
        ({"seed": 2**70}, "seed"),
        ({"stop": 7}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream": True, "stream_options": []}, "stream_options"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": ["hello"]}, "messages"),
        ({"tools": {"a": 1}}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"logprobs": True}, "logprobs"),
        ({"logit_bias": {"5": -100}}, "logit_bias"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"cache_salt": "s"}, "cache_salt"),
        ({"chat_template_kwargs": {"chat_template": "{{ messages }}"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
        ({"model": 5}, "model"),
        ({"user": "u" * 300}, "user"),
    ],
    ids=str,
)
def test_a_field_that_cannot_be_served_is_named(site: Served, change: dict[str, Any], param: str) -> None:
    error = refused(site.post("chat/completions", **{**ASKED, **change}), 400)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "prompt", [None, "", [], [[]], [1.5], [True], ["a", "b"], [[1], [2]], {"a": 1}, [1, "a"], [-1], [10**9]], ids=str
)
def test_a_prompt_is_text_or_tokens_of_the_model(site: Served, prompt: Any) -> None:
    refused(site.post("completions", model=MODEL, prompt=prompt), 400)


@pytest.mark.parametrize(
    "messages",
    [
        [{"content": "no role"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://example.com/x.png"}}]}],
        [{"role": "user", "content": 5}],
        [{"role": "assistant", "content": None, "tool_calls": "none"}],
        [{"role": "user", "content": "long " * 3_000}],
    ],
    ids=["no role", "image", "number", "calls", "too long"],
)
def test_messages_that_cannot_be_rendered_are_refused(site: Served, messages: list[Any]) -> None:
    refused(site.post("chat/completions", model=MODEL, messages=messages), 400)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b'{"model": "tiny-llama", "messages": [{"role": "user", "content": "\xff\xfe"}]}',
        b'{"model": "tiny-llama", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "\\ud800"}',
        b'{"model": "tiny-llama", "prompt": [1], "temperature": NaN}',
        b'{"model": "tiny-llama", "prompt": [1], "of_no_interest": NaN}',
        b'{"model": "tiny-llama", "prompt": [1], "temperature": 1e999}',
        b'{"model": "tiny-llama", "prompt": [1], "seed": ' + b"9" * 5_000 + b"}",
        b'{"messages": ' + b"[" * 20_000 + b"]" * 20_000 + b"}",
        b'{"messages": [{"role": "user", "content": "x", "y": ' + b"[" * 900 + b"]" * 900 + b"}]}",
        json.dumps({"model": MODEL, "prompt": "text"}).encode("utf-16"),
    ],
    ids=lambda body: body[:24].decode("latin-1"),
)
def test_a_body_that_is_no_json_object_of_text_is_refused(site: Served, body: bytes) -> None:
    for path in ("chat/completions", "completions"):
        response = site.http.post(f"/{path}", content=body, headers={"content-type": "application/json"})
        refused(response, 400)


def test_an_unknown_model_is_not_found(site: Served) -> None:
    error = refused(site.post("chat/completions", **{**ASKED, "model": "gpt-4"}), 404)
    assert error["code"] == "model_not_found"
    assert MODEL in error["message"]
    with pytest.raises(openai.NotFoundError):
        site.ai.completions.create(model="gpt-4", prompt="x")


def test_a_prompt_that_the_pool_cannot_hold_says_so(site: Served) -> None:
    error = refused(site.post("completions", model=MODEL, prompt=[5] * 900, max_tokens=500), 400)
    assert error["code"] == "context_length_exceeded"


def test_a_body_that_is_too_large_is_refused_whether_or_not_it_says_its_length(site: Served) -> None:
    content = b'{"prompt": "' + b"x" * LIMIT + b'"}'
    headers = {"content-type": "application/json"}
    refused(site.http.post("/completions", content=content, headers=headers), 413)
    chunked = (content[at : at + 10_000] for at in range(0, len(content), 10_000))
    refused(site.http.post("/completions", content=chunked, headers=headers), 413)


def test_only_json_is_read(site: Served) -> None:
    """A page in a browser can post text to a loopback port without asking; it cannot post JSON."""
    for media_type in ("text/plain", "application/x-www-form-urlencoded", ""):
        headers = {"content-type": media_type}
        refused(site.http.post("/completions", content=b'{"prompt": [1]}', headers=headers), 415)


def test_other_paths_and_methods_are_refused_in_the_same_shape(site: Served) -> None:
    refused(site.http.get("/nothing"), 404)
    refused(site.http.get("/chat/completions"), 405)
    refused(site.http.post("/embeddings", json={}), 404)


def test_a_temperature_next_to_nothing_does_not_break_the_others(site: Served) -> None:
    body = {"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": True}
    almost = site.post("completions", **body, temperature=1e-300).json()
    assert almost["choices"] == site.post("completions", **body, temperature=0).json()["choices"]
    assert site.post("completions", **body, temperature=1e-5, seed=1).status_code == 200


def test_a_refusal_repeats_nothing_of_the_prompt(site: Served) -> None:
    secret = "the vault opens at nine"
    for messages in ([{"role": 5, "content": secret}], [{"role": "user", "content": {"x": secret}}]):
        response = site.post("chat/completions", model=MODEL, messages=[HANDBOOK, *messages, QUESTION])
        assert secret not in json.dumps(refused(response, 400))
