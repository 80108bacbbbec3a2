"""Drafts warmed in a real vLLM: what was rendered is what the real request's prompt begins with, and is found."""

import asyncio
from itertools import pairwise
from typing import Any
from uuid import uuid4

import pytest
from real_engines import RealEngine, needs_vllm
from warmed import Found, cached_tokens, found

from kvprefetch.errors import InvalidRequest, UpstreamError
from kvprefetch.gateway.contract import Dialect, Json

pytestmark = needs_vllm
BLOCK = 32
HANDBOOK = "Please read the handbook first, then tell me what the return policy says about shoes. " * 24
SYSTEM = {"role": "system", "content": HANDBOOK}
QUESTION = {"role": "user", "content": "What does the policy say about the second shelf?"}
ANSWER = {"role": "assistant", "content": "A short answer is enough: yes."}
THOUGHT = {**ANSWER, "reasoning": "The spare parts for the pump are there. " * 4}
CALL = {
    "role": "assistant",
    "content": None,
    "reasoning": "I shall look. " * 8,
    "tool_calls": [
        {"id": f"call_{at}", "type": "function", "function": {"name": "look", "arguments": '{"shelf": "two"}'}}
        for at in range(2)
    ],
}
RESULTS = [{"role": "tool", "tool_call_id": f"call_{at}", "content": "parcels " * 40} for at in range(2)]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "description": "Look at a shelf. " * 10,
            "parameters": {"type": "object", "properties": {"shelf": {"type": "string"}}},
        },
    }
]
NEXT = {"role": "user", "content": "\n And the first one?"}
BEGINNINGS: dict[str, tuple[Json, list[Json]]] = {  # a draft, and what the next request adds to it
    "a document opened": ({"messages": [SYSTEM]}, [QUESTION]),
    "tools and no message": ({"messages": [], "tools": TOOLS}, [QUESTION]),
    "an answer": ({"messages": [SYSTEM, QUESTION, ANSWER]}, [NEXT]),
    "an answer after thinking": ({"messages": [SYSTEM, QUESTION, THOUGHT]}, [NEXT]),
    "a question that is being answered": ({"messages": [SYSTEM, QUESTION]}, [ANSWER, NEXT]),
    "tools that are called": ({"messages": [SYSTEM, QUESTION, CALL], "tools": TOOLS}, RESULTS),
    "tools' results": ({"messages": [SYSTEM, QUESTION, CALL, *RESULTS], "tools": TOOLS}, [ANSWER]),
}


def test_it_is_found_with_what_it_says_of_its_cache(tiny_vllm: RealEngine) -> None:
    async def story() -> None:
        async with found(tiny_vllm) as site:
            traits = site.engine.traits
            assert (traits.kind, traits.block_tokens, traits.takes_salt) == ("vllm", BLOCK, True)
            assert traits.capacity_tokens == 65_536 * BLOCK  # 1 GiB, at 512 bytes a token
        async with found(tiny_vllm, capacity_tokens=5_000) as site:
            assert site.engine.traits.capacity_tokens == 5_000

    asyncio.run(story())


@pytest.mark.parametrize("beginning", BEGINNINGS)
def test_a_chat_warmed_in_pieces_is_found_by_its_next_turn(tiny_vllm: RealEngine, beginning: str) -> None:
    body, after = BEGINNINGS[beginning]

    async def story() -> None:
        async with found(tiny_vllm) as site:
            salt = uuid4().hex
            rendered = await site.engine.render(site.draft(Dialect.CHAT, salt=salt, **body))
            asked = {**body, "messages": [*body["messages"], *after], "max_tokens": 1, "return_token_ids": True}
            await site.warm(rendered)
            answer = await site.ask(Dialect.CHAT, {**asked, "cache_salt": salt})
            prompt = answer["prompt_token_ids"]
            assert rendered.is_exact
            assert tuple(prompt[: rendered.tokens]) == rendered.token_ids
            assert cached_tokens(Dialect.CHAT, answer) == rendered.tokens // BLOCK * BLOCK > 0
            assert rendered.tokens >= await shared_by_next_turns(site, body, asked)

    asyncio.run(story())


