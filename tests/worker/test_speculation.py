"""Speculation: bounded, preemptible, resumed, and each preload with one outcome and one use."""

from collections.abc import Callable
from itertools import count

import pytest
from workers import Bench, cold_answer, text

from kvprefetch.engines.engine import TransformersEngine
from kvprefetch.outcomes import Outcome, Use

Open = Callable[..., TransformersEngine]


def after(asked: int) -> Callable[[], bool]:
    """Asks for abandonment from the `asked`-th layer on."""
    numbers = count()
    return lambda: next(numbers) >= asked


@pytest.mark.parametrize("tokens", [16, 17, 63, 64, 65, 200])
def test_a_preloaded_prompt_is_answered_as_a_cold_one(open_tiny: Open, tokens: int) -> None:
    engine = open_tiny()
    context, question = text(1, tokens), text(2, 9)
    bench = Bench(engine)
    job = bench.hint(context)
    bench.speculate_all()
    request = bench.ask(context + question, 16)
    bench.serve()
    warm = tokens // 16 * 16
    assert bench.results[0].outcome is Outcome.WARM
    assert (bench.results[0].tokens, request.stream.reused_tokens) == (warm, warm)
    assert (job.ticket.use, job.ticket.used_tokens) == (Use.USED, warm)
    assert request.stream.tokens == cold_answer(engine, context + question, 16)


@pytest.mark.parametrize("layer", [0, 1])
def test_preemption_loses_one_chunk_and_the_rest_is_resumed(open_tiny: Open, layer: int) -> None:
    bench = Bench(open_tiny())
    bench.hint(text(1, 256))
    bench.speculate()  # renders
    bench.speculate()  # 64 tokens
    bench.speculate(after(layer))
    assert bench.ledger.tokens_abandoned == 64
    assert bench.ledger.tokens_computed == 64
    assert not bench.pool.in_flight
    bench.speculate_all()
    assert bench.results[0].outcome is Outcome.WARM
    assert bench.ledger.tokens_computed == 256


def test_a_request_that_overtakes_its_preload_takes_what_is_done(open_tiny: Open) -> None:
    engine = open_tiny()
    context, question = text(1, 256), text(2, 9)
    bench = Bench(engine)
    job = bench.hint(context)
    for _ in range(3):
        bench.speculate()
    request = bench.ask(context + question)
    bench.serve()
    bench.speculate_all()
    assert request.stream.reused_tokens == 128
    assert request.stream.tokens == cold_answer(engine, context + question)
    assert job.ticket.use is Use.LATE
    assert bench.ledger.tokens_computed == bench.ledger.tokens_used == 128


def test_nothing_is_done_twice(open_tiny: Open) -> None:
    bench = Bench(open_tiny())
    bench.hint(text(1, 128))
    bench.hint(text(1, 128))
    bench.speculate_all()
    assert {result.outcome for result in bench.results} == {Outcome.WARM, Outcome.ALREADY_WARM}
    assert bench.ledger.tokens_computed == 128


def test_a_context_larger_than_the_pool_is_clipped_to_what_fits(open_tiny: Open) -> None:
    bench = Bench(open_tiny(pages=10))
    job = bench.hint(text(1, 400))
    bench.speculate_all()
    assert bench.results[0].outcome is Outcome.CLIPPED
    assert bench.results[0].tokens == 128
    request = bench.ask(text(1, 130), 2)
    bench.serve()
    assert request.stream.reused_tokens == 128
    assert job.ticket.use is Use.USED


def test_a_live_request_takes_the_pages_of_unused_speculation(open_tiny: Open) -> None:
    engine = open_tiny(pages=10)
    bench = Bench(engine)
    job = bench.hint(text(1, 128))
    bench.speculate_all()
    request = bench.ask(text(2, 150), 4)
    bench.serve()
    assert request.stream.tokens == cold_answer(engine, text(2, 150))
    assert job.ticket.use is Use.EVICTED or job.ticket.unspent


def test_wrong_hints_displace_each_other_before_they_touch_what_was_used(open_tiny: Open) -> None:
    bench = Bench(open_tiny(pages=16))
    bench.ask(text(1, 128), 1)
    bench.serve()
    for wrong in range(2, 8):
        bench.now += 1
        bench.hint(text(wrong, 128))
        bench.speculate_all()
    again = bench.ask(text(1, 128) + text(9, 5), 1)
    bench.serve()
    assert again.stream.reused_tokens == 128


def test_a_hint_whose_time_has_passed_expires(open_tiny: Open) -> None:
    bench = Bench(open_tiny())
    bench.hint(text(1, 128), expected_in_s=5, hold_s=10)
    bench.now = 16
    bench.speculate_all()
    assert bench.results[0].outcome is Outcome.EXPIRED
    assert bench.ledger.tokens_computed == 0


def test_an_unused_preload_is_unused_when_its_hold_ends_and_its_pages_go_first(open_tiny: Open) -> None:
    bench = Bench(open_tiny(pages=16))
    job = bench.hint(text(1, 128), hold_s=10)
    bench.speculate_all()
    bench.ask(text(2, 100), 1)
    bench.serve()
    bench.now = 11
    bench.ledger.expire_holds(bench.now)
    assert job.ticket.use is Use.UNUSED
    bench.ask(text(3, 100), 1)
    bench.serve()
    used = bench.ask(text(2, 100) + text(4, 5), 1)
    bench.serve()
    assert used.stream.reused_tokens == 96


def test_too_many_waiting_hints_are_rejected_with_a_reason(open_tiny: Open) -> None:
    bench = Bench(open_tiny())
    for number in range(10):
        bench.hint(text(number, 32))
    assert [result.outcome for result in bench.results] == [Outcome.REJECTED] * 2
    assert "8 preloads" in bench.results[0].reason


def test_an_engine_failure_fails_that_preload_and_no_other(open_tiny: Open) -> None:
    bench = Bench(open_tiny())
    bench.hint(text(1, 64), probability=0.9)
    bench.hint(text(2, 64), probability=0.1)

    def break_down() -> bool:
        raise RuntimeError("out of memory")

    bench.speculate()  # renders
    bench.speculate()
    bench.speculate(break_down)
    bench.speculate_all()
    assert [result.outcome for result in bench.results] == [Outcome.FAILED, Outcome.WARM]
    assert "out of memory" in bench.results[0].reason


def test_the_sums_hold(open_tiny: Open) -> None:
    bench = Bench(open_tiny(pages=24))
    for number in range(6):
        bench.hint(text(number, 100 + 16 * number), hold_s=5)
        bench.speculate()
        bench.now += 1
    bench.speculate_all()
    bench.ask(text(3, 170), 2)
    bench.serve()
    bench.now += 100
    bench.ledger.expire_holds(bench.now)
    stats, lookups = bench.ledger.stats(), bench.ledger.lookup_stats()
    assert sum(stats["outcomes"].values()) + stats["pending"] == stats["issued"] == 6
    resident = sum(stats["outcomes"][name] for name in ("WARM", "ALREADY_WARM", "CLIPPED"))
    assert sum(stats["uses"].values()) + stats["use_pending"] == resident
    assert lookups["hits"] + sum(lookups["misses"].values()) == lookups["blocks"]
