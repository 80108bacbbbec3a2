"""Fifty streams at once on one event loop: each says what it would say alone, and no thread is spent on any."""

import asyncio
import json
import threading
from typing import Any

import httpx
from served import MODEL, Open, served

STREAMS = 50


def prompt(number: int) -> list[int]:
    return [5 + (number * 131 + i * 37 + i * i) % 450 for i in range(20 + number)]


async def read(client: httpx.AsyncClient, number: int) -> str:
    """The text of one streamed answer."""
    ask: dict[str, Any] = {"model": MODEL, "prompt": prompt(number), "max_tokens": 24, "ignore_eos": True}
    said = ""
    async with client.stream("POST", "/completions", json={**ask, "stream": True}) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line and line != "data: [DONE]":
                said += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
    return said


def test_fifty_streams_are_served_together_as_each_alone(open_tiny: Open) -> None:
    threads = 0

    async def all_at_once(url: str) -> list[str]:
        nonlocal threads
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
            readers = asyncio.gather(*(read(client, number) for number in range(STREAMS)))
            while not readers.done():
                threads = max(threads, threading.active_count())
                await asyncio.sleep(0.01)
            return await readers

    with served(open_tiny(pages=512)) as site:
        said = asyncio.run(all_at_once(site.url))
        alone = [
            site.kv.generate(token_ids=prompt(number), max_tokens=24, ignore_eos=True).result().text
            for number in range(STREAMS)
        ]
    assert said == alone
    assert threads < STREAMS  # those that render come and go


def test_a_long_prompt_being_rendered_does_not_hold_up_the_loop(open_tiny: Open) -> None:
    with served(open_tiny()) as site:
        busy = threading.Thread(
            target=lambda: site.post("completions", model=MODEL, prompt="A short answer is enough. " * 20_000)
        )
        rendering = threading.Event()
        tokenizer = site.kv.worker.renderer.tokenizer
        encode, healthy = tokenizer._encode_plus, []

        def slowly(*arguments: Any, **options: Any) -> Any:
            rendering.set()
            healthy.append(release.wait(30))
            return encode(*arguments, **options)

        release = threading.Event()
        tokenizer._encode_plus = slowly
        try:
            busy.start()
            assert rendering.wait(30)
            assert site.http.get(site.url.removesuffix("/v1") + "/health").status_code == 200
        finally:
            release.set()
            busy.join(30)
            del tokenizer._encode_plus
        assert healthy == [True]