async def shared_by_next_turns(site: Found, body: Json, asked: Json) -> int:
    """How long a prefix the next request shares with one whose next turn has other words from their first on."""
    prompts = []
    for letter in "xy":
        added = [{**turn, "content": letter} for turn in asked["messages"][len(body["messages"]) :]]
        answer = await site.ask(Dialect.CHAT, {**asked, "messages": [*body["messages"], *added]})
        prompts.append(answer["prompt_token_ids"])
    return next(at for at, (one, other) in enumerate(zip(*prompts, strict=False)) if one != other)


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [SYSTEM, QUESTION]},
        {"messages": [SYSTEM, QUESTION, CALL, *RESULTS], "tools": TOOLS},
        {"messages": [QUESTION, ANSWER], "add_generation_prompt": False, "continue_final_message": True},
        {"messages": [QUESTION], "chat_template_kwargs": {"add_generation_prompt": True}, "documents": []},
    ],
)
def test_an_exact_chat_is_the_prompt_to_the_last_token(tiny_vllm: RealEngine, body: Json) -> None:
    async def story() -> None:
        async with found(tiny_vllm) as site:
            rendered = await site.engine.render(site.draft(Dialect.CHAT, exact=True, **body))
            answer = await site.ask(Dialect.CHAT, {**body, "max_tokens": 1, "return_token_ids": True})
            assert list(rendered.token_ids) == answer["prompt_token_ids"]

    asyncio.run(story())


def test_pieces_go_on_from_each_other(tiny_vllm: RealEngine) -> None:
    async def story() -> None:
        async with found(tiny_vllm) as site:
            draft = site.draft(Dialect.CHAT, messages=[SYSTEM], salt=uuid4().hex)
            pieces = await site.warm(await site.engine.render(draft))
            assert len(pieces) > 4
            assert pieces[0][1] == 0
            assert all(reused == end for (end, _), (_, reused) in pairwise(pieces))

    asyncio.run(story())


def test_a_warm_up_that_was_broken_off_keeps_what_it_has_finished(tiny_vllm: RealEngine) -> None:
    async def story() -> None:
        async with found(tiny_vllm) as site:
            ids = [2 + at * 7 % 500 for at in range(8_000)]
            rendered = await site.engine.render(site.draft(Dialect.COMPLETIONS, prompt=ids, salt=uuid4().hex))
            whole = rendered.request(rendered.tokens)
            task = asyncio.create_task(site.link.post(whole.path, whole.body))
            while not await site.engine.load():
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.2)
            task.cancel()
            await site.until_idle()
            ((_, reused),) = await site.warm(rendered, piece=8_192)
            assert reused > 0

    asyncio.run(story())


@pytest.mark.parametrize("prompt", [HANDBOOK, [HANDBOOK], list(range(2, 300)), [list(range(2, 300))]])
def test_a_completion_is_found_by_a_longer_one(tiny_vllm: RealEngine, prompt: Any) -> None:
    only = prompt[0] if isinstance(prompt[0], str | list) and not isinstance(prompt, str) else prompt
    longer = only + (" And then?" if isinstance(only, str) else [7] * 40)

    async def story() -> None:
        async with found(tiny_vllm) as site:
            salt = uuid4().hex
            rendered = await site.engine.render(site.draft(Dialect.COMPLETIONS, prompt=prompt, salt=salt))
            await site.warm(rendered)
            answer = await site.ask(Dialect.COMPLETIONS, {"prompt": longer, "max_tokens": 1, "cache_salt": salt})
            assert cached_tokens(Dialect.COMPLETIONS, answer) == rendered.tokens // BLOCK * BLOCK > 256

    asyncio.run(story())


def test_another_salt_finds_nothing(tiny_vllm: RealEngine) -> None:
    async def story() -> None:
        async with found(tiny_vllm) as site:
            mine = site.draft(Dialect.CHAT, messages=[SYSTEM], salt=uuid4().hex)
            await site.warm(await site.engine.render(mine))
            asked = {"messages": [SYSTEM, QUESTION], "max_tokens": 1}
            for other in ({"cache_salt": uuid4().hex}, {"cache_salt": mine.salt[:-1]}):
                assert cached_tokens(Dialect.CHAT, await site.ask(Dialect.CHAT, {**asked, **other})) == 0
            warm = await site.ask(Dialect.CHAT, {**asked, "cache_salt": mine.salt})
            assert cached_tokens(Dialect.CHAT, warm) > 0

    asyncio.run(story())


