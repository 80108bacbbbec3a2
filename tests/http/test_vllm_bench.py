"""What `vllm bench serve` 0.32 sends, and how it reads the answer: its `openai` and `openai-chat` backends."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from served import MODEL, Open, Served, served

PROMPT = "Please read the handbook first, then tell me what the return policy says about shoes."
HEADERS = {"content-type": "application/json", "x-request-id": "bench-0"}


@pytest.fixture(scope="module")
def site(open_tiny: Open) -> Iterator[Served]:
    with served(open_tiny()) as running:
        yield running


def completion(output_len: int) -> dict[str, Any]:
    """The body of its `async_request_openai_completions`."""
    return {
        "model": MODEL,
        "prompt": PROMPT,
        "repetition_penalty": 1.0,
        "max_tokens": output_len,
        "logprobs": None,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }


def chat(output_len: int) -> dict[str, Any]:
    """The body of its `async_request_openai_chat_completions`."""
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": [{"type": "text", "text": PROMPT}]}],
        "max_completion_tokens": output_len,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }


class Reader:
    """Takes a stream apart as the bench does: by blank lines, whatever the network's chunks are."""

    def __init__(self, response: httpx.Response, text_of: Callable[[dict[str, Any]], str | None]) -> None:
        assert response.status_code == 200
        self.tokens, self.text, self.usage, buffer = 0, "", {}, ""
        for piece in response.iter_bytes(7):
            buffer += piece.decode()
            while "\n\n" in buffer:
                message, buffer = buffer.split("\n\n", 1)
                data = message.strip().removeprefix("data: ")
                if data != "[DONE]":
                    self._read(json.loads(data), text_of)

    def _read(self, data: dict[str, Any], text_of: Callable[[dict[str, Any]], str | None]) -> None:
        if choices := data.get("choices"):
            self.tokens += 1
            self.text += text_of(choices[0]) or ""
        elif usage := data.get("usage"):
            self.usage = usage


def bench(site: Served, path: str, body: dict[str, Any], text_of: Callable[[dict[str, Any]], str | None]) -> Reader:
    with site.http.stream("POST", f"/{path}", json=body, headers=HEADERS) as response:
        return Reader(response, text_of)


def test_its_completions_give_the_tokens_it_asks_for_and_its_usage(site: Served) -> None:
    read = bench(site, "completions", completion(32), lambda choice: choice.get("text"))
    prompt = len(site.kv.worker.renderer.tokenizer(PROMPT)["input_ids"])
    assert read.usage["completion_tokens"] == 32
    assert read.usage["prompt_tokens"] == prompt
    assert read.tokens in (32, 33)  # so that its time between tokens is one
    assert read.text


def test_its_chats_are_served_as_well(site: Served) -> None:
    read = bench(site, "chat/completions", chat(32), lambda choice: choice["delta"].get("content"))
    assert read.usage["completion_tokens"] == 32
    assert read.tokens in (32, 33)


def test_one_token_is_one_chunk_even_where_it_has_no_text(site: Served) -> None:
    read = bench(site, "completions", completion(1), lambda choice: choice.get("text"))
    assert read.tokens >= 1
    assert read.usage["completion_tokens"] == 1


def test_it_finds_the_model_by_itself(site: Served) -> None:
    first = site.http.get("/models").json()["data"][0]
    assert (first["id"], first["root"]) == (MODEL, MODEL)
