"""Our own worker behind the gateway: found, told what to have warm, and warm when the request comes."""

import asyncio
from typing import Any

import msgspec
import pytest
from real_engines import RealEngine
from warmed import Found, cached_tokens, found

from kvprefetch.errors import InvalidRequest, UpstreamError
from kvprefetch.gateway.contract import Dialect, Draft, Json, Traits
from kvprefetch.gateway.engines.vllm import Vllm

HANDBOOK = "Please read the handbook first, then tell me what the return policy says about shoes. " * 12
QUESTION = {"role": "user", "content": "What does the policy say about the second shelf?"}
ANSWER = {"role": "assistant", "content": "A short answer is enough: yes."}
NEXT = {"role": "user", "content": "And the first one?"}


def told(name: str, **more: Any) -> Json:
    """A conversation of its own about the handbook."""
    return {"messages": [{"role": "system", "content": name + HANDBOOK}, QUESTION, ANSWER], **more}


async def have_warm(site: Found, draft: Draft) -> Json:
    """What the worker says to the request that warms it."""
    rendered = await site.engine.render(draft)
    request = rendered.request(1)
    assert request.end == rendered.tokens
    status, said = await site.link.post(request.path, request.body)
    assert status == 200, said
    answer: Json = msgspec.json.decode(said)
    site.engine.learn(rendered, request.end, answer["usage"]["prompt_tokens"])
    return answer


def test_it_is_found_as_one_that_warms_itself(tiny_worker: RealEngine) -> None:
    async def story() -> None:
        async with found(tiny_worker) as site:
            models = frozenset((tiny_worker.model,))
            assert site.engine.traits == Traits("kvprefetch", warms_itself=True, models=models)

    asyncio.run(story())


def test_a_conversation_is_warm_when_its_next_turn_comes(tiny_worker: RealEngine) -> None:
    async def story() -> None:
        async with found(tiny_worker) as site:
            body = told("next turn")
            answer = await have_warm(site, site.draft(Dialect.CHAT, **body))
            assert (answer["kvprefetch"]["outcome"], answer["usage"]["completion_tokens"]) == ("warm", 0)
            asked = {"messages": [*body["messages"], NEXT], "max_tokens": 1}
            shared = answer["usage"]["prompt_tokens"] - 64  # a block of 32, the probe, and the generation prompt
            assert cached_tokens(Dialect.CHAT, await site.ask(Dialect.CHAT, asked)) >= shared > 128

    asyncio.run(story())


def test_an_exact_prompt_is_warm_as_it_stands(tiny_worker: RealEngine) -> None:
    async def story() -> None:
        async with found(tiny_worker) as site:
            body = told("exact", chat_template_kwargs={"tone": "short"})
            answer = await have_warm(site, site.draft(Dialect.CHAT, exact=True, **body))
            real = await site.ask(Dialect.CHAT, {**body, "max_tokens": 1})
            assert real["usage"]["prompt_tokens"] == answer["usage"]["prompt_tokens"]

    asyncio.run(story())


def test_a_completion_is_warm(tiny_worker: RealEngine) -> None:
    async def story() -> None:
        async with found(tiny_worker) as site:
            ids = [2 + at * 5 % 500 for at in range(320)]
            await have_warm(site, site.draft(Dialect.COMPLETIONS, prompt=ids))
            answer = await site.ask(Dialect.COMPLETIONS, {"prompt": [*ids, 7, 8], "max_tokens": 1})
            assert cached_tokens(Dialect.COMPLETIONS, answer) == 320

    asyncio.run(story())


@pytest.mark.parametrize("dialect", [Dialect.RESPONSES, Dialect.MESSAGES])
def test_dialects_that_it_does_not_speak_are_refused_here(tiny_worker: RealEngine, dialect: Dialect) -> None:
    async def story() -> None:
        async with found(tiny_worker) as site:
            with pytest.raises(InvalidRequest):
                await site.engine.render(site.draft(dialect, messages=[QUESTION], input="hello"))

    asyncio.run(story())


def test_its_load_is_what_it_is_answering(tiny_worker: RealEngine) -> None:
    async def story() -> None:
        async with found(tiny_worker) as site:
            await site.until_idle()
            long = {"prompt": HANDBOOK, "max_tokens": 200, "ignore_eos": True}
            asked = asyncio.create_task(site.ask(Dialect.COMPLETIONS, long))
            seen = 0
            while not asked.done():
                seen = max(seen, await site.engine.load() or 0)
            await asked
            assert seen == 1
            await site.until_idle()

    asyncio.run(story())


def test_a_server_that_cannot_tokenize_is_warmed_by_text(tiny_worker: RealEngine) -> None:
    async def story() -> None:
        async with found(tiny_worker) as site:
            engine = Vllm(site.link, Traits("vllm"))  # a router may hide what an engine can do
            rendered = await engine.render(site.draft(Dialect.CHAT, **told("router")))
            assert (rendered.is_exact, rendered.token_ids) == (False, ())
            assert rendered.request(rendered.tokens).path == Dialect.CHAT.value
            assert await engine.load() is None

    asyncio.run(story())


def test_nothing_is_found_where_nobody_listens(tiny_worker: RealEngine) -> None:
    async def story() -> None:
        nobody = RealEngine("http://127.0.0.1:9", "none", 0, tiny_worker.log)
        with pytest.raises(UpstreamError):
            async with found(nobody):
                pass

    asyncio.run(story())
