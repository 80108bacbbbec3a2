"""The unmodified `openai` client gets what `kvprefetch.local` says, whole and as a stream."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from served import ASKED, HANDBOOK, MODEL, QUESTION, Open, Served, events, served, until

from kvprefetch.http.answer import Writer
from kvprefetch.http.chat import CHAT
from kvprefetch.http.completions import COMPLETION
from kvprefetch.inprocess import Local

PROMPT = [7 + i * 13 % 400 for i in range(70)]


@pytest.fixture(scope="module")
def running(open_tiny: Open) -> Iterator[Served]:
    with served(open_tiny()) as site:
        yield site


@pytest.fixture
def site(running: Served) -> Served:
    """One server for all, with an empty cache for each."""
    until(lambda: not running.kv.worker.live and not running.kv.stats()["prefetch"]["pending"], "it is quiet")
    running.kv.clear()
    return running


def said_locally(kv: Local, *messages: dict[str, str], **sampling: Any) -> tuple[str, int, int]:
    """Text, prompt tokens and new tokens that the worker gives without HTTP."""
    done = kv.generate(messages, **{"max_tokens": 8, "ignore_eos": True, **sampling}).result()
    return done.text, done.prompt_tokens, len(done.tokens)


def test_a_chat_is_answered_as_in_process(site: Served) -> None:
    answer = site.ai.chat.completions.create(
        model=MODEL,
        messages=[HANDBOOK, QUESTION],  # type: ignore[list-item]
        max_completion_tokens=24,
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    text, prompt, new = said_locally(site.kv, HANDBOOK, QUESTION, max_tokens=24)
    assert answer.choices[0].message.content == text
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt, new)
    assert answer.usage.total_tokens == prompt + new
    assert (answer.object, answer.model) == ("chat.completion", MODEL)


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0.8, "seed": 5}, {"temperature": 1.3, "top_p": 0.9, "top_k": 40, "seed": -3}]
)
def test_a_stream_says_the_same_as_a_whole_answer(site: Served, sampling: dict[str, Any]) -> None:
    ask = {"model": MODEL, "prompt": PROMPT, "max_tokens": 30, "extra_body": {"ignore_eos": True}, **sampling}
    if "top_k" in ask:
        ask["extra_body"] = {"ignore_eos": True, "top_k": ask.pop("top_k")}
    whole = site.ai.completions.create(**ask)
    chunks = list(site.ai.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    local = site.kv.generate(token_ids=PROMPT, max_tokens=30, ignore_eos=True, **sampling).result()
    assert whole.choices[0].text == local.text
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == local.text
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 30
    assert {chunk.id for chunk in chunks} == {chunks[0].id} != {whole.id}


def test_a_stream_has_a_chunk_for_each_token_and_ends_in_the_last_or_after_it(site: Served) -> None:
    response = site.post("completions", model=MODEL, prompt=PROMPT, max_tokens=20, ignore_eos=True, stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    chunks = events(response)
    assert len(chunks) in (20, 21)
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert "usage" not in chunks[0]


def test_the_reason_is_in_the_last_of_the_chunks_that_are_written_together() -> None:
    for form in (CHAT, COMPLETION):
        written = Writer(form, MODEL).chunks(["a", "", "b"], "stop").decode().split("\n\n")
        reasons = [json.loads(line.removeprefix("data: "))["choices"][0]["finish_reason"] for line in written[:-1]]
        assert reasons == [None, None, "stop"]


def test_a_chat_streams_its_role_once_and_its_usage_last(site: Served) -> None:
    ask: dict[str, Any] = {**ASKED, "stream": True, "stream_options": {"include_usage": True}}
    chunks = events(site.post("chat/completions", **ask))
    text, prompt, _ = said_locally(site.kv, HANDBOOK, QUESTION)
    *parts, last = chunks
    deltas = [part["choices"][0]["delta"] for part in parts]
    assert "".join(delta["content"] for delta in deltas) == text
    assert [delta.get("role") for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    assert last["usage"]["prompt_tokens"] == prompt
    assert all(part["usage"] is None for part in parts)


def test_the_second_ask_finds_the_first_ones_prompt(site: Served) -> None:
    first, second = (site.post("chat/completions", **ASKED).json() for _ in range(2))
    cached = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in (first, second)]
    assert cached[0] == 0
    assert first["usage"]["prompt_tokens"] - 16 <= cached[1] < first["usage"]["prompt_tokens"]
    assert first["choices"] == second["choices"]


def test_a_text_prompt_and_its_tokens_are_one_prompt(site: Served) -> None:
    text = "The warehouse opens at seven."
    ids = site.kv.worker.renderer.tokenizer(text)["input_ids"]
    prompts = (text, [text], ids, [ids])
    answers = [site.post("completions", model=MODEL, prompt=prompt, ignore_eos=True).json() for prompt in prompts]
    assert len({answer["choices"][0]["text"] for answer in answers}) == 1
    assert answers[0]["usage"]["completion_tokens"] == 16  # as OpenAI's default


def test_a_stop_string_ends_the_answer_before_it(site: Served) -> None:
    ask = {"model": MODEL, "prompt": PROMPT, "max_tokens": 40, "ignore_eos": True}
    text = site.post("completions", **ask).json()["choices"][0]["text"]
    stop = text[len(text) // 2 :][:3]
    for value in (stop, [stop, "never said"]):
        choice = site.post("completions", **ask, stop=value).json()["choices"][0]
        assert choice["text"] == text[: text.find(stop)]
        assert choice["finish_reason"] == "stop"
    chunks = events(site.post("completions", **ask, stop=stop, stream=True))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text[: text.find(stop)]


def test_without_a_word_on_length_a_chat_gets_what_fits(open_tiny: Open) -> None:
    with served(open_tiny(pages=12)) as site:  # 192 tokens
        answer = site.post("chat/completions", model=MODEL, messages=[QUESTION], ignore_eos=True).json()
    assert answer["usage"]["completion_tokens"] == 128


def test_one_message_written_in_several_ways_is_one_prompt(site: Served) -> None:
    parts = [{"type": "text", "text": QUESTION["content"]}]
    plain = site.post("chat/completions", **ASKED).json()
    other = [HANDBOOK, {"role": "user", "content": parts, "name": None}]
    same = site.post("chat/completions", **{**ASKED, "messages": other}).json()
    assert same["choices"] == plain["choices"]
    assert same["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def test_fields_that_nobody_knows_or_that_change_nothing_are_ignored(site: Served) -> None:
    extra = {
        "n": 1,
        "logprobs": None,
        "presence_penalty": 0.0,
        "repetition_penalty": 1.0,
        "response_format": {"type": "text"},
        "tool_choice": "auto",
        "store": True,
        "metadata": {"a": "b"},
        "from_the_future": [1, {"x": None}],
    }
    assert site.post("chat/completions", **ASKED, **extra).status_code == 200


def test_the_session_of_a_request_has_its_next_turn_warmed(site: Served) -> None:
    before, headers = site.kv.stats()["prefetch"]["issued"], {"X-KVPrefetch-Session": "u-7"}
    site.http.post("/chat/completions", json={**ASKED, "user": "somebody else"}, headers=headers)
    site.post("chat/completions", **ASKED, user="u-8")
    site.post("chat/completions", **ASKED, prompt_cache_key="u-9")
    site.post("chat/completions", **ASKED)
    assert site.kv.stats()["prefetch"]["issued"] == before + 3


def test_the_one_model_is_listed(site: Served) -> None:
    (model,) = site.ai.models.list().data
    assert model.id == MODEL
    assert site.ai.models.retrieve(MODEL).id == MODEL
    assert site.http.get("/models").json()["data"][0]["max_model_len"] == 2048
    assert site.http.get("/models/gpt-4").status_code == 404
