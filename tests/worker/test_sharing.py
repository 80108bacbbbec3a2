"""Workers that share one arena: what is read, what is written, and what happens when something of it is wrong."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from processes import until
from service_thread import ServiceThread, attached, written
from workers import cold_answer, local, text

from kvprefetch.contexts import Context
from kvprefetch.engines.engine import TransformersEngine
from kvprefetch.inprocess import Local
from kvprefetch.outcomes import Outcome, Use

Open = Callable[..., TransformersEngine]
BLOCK = 16  # tokens, as the tiny engines have


@pytest.fixture
def service(tmp_path: Path) -> Iterator[ServiceThread]:
    service = ServiceThread(tmp_path)
    yield service
    service.end()


def ask(kv: Local, prompt: list[int], session: str = "") -> tuple[list[int], int, int]:
    """Tokens of the answer, tokens found in the device pool, tokens loaded."""
    done = kv.generate(token_ids=prompt, max_tokens=4, ignore_eos=True, session=session).result()
    return done.tokens, done.reused_tokens, done.loaded_tokens


def misses(kv: Local) -> dict[str, int]:
    return kv.stats()["lookups"]["misses"]  # type: ignore[no-any-return]


def test_what_one_worker_computed_the_other_loads(open_tiny: Open, service: ServiceThread) -> None:
    prompt = text(1, 100)
    first, second = open_tiny(), open_tiny()
    cold = cold_answer(first, prompt)
    with attached(first, service) as one:
        assert ask(one, prompt) == (cold, 0, 0)
        written(one, service)
        with attached(second, service) as two:
            assert ask(two, prompt) == (cold, 0, 6 * BLOCK)
            assert two.stats()["lookups"] == {
                "count": 1,
                "blocks": 6,
                "hits": 0,
                "loaded": 6,
                "misses": {},
                "evicted_by": {},
            }
    until(lambda: service.stats()["held"]["leases"] == 0, "a lease leaks")
    service.check()


def test_a_prompt_that_is_in_the_arena_to_its_end_runs_its_last_token_again(
    open_tiny: Open, service: ServiceThread
) -> None:
    prompt = text(1, 6 * BLOCK)
    first, second = open_tiny(), open_tiny()
    with attached(first, service) as one, attached(second, service) as two:
        cold = ask(one, prompt)[0]
        written(one, service)
        assert ask(two, prompt) == (cold, 0, 6 * BLOCK)
        assert ask(two, prompt) == (cold, 6 * BLOCK - 1, 0)


def test_what_the_pool_evicts_comes_back_from_the_arena(open_tiny: Open, service: ServiceThread) -> None:
    engine = open_tiny(pages=10)
    prompts = [text(n, 100) for n in range(4)]
    cold = [cold_answer(engine, prompt) for prompt in prompts]
    with attached(engine, service) as kv:
        for prompt, tokens in zip(prompts, cold, strict=True):
            assert ask(kv, prompt)[0] == tokens
            written(kv, service)
        assert ask(kv, prompts[0]) == (cold[0], 0, 6 * BLOCK)


def test_a_damaged_block_is_computed_again_and_dropped(open_tiny: Open, service: ServiceThread) -> None:
    prompt = text(1, 100)
    first, second = open_tiny(), open_tiny()
    with attached(first, service) as one, attached(second, service) as two:
        cold = ask(one, prompt)[0]
        written(one, service)
        flip_a_byte(service, depth=3)
        assert ask(two, prompt) == (cold, 0, 3 * BLOCK)
        assert misses(two) == {"corrupt": 3}
        until(lambda: service.stats()["host"].get("corrupt", 0) == 1, "the service does not hear of it")
        written(two, service)
        with attached(open_tiny(), service) as three:
            assert ask(three, prompt) == (cold, 0, 6 * BLOCK)
    service.check()


def flip_a_byte(service: ServiceThread, depth: int) -> None:
    def flip(shelf: object) -> None:
        block = next(b for b in shelf.host.pool.resident.values() if b.depth == depth)  # type: ignore[attr-defined]
        shelf.host.arena.slot(block.page)[100] ^= 1  # type: ignore[attr-defined]

    service.call(flip)


def test_without_a_service_everything_is_answered_and_the_reason_is_named(
    open_tiny: Open, service: ServiceThread
) -> None:
    prompt, other = text(1, 100), text(2, 100)
    cold_other = cold_answer(open_tiny(), other)
    with attached(open_tiny(), service) as kv:
        cold = ask(kv, prompt)[0]
        service.end()
        until(lambda: not kv.core.station.is_connected, "the stream does not break")  # type: ignore[union-attr]
        assert ask(kv, other)[0] == cold_other
        assert misses(kv)["unavailable"] == 6
        assert ask(kv, prompt) == (cold, 6 * BLOCK, 0)
        service.begin()
        until(lambda: kv.core.station.is_connected, "it does not come back", 20)  # type: ignore[union-attr]
        written(kv, service)
        with attached(open_tiny(), service) as fresh:
            assert ask(fresh, other)[2] == 6 * BLOCK  # computed while the service was away


def test_what_was_computed_before_the_service_came_is_written_when_it_comes(
    open_tiny: Open, service: ServiceThread
) -> None:
    prompt = text(1, 100)
    service.end()
    with attached(open_tiny(), service, waits=False) as kv:
        ask(kv, prompt)
        time.sleep(0.3)  # the loop has gone to sleep
        service.begin()
        with attached(open_tiny(), service) as other:
            until(lambda: service.stats()["committed"] >= 6, "nothing is written")
            assert ask(other, prompt)[2] == 6 * BLOCK


def test_a_worker_that_does_not_know_the_secret_takes_it_from_the_service(
    open_tiny: Open, service: ServiceThread
) -> None:
    prompt = text(1, 100)
    with attached(open_tiny(), service) as one:
        cold = ask(one, prompt)[0]
        written(one, service)
        knows_none = replace(service.settings, secret="")
        with attached(open_tiny(), service, settings=knows_none) as other:
            assert ask(other, prompt) == (cold, 0, 6 * BLOCK)


def test_tenants_share_nothing_not_even_sessions(open_tiny: Open, service: ServiceThread) -> None:
    prompt = text(1, 100)
    with attached(open_tiny(), service) as kv:
        ann, bob = kv.as_tenant("ann"), kv.as_tenant("bob")
        cold = ask(ann, prompt, "s")
        written(kv, service)
        assert ask(bob, prompt, "s") == cold
        written(kv, service)
        assert ask(ann, prompt, "s")[1] == 6 * BLOCK
        with attached(open_tiny(), service) as other:
            assert ask(other.as_tenant("carl"), prompt)[2] == 0
            assert ask(other.as_tenant("bob"), prompt)[2] == 6 * BLOCK
        written(kv, service)
        charged = service.stats()["by_tenant"]
        assert charged["ann"] == charged["bob"] >= 6 * kv.engine.shape.bytes


def test_a_hint_loads_what_the_arena_holds_instead_of_computing_it(open_tiny: Open, service: ServiceThread) -> None:
    prompt = text(1, 100)
    with attached(open_tiny(), service) as one, attached(open_tiny(), service) as two:
        cold = ask(one, prompt)[0]
        written(one, service)
        hint = two.prefetch(Context(token_ids=tuple(prompt)), session="s")
        warm = hint.wait(timeout_s=60)
        assert (warm.outcome, warm.tokens) == (Outcome.WARM, 6 * BLOCK)
        assert "load" in hint.because
        assert two.stats()["prefetch"]["tokens_computed"] == 0
        assert ask(two, prompt, "s") == (cold, 6 * BLOCK, 0)
        assert hint.use is Use.USED


def test_an_arena_that_is_full_keeps_what_it_can(open_tiny: Open, tmp_path: Path) -> None:
    engine = open_tiny()
    slots = 4 + 12
    service = ServiceThread(tmp_path, arena=str(slots * max(engine.shape.bytes, 4096)))
    try:
        prompts = [text(n, 100) for n in range(6)]
        cold = [cold_answer(engine, prompt) for prompt in prompts]
        with attached(engine, service) as kv:
            for prompt, tokens in zip(prompts, cold, strict=True):
                assert ask(kv, prompt)[0] == tokens
            written(kv, service)
            with attached(open_tiny(), service) as other:
                assert ask(other, prompts[-1])[2] > 0
        service.check()
    finally:
        service.end()


def test_a_worker_without_a_service_is_as_it_always_was(open_tiny: Open) -> None:
    with local(open_tiny()) as kv:
        ask(kv, text(1, 100))
        assert kv.stats()["node"] is None
