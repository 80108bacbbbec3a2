"""Live requests: packing, sharing, turns, admission."""

from collections.abc import Callable

import pytest
from workers import Bench, cold_answer, text

from kvprefetch.cache.evict import Demand
from kvprefetch.engines.engine import TransformersEngine
from kvprefetch.errors import PoolTooSmall
from kvprefetch.outcomes import MissReason

Open = Callable[..., TransformersEngine]


def test_requests_served_together_answer_as_each_alone(open_tiny: Open) -> None:
    engine = open_tiny(pages=128)
    prompts = [text(i, n) for i, n in enumerate((1, 15, 16, 17, 63, 64, 65, 200))]
    alone = [cold_answer(engine, prompt, 12) for prompt in prompts]
    bench = Bench(engine)
    requests = []
    for prompt in prompts:
        requests.append(bench.ask(prompt, 12))
        bench.live.step(bench.clock, lambda: False)  # they come while others are being served
    bench.serve()
    assert [request.stream.tokens for request in requests] == alone


def test_each_request_draws_from_its_own_random_state(open_tiny: Open) -> None:
    engine = open_tiny()
    how = {"temperature": 1.5, "seed": 11}
    alone = cold_answer(engine, text(1, 40), 10, **how)
    bench = Bench(engine)
    other = bench.ask(text(2, 30), 10, temperature=1.5, seed=12)
    bench.live.step(bench.clock, lambda: False)
    mine = bench.ask(text(1, 40), 10, **how)
    bench.serve()
    assert mine.stream.tokens == alone
    assert other.stream.tokens != alone


def test_a_beginning_that_two_prompts_in_flight_share_is_computed_once(open_tiny: Open) -> None:
    engine = open_tiny(pages=64)
    prompt = text(1, 16 * 12)
    bench = Bench(engine)
    first = bench.ask(prompt)
    bench.live.step(bench.clock, lambda: False)
    second = bench.ask(prompt[:176])
    steps = 1
    while first.timing.first_token is None or second.timing.first_token is None:
        bench.live.step(bench.clock, lambda: False)
        steps += 1
    assert first.sequence.pages[:11] == second.sequence.pages[:11]
    assert steps <= 4  # three chunks of 64 for both together, and the rest of one
    bench.serve()
    assert first.stream.tokens == cold_answer(engine, prompt)
    assert second.stream.tokens == cold_answer(engine, prompt[:176])
    assert bench.ledger.looked_up[MissReason.IN_FLIGHT.value] == 7


def test_of_two_identical_prompts_the_second_is_let_in_when_the_first_is_computed(open_tiny: Open) -> None:
    engine = open_tiny(pages=64)
    prompt = text(1, 16 * 12)
    bench = Bench(engine)
    first, second = bench.ask(prompt), bench.ask(prompt)
    steps = 0
    while first.timing.first_token is None or second.timing.first_token is None:
        bench.live.step(bench.clock, lambda: False)
        steps += 1
    assert steps <= 4  # three chunks of 64 for both together, and the second's last token
    assert second.stream.reused_tokens == 191
    bench.serve()
    assert first.stream.tokens == second.stream.tokens == cold_answer(engine, prompt)


def test_a_fully_cached_prompt_runs_its_last_token_and_writes_no_shared_page(open_tiny: Open) -> None:
    engine = open_tiny()
    prompt = text(1, 64)
    bench = Bench(engine)
    bench.ask(prompt, 1)
    bench.serve()
    again = bench.ask(prompt, 1)
    pages = [block.page for block in bench.pool.match(again.sequence.keys)]
    before = engine.pool.tensor[pages].clone()
    bench.serve()
    assert again.stream.reused_tokens == 63
    assert again.stream.tokens == cold_answer(engine, prompt, 1)
    assert engine.pool.tensor[pages].equal(before)


def test_a_short_prompt_waits_for_one_slice_of_a_long_one(open_tiny: Open) -> None:
    bench = Bench(open_tiny(pages=64))
    long = bench.ask(text(1, 640))
    bench.live.step(bench.clock, lambda: False)
    short = bench.ask(text(2, 20))
    for _ in range(2):
        bench.live.step(bench.clock, lambda: False)
    assert short.timing.first_token is not None
    assert long.timing.first_token is None


def test_a_live_prefill_that_waits_keeps_its_references(open_tiny: Open) -> None:
    """Others churn through the rest of the pool meanwhile; what was computed is still there."""
    engine = open_tiny(pages=28)
    prompt = text(1, 256)
    bench = Bench(engine)
    long = bench.ask(prompt, 2)
    bench.live.step(bench.clock, lambda: False)
    computed, pages = long.sequence.computed, long.sequence.pages
    for turn in range(8):
        short = bench.ask(text(10 + turn, 100), 1)  # it has less left, so it goes ahead
        while short.timing.finished is None:
            bench.live.step(bench.clock, lambda: False)
            bench.pool.check()
    assert bench.pool.evictions > 0
    assert (long.sequence.computed, long.sequence.pages) == (computed, pages)
    bench.serve()
    assert long.stream.tokens == cold_answer(engine, prompt, 2)


def test_a_request_waits_until_all_its_pages_can_be_had(open_tiny: Open) -> None:
    engine = open_tiny(pages=8)
    bench = Bench(engine)
    first, second = bench.ask(text(1, 70), 20), bench.ask(text(2, 70), 20)
    bench.live.step(bench.clock, lambda: False)
    assert first in bench.live.active
    assert second in bench.live.waiting
    bench.serve()
    assert second.stream.tokens == cold_answer(engine, text(2, 70), 20)


def test_one_that_can_never_fit_is_told_so_and_the_next_is_served(open_tiny: Open) -> None:
    bench = Bench(open_tiny(pages=4))
    giant, small = bench.ask(text(1, 100)), bench.ask(text(2, 20))
    bench.serve()
    with pytest.raises(PoolTooSmall, match="pages"):
        giant.stream.result()
    assert len(small.stream.tokens) == 4


def test_the_answer_becomes_part_of_the_cached_prefix_but_for_its_last_token(open_tiny: Open) -> None:
    bench = Bench(open_tiny())
    request = bench.ask(text(1, 30), 19)  # 49 tokens in all, KV for 48 of them: three blocks
    bench.serve()
    whole = request.prompt + request.stream.tokens
    follow_up = bench.ask(whole + text(3, 10), 1)
    bench.serve()
    assert follow_up.stream.reused_tokens == 48


def test_misses_have_their_reasons(open_tiny: Open) -> None:
    bench = Bench(open_tiny(pages=16))
    base = text(1, 64)
    bench.ask(base, 1)
    bench.serve()
    bench.ask(base[:32] + text(9, 32), 1)
    bench.serve()
    assert bench.ledger.looked_up[MissReason.DIVERGED.value] == 2
    bench.pool.clear()
    bench.ask(base, 1)
    bench.serve()
    assert bench.ledger.looked_up[MissReason.EVICTED.value] == 4
    assert bench.ledger.evicted_by["cleared"] == 4


def test_a_cancelled_request_gives_everything_back(open_tiny: Open) -> None:
    bench = Bench(open_tiny())
    request = bench.ask(text(1, 200), 50)
    bench.live.step(bench.clock, lambda: False)
    request.cancelled = True
    bench.serve()
    assert not bench.pool.holders
    bench.pool.reserve(bench.pool.pages, Demand("ann", speculative=False, now=0.0))
