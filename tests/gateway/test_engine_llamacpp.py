"""Drafts warmed in llama.cpp's own server: what was rendered is found by the real request; answers stay the same."""

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from llama_server import llama_server, tiny_gguf
from real_engines import RealEngine
from warmed import Found, cached_tokens

from kvprefetch.demo.model import find_model
from kvprefetch.errors import InvalidRequest, UpstreamError
from kvprefetch.gateway.contract import Dialect, Json
from kvprefetch.gateway.engines.llamacpp import llamacpp
from kvprefetch.gateway.link import open_links
from kvprefetch.settings import GatewaySettings, UpstreamSettings

SYSTEM = {"role": "system", "content": "The warehouse opens at seven. The second shelf holds spare parts. " * 12}
QUESTION = {"role": "user", "content": "When does the warehouse open?"}
ANSWER = {"role": "assistant", "content": "It opens at seven."}
NEXT = {"role": "user", "content": "And where are the spare parts?"}
BEGINNINGS: dict[str, tuple[list[Json], list[Json]]] = {  # a draft's messages, and what the next request adds
    "a document opened": ([SYSTEM], [QUESTION]),
    "an answer": ([SYSTEM, QUESTION, ANSWER], [NEXT]),
    "a question that is being answered": ([SYSTEM, QUESTION], [ANSWER, NEXT]),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[RealEngine]:
    with llama_server(tiny, tokens=8_192) as engine:
        yield engine


@pytest.fixture(scope="module")
def saving(tiny: Path) -> Iterator[RealEngine]:
    """One slot, saved in host memory when another prompt takes it."""
    with llama_server(tiny, 1, 8_192, 256, metrics=False) as engine:
        yield engine


@pytest.fixture(scope="module")
def smollm2() -> Iterator[RealEngine]:
    """A model whose template was made by others."""
    with llama_server(find_model(), 1) as engine:
        yield engine


@asynccontextmanager
async def reached(real: RealEngine, **settings: Any) -> AsyncIterator[Found]:
    upstream = UpstreamSettings(real.url, **settings)
    async with open_links(GatewaySettings(upstreams=(upstream,))) as (link,):
        yield Found(await llamacpp(link, upstream), link, real.model)


def document(number: int, words: int = 250) -> Json:
    """A system message that no other begins with."""
    drawn = random.Random(number).choices(["river", "stone", "paper", "window", "garden", "silver"], k=words)
    return {"role": "system", "content": " ".join(drawn)}


async def ask(site: Found, messages: list[Json], tokens: int = 1) -> tuple[int, int, str]:
    """Tokens found and asked for, and the answer."""
    answer = await site.ask(Dialect.CHAT, {"messages": messages, "max_tokens": tokens, "temperature": 0})
    text = answer["choices"][0]["message"]["content"]
    return cached_tokens(Dialect.CHAT, answer), answer["usage"]["prompt_tokens"], text


def test_what_it_says_of_itself(server: RealEngine) -> None:
    async def story() -> None:
        async with reached(server) as site:
            traits = site.engine.traits
            assert (traits.kind, traits.block_tokens, traits.takes_salt) == ("llama.cpp", 1, False)
            assert traits.capacity_tokens == 2 * 2_048  # as long as the model was made for, twice
        async with reached(server, capacity_tokens=5_000) as site:
            assert site.engine.traits.capacity_tokens == 5_000

    asyncio.run(story())


@pytest.mark.parametrize("beginning", BEGINNINGS)
def test_what_is_warmed_in_pieces_is_found_to_the_token(server: RealEngine, beginning: str) -> None:
    before, after = BEGINNINGS[beginning]
    first = {**SYSTEM, "content": f"{beginning}: {SYSTEM['content']}"}  # of its own, so that nothing is found by chance
    asyncio.run(warmed_and_found(server, [first, *before[1:]], after))


def test_a_model_of_others_is_warmed_to_the_token_too(smollm2: RealEngine) -> None:
    asyncio.run(warmed_and_found(smollm2, *BEGINNINGS["an answer"]))


async def warmed_and_found(real: RealEngine, before: list[Json], after: list[Json]) -> None:
    async with reached(real) as site:
        rendered = await site.engine.render(site.draft(Dialect.CHAT, messages=before))
        pieces = await site.warm(rendered)
        assert len(pieces) > 2
        assert [found for _, found in pieces[1:]] == [end for end, _ in pieces[:-1]]
        cached, prompt_tokens, _ = await ask(site, [*before, *after])
        assert cached == rendered.tokens
        assert prompt_tokens - rendered.tokens < 120


def test_answers_are_the_same_warm_as_cold(server: RealEngine) -> None:
    async def story() -> None:
        async with reached(server) as site:
            asked = [document(18), QUESTION]
            cold = await ask(site, asked, 24)
            for number in (1, 2):  # both slots are taken by others
                await ask(site, [document(number, 30), QUESTION])
            rendered = await site.engine.render(site.draft(Dialect.CHAT, messages=asked[:1]))
            await site.warm(rendered)
            warm = await ask(site, asked, 24)
            assert (warm[0], warm[1:]) == (rendered.tokens, cold[1:])
            assert cold[0] < 30  # the template alone

    asyncio.run(story())


def test_a_whole_prompt_is_rendered_as_it_stands(server: RealEngine) -> None:
    async def story() -> None:
        async with reached(server) as site:
            messages = [document(5, 40)]  # the prompt goes on with what opens the answer
            rendered = await site.engine.render(site.draft(Dialect.CHAT, exact=True, messages=messages))
            await site.warm(rendered)
            cached, prompt_tokens, _ = await ask(site, messages)
            assert rendered.tokens == prompt_tokens == cached + 1

    asyncio.run(story())


@pytest.mark.parametrize("kind", ["text", "ids"])
def test_completions_are_warmed_as_well(server: RealEngine, kind: str) -> None:
    async def story() -> None:
        async with reached(server) as site:
            text = str(document(6 if kind == "text" else 7, 60)["content"])
            prompt: Any = text
            if kind == "ids":
                whole = await site.engine.render(site.draft(Dialect.COMPLETIONS, exact=True, prompt=text))
                prompt = list(whole.token_ids)
            rendered = await site.engine.render(site.draft(Dialect.COMPLETIONS, prompt=prompt))
            await site.warm(rendered)
            more = " and so on" if kind == "text" else prompt[:5]
            answer = await site.ask(Dialect.COMPLETIONS, {"prompt": prompt + more, "max_tokens": 1})
            assert cached_tokens(Dialect.COMPLETIONS, answer) == rendered.tokens > 50

    asyncio.run(story())


@pytest.mark.parametrize("dialect", [Dialect.RESPONSES, Dialect.MESSAGES])
def test_other_dialects_are_warmed_through_their_own_endpoint(server: RealEngine, dialect: Dialect) -> None:
    text = str(document(8 if dialect is Dialect.MESSAGES else 9, 120)["content"])
    turns = "input" if dialect is Dialect.RESPONSES else "messages"
    opening: Json = {"instructions": text} if dialect is Dialect.RESPONSES else {"system": text}
    limit = "max_output_tokens" if dialect is Dialect.RESPONSES else "max_tokens"

    async def story() -> None:
        async with reached(server) as site:
            rendered = await site.engine.render(site.draft(dialect, **opening, **{turns: []}))
            assert not rendered.is_exact
            await site.warm(rendered, piece=1_000)
            asked = {**opening, turns: [{"role": "user", "content": "Well?"}], limit: 1}
            assert cached_tokens(dialect, await site.ask(dialect, asked)) > 110

    asyncio.run(story())


def test_its_load_is_told_by_gauges_or_by_slots(server: RealEngine, saving: RealEngine) -> None:
    async def story(real: RealEngine) -> None:
        async with reached(real) as site:
            assert await site.engine.load() == 0
            live = asyncio.create_task(ask(site, [document(10), QUESTION], 500))
            async with asyncio.timeout(60):
                while not await site.engine.load():
                    await asyncio.sleep(0.05)
            await live
            assert await site.engine.load() == 0

    asyncio.run(story(server))
    asyncio.run(story(saving))


def test_without_host_memory_what_was_warmed_is_gone_when_others_take_its_slot(server: RealEngine) -> None:
    async def story() -> None:
        async with reached(server) as site:
            await site.warm(await site.engine.render(site.draft(Dialect.CHAT, messages=[document(11, 80)])))
            for number in (12, 13):
                await ask(site, [document(number, 30), QUESTION])
            assert (await ask(site, [document(11, 80), QUESTION]))[0] < 30  # the template alone

    asyncio.run(story())


def test_with_host_memory_what_was_warmed_outlives_others_in_its_slot(saving: RealEngine) -> None:
    async def story() -> None:
        async with reached(saving) as site:
            rendered = await site.engine.render(site.draft(Dialect.CHAT, messages=[document(14, 80)]))
            await site.warm(rendered)
            for number in (15, 16):
                await ask(site, [document(number, 30), QUESTION])
            assert (await ask(site, [document(14, 80), QUESTION]))[0] == rendered.tokens

    asyncio.run(story())


def test_a_prompt_too_long_or_not_rendered_is_refused_in_our_words(server: RealEngine) -> None:
    async def story() -> None:
        async with reached(server) as site:
            for messages in ([document(17, 3_000)], [{"role": "user", "content": 3}]):
                with pytest.raises(InvalidRequest) as refused:
                    await site.engine.render(site.draft(Dialect.CHAT, messages=messages))
                assert "river" not in str(refused.value)

    asyncio.run(story())


def test_a_server_that_is_gone_is_an_upstream_error(tiny: Path) -> None:
    async def story() -> None:
        with llama_server(tiny, 1, 256) as real:
            async with reached(real) as site:
                draft = site.draft(Dialect.CHAT, messages=[QUESTION])
                await site.engine.render(draft)
                os.kill(real.pid, signal.SIGKILL)
                for call in (site.engine.load, lambda: site.engine.render(draft)):
                    with pytest.raises(UpstreamError):
                        await call()

    asyncio.run(story())
