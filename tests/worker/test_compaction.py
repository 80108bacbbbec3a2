"""Compaction moves pages under answers that stay the same."""

from collections.abc import Callable

import pytest
from workers import Bench, cold_answer, local, text

from kvprefetch.engines.engine import TransformersEngine
from kvprefetch.worker import compact as compaction
from kvprefetch.worker.compact import compact

Open = Callable[..., TransformersEngine]


def holes(bench: Bench) -> None:
    """Six contexts side by side, every second one gone."""
    for number in range(6):
        bench.ask(text(number, 100), 1)
        bench.serve()
    for number in (0, 2, 4):
        asked = bench.ask(text(number, 100))
        for block in reversed(bench.pool.match(asked.sequence.keys)):
            bench.pool.evict(block, "test")
        bench.live.turns.forget(asked)


@pytest.mark.parametrize("order", [False, True])
def test_a_packed_pool_answers_as_before(open_tiny: Open, order: bool) -> None:
    engine = open_tiny()
    bench = Bench(engine)
    holes(bench)
    done = compact(engine, bench.pool, order=order)
    bench.pool.check()
    live = len(bench.pool.resident)
    assert done.free_tail_pages == bench.pool.pages - live
    assert done.moved_bytes == done.moved_pages * engine.shape.bytes > 0
    assert sorted(block.page for block in bench.pool.blocks()) == list(range(live))
    engine.pool.tensor[live:].fill_(float("nan"))
    for number in (1, 3, 5):
        request = bench.ask(text(number, 100) + text(9, 5))
        bench.serve()
        assert request.stream.reused_tokens == 96
        assert request.stream.tokens == cold_answer(open_tiny(), text(number, 100) + text(9, 5))


def test_an_ordered_sequence_is_one_run(open_tiny: Open) -> None:
    engine = open_tiny()
    bench = Bench(engine)
    holes(bench)
    for number in (10, 11):  # they take the holes, and grow at once
        bench.ask(text(number, 200), 40)
    bench.serve()
    done = compact(engine, bench.pool, order=True)
    assert done.runs_after == len(bench.pool.sequences()) <= done.runs_before
    assert compact(engine, bench.pool, order=True).moved_pages == 0


def test_what_a_request_holds_stays_where_it_is(open_tiny: Open) -> None:
    engine = open_tiny()
    bench = Bench(engine)
    holes(bench)
    prompt = text(5, 100) + text(8, 30)
    running = bench.ask(prompt, 8)
    bench.live.step(bench.clock, lambda: False)
    held = running.sequence.pages
    compact(engine, bench.pool, order=True)
    bench.pool.check()
    assert running.sequence.pages == held
    bench.serve()
    assert running.stream.tokens == cold_answer(open_tiny(), prompt, 8)


def test_a_failure_half_way_leaves_every_block_readable(open_tiny: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = open_tiny()
    bench = Bench(engine)
    holes(bench)
    before = {key: block.page for key, block in bench.pool.resident.items()}

    def fails(*arguments: object, **options: object) -> None:
        engine.pool.tensor[sorted(set(range(64)) - set(before.values()))] = float("nan")
        raise RuntimeError("the copy broke")

    monkeypatch.setattr(compaction, "copy_pages", fails)
    with pytest.raises(RuntimeError, match="the copy broke"):
        compact(engine, bench.pool, order=False)
    bench.pool.check()
    assert {key: block.page for key, block in bench.pool.resident.items()} == before
    request = bench.ask(text(3, 100) + text(9, 5))
    bench.serve()
    assert request.stream.tokens == cold_answer(open_tiny(), text(3, 100) + text(9, 5))


def test_it_can_be_asked_for_in_process(open_tiny: Open) -> None:
    with local(open_tiny()) as kv:
        for number in range(3):
            kv.generate(token_ids=text(number, 60), max_tokens=2, ignore_eos=True).result()
        done = kv.compact(order=True)
        assert done.free_tail_pages == 64 - kv.stats()["pool"]["resident"]