def test_answers_are_the_same_warm_as_cold(tiny_vllm: RealEngine) -> None:
    async def story() -> None:
        async with found(tiny_vllm) as site:
            asked = {"messages": [SYSTEM, QUESTION, ANSWER, NEXT], "max_tokens": 32, "temperature": 0}
            cold = await site.ask(Dialect.CHAT, {**asked, "cache_salt": uuid4().hex})
            warm = site.draft(Dialect.CHAT, messages=[SYSTEM, QUESTION, ANSWER], salt=uuid4().hex)
            await site.warm(await site.engine.render(warm))
            again = await site.ask(Dialect.CHAT, {**asked, "cache_salt": warm.salt})
            assert (cached_tokens(Dialect.CHAT, cold), cached_tokens(Dialect.CHAT, again) > 0) == (0, True)
            assert again["choices"][0]["message"] == cold["choices"][0]["message"]

    asyncio.run(story())


@pytest.mark.parametrize("dialect", [Dialect.MESSAGES, Dialect.RESPONSES])
def test_dialects_without_a_tokenizer_are_warmed_by_their_text(tiny_vllm: RealEngine, dialect: Dialect) -> None:
    key, opening = ("messages", "system") if dialect is Dialect.MESSAGES else ("input", "instructions")
    most = "max_tokens" if dialect is Dialect.MESSAGES else "max_output_tokens"
    body = {opening: "Read.", key: [{"role": "user", "content": HANDBOOK}, ANSWER]}

    async def story() -> None:
        async with found(tiny_vllm) as site:
            salt = uuid4().hex
            rendered = await site.engine.render(site.draft(dialect, salt=salt, **body))
            assert not rendered.is_exact
            pieces = await site.warm(rendered)
            assert len(pieces) > 2
            assert all(later > earlier for (_, earlier), (_, later) in pairwise(pieces))
            asked = {**body, key: [*body[key], NEXT], most: 1, "cache_salt": salt}
            answer = await site.ask(dialect, asked)
            cold = await site.ask(dialect, {**asked, "cache_salt": uuid4().hex})
            assert cached_tokens(dialect, cold) == 0
            assert cached_tokens(dialect, answer) >= prompt_tokens(dialect, cold) - 2 * BLOCK

    asyncio.run(story())


def prompt_tokens(dialect: Dialect, answer: Json) -> int:
    """All of them: Anthropic's dialect counts those found apart."""
    found_apart = cached_tokens(dialect, answer) if dialect is Dialect.MESSAGES else 0
    return int(answer["usage"]["input_tokens"]) + found_apart


def test_load_is_what_it_is_doing_and_nothing_afterwards(tiny_vllm: RealEngine) -> None:
    async def story() -> None:
        async with found(tiny_vllm) as site:
            await site.until_idle()
            long = {"prompt": HANDBOOK, "max_tokens": 400, "ignore_eos": True}
            asked = [asyncio.create_task(site.ask(Dialect.COMPLETIONS, long)) for _ in range(2)]
            seen = 0
            while not all(task.done() for task in asked):
                seen = max(seen, await site.engine.load() or 0)
            await asyncio.gather(*asked)
            assert seen == 2
            await site.until_idle()

    asyncio.run(story())


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": "parcels " * 9_000}]},
        {"messages": [QUESTION], "model": "another"},
        {"messages": [QUESTION], "tools": "none"},
    ],
)
def test_what_the_engine_would_refuse_is_refused_without_its_words(tiny_vllm: RealEngine, body: Json) -> None:
    async def story() -> None:
        async with found(tiny_vllm) as site:
            with pytest.raises(InvalidRequest) as refused:
                await site.engine.render(site.draft(Dialect.CHAT, **body))
            assert "parcels" not in str(refused.value)
            assert "another" not in str(refused.value)

    asyncio.run(story())


def test_an_engine_that_is_gone_cannot_be_asked(tiny_vllm: RealEngine) -> None:
    async def story() -> None:
        async with found(tiny_vllm) as site:
            draft = site.draft(Dialect.CHAT, messages=[QUESTION])
            site.engine._link = site.link.beside("http://127.0.0.1:9")  # type: ignore[attr-defined]
            with pytest.raises(UpstreamError):
                await site.engine.render(draft)
            with pytest.raises(UpstreamError):
                await site.engine.load()

    asyncio.run(story())
