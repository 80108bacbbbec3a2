"""A pool takes another size while it runs: answers stay the same, and memory is really given back."""

import mmap
from collections.abc import Callable

import psutil
import pytest
import torch
from workers import Bench, cold_answer, local, text

from kvprefetch.engines.engine import TransformersEngine
from kvprefetch.errors import PoolFull, PoolTooSmall, SettingsError
from kvprefetch.outcomes import Outcome
from kvprefetch.tiers.device import DevicePool, PageShape
from kvprefetch.worker.resize import resize

Open = Callable[..., TransformersEngine]
MIB = 2**20
LARGE = PageShape(layers=4, kv_heads=4, head_dim=32, block_tokens=32, dtype=torch.bfloat16)  # 64 KiB a page


def test_released_pages_go_back_to_the_system_and_the_others_stay() -> None:
    """By the system's own count of this process's physical memory; other threads may take a little meanwhile."""
    count = psutil.Process().memory_info
    pool = DevicePool(LARGE, 1024, torch.device("cpu"))
    pool.tensor.fill_(7.0)
    full = count().rss
    assert pool.release(256, 1024) == 48 * MIB
    shrunk = count().rss
    assert full - shrunk > 44 * MIB
    assert bool((pool.tensor[:256] == 7.0).all())
    pool.back(256, 512)
    assert not pool.tensor[256:512].any(), "the system kept it"
    pool.tensor[256:512].fill_(3.0)
    assert count().rss - shrunk > 14 * MIB


def test_parts_of_segments_stay() -> None:
    shape = PageShape(layers=1, kv_heads=1, head_dim=8, block_tokens=16, dtype=torch.float32)  # 1 KiB a page
    pool = DevicePool(shape, 64, torch.device("cpu"))
    pool.tensor.fill_(7.0)
    per = mmap.PAGESIZE // shape.bytes
    assert pool.release(1, per + 1) == 0
    assert pool.release(1, 2 * per + 1) == mmap.PAGESIZE
    assert bool((pool.tensor[:per] == 7.0).all())
    assert bool((pool.tensor[2 * per :] == 7.0).all())


def test_a_smaller_pool_keeps_what_was_used_last(open_tiny: Open) -> None:
    engine = open_tiny()
    bench = Bench(engine)
    for number in range(6):
        bench.now += 1
        bench.ask(text(number, 100), 1)
        bench.serve()
    done = resize(engine, bench.pool, 14, bench.now)
    bench.pool.check()
    assert (done.pages, bench.pool.pages) == (14, 14)
    assert done.evicted_pages > 0
    assert done.bytes_given_back > 0
    for number, reused in ((5, 96), (4, 96), (0, 0)):
        request = bench.ask(text(number, 100) + text(9, 5))
        bench.serve()
        assert request.stream.reused_tokens == reused
        assert request.stream.tokens == cold_answer(open_tiny(), text(number, 100) + text(9, 5))


def test_it_grows_again_and_serves_what_did_not_fit(open_tiny: Open) -> None:
    engine = open_tiny()
    bench = Bench(engine)
    resize(engine, bench.pool, 4, bench.now)
    too_long = bench.ask(text(0, 100))
    bench.serve()
    with pytest.raises(PoolTooSmall):
        too_long.stream.result()
    assert resize(engine, bench.pool, 64, bench.now).pages == 64
    bench.pool.check()
    request = bench.ask(text(0, 100))
    bench.serve()
    assert request.stream.tokens == cold_answer(open_tiny(), text(0, 100))


def test_what_a_request_holds_limits_how_small_it_gets(open_tiny: Open) -> None:
    engine = open_tiny()
    bench = Bench(engine)
    first = bench.ask(text(1, 100), 1)
    bench.serve()
    running = bench.ask(text(2, 100), 20)  # above the first one's pages
    bench.live.step(bench.clock, lambda: False)
    highest = max(running.sequence.pages)
    with pytest.raises(PoolFull):
        resize(engine, bench.pool, 3, bench.now)
    assert bench.pool.pages == 64
    done = resize(engine, bench.pool, 10, bench.now)
    bench.pool.check()
    assert done.pages == highest + 1 > 10
    bench.serve()
    assert running.stream.tokens == cold_answer(open_tiny(), text(2, 100), 20)
    assert first.stream.tokens == cold_answer(open_tiny(), text(1, 100), 1)
    assert resize(engine, bench.pool, 10, bench.now).pages == 10


@pytest.mark.parametrize("pages", [0, -1, 65])
def test_a_size_that_it_cannot_have_is_refused(open_tiny: Open, pages: int) -> None:
    engine = open_tiny()
    bench = Bench(engine)
    with pytest.raises(SettingsError, match="opened with 64"):
        resize(engine, bench.pool, pages, 0.0)
    assert bench.pool.pages == 64


def test_it_can_be_asked_for_in_process(open_tiny: Open) -> None:
    engine = open_tiny()
    with local(engine) as kv:
        before = kv.generate(token_ids=text(1, 60), max_tokens=4, ignore_eos=True).result()
        done = kv.resize(str(16 * engine.shape.bytes))
        assert kv.stats()["pool"]["pages"] == done.pages == 16
        again = kv.generate(token_ids=text(1, 60), max_tokens=4, ignore_eos=True)
        again.result()
        assert again.tokens == before.tokens
        with pytest.raises(PoolTooSmall, match="the pool has 16"):
            kv.generate(token_ids=text(1, 600), max_tokens=4)
        assert kv.resize(str(64 * engine.shape.bytes)).pages == 64


def test_a_hint_that_no_longer_fits_is_clipped(open_tiny: Open) -> None:
    engine = open_tiny()
    with local(engine) as kv:
        kv.resize(str(8 * engine.shape.bytes))
        result = kv.prefetch(kv.context(token_ids=text(2, 300))).wait(timeout_s=60)
        assert (result.outcome, result.tokens) == (Outcome.CLIPPED, 8 * engine.block_tokens)
        kv.resize(str(64 * engine.shape.bytes))
        assert kv.prefetch(kv.context(token_ids=text(2, 300))).wait(timeout_s=60).outcome is Outcome.WARM
