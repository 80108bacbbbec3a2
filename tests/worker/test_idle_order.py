"""Idle time of one worker, shared by the tenants that want it, and metered."""

from collections.abc import Callable

import pytest
from workers import Bench, local, text

from kvprefetch.cache.shares import Share, Shares
from kvprefetch.engines.engine import TransformersEngine

Open = Callable[..., TransformersEngine]
TICK_S = 0.01


class TickingBench(Bench):
    """Each look at its clock is a tick later."""

    def clock(self) -> float:
        self.now += TICK_S
        return self.now


def chunks(bench: Bench, steps: int) -> dict[str, int]:
    """Computed after so many, by tenant; ann hints at two contexts, bob at ten, and is surer of each."""
    for n in range(10):
        bench.hint(text(n, 192), tenant="bob", probability=1.0)
    for n in range(2):
        bench.hint(text(20 + n, 192), probability=0.9)
    for _ in range(12 + steps):  # first each context is read
        bench.speculate()
    return {tenant: kinds["speculative"] // 4 for tenant, kinds in bench.pool.charges().items()}


def test_ten_hints_get_no_more_idle_time_than_two(open_tiny: Open) -> None:
    bench = TickingBench(open_tiny(pages=256), max_pending=64)
    assert chunks(bench, 10) == {"ann": 5, "bob": 5}
    meters = bench.foresight.meters.stats()
    assert meters["ann"]["prefill_s"] == pytest.approx(meters["bob"]["prefill_s"])


def test_what_one_does_not_want_any_more_the_other_has(open_tiny: Open) -> None:
    bench = TickingBench(open_tiny(pages=256), max_pending=64)
    assert chunks(bench, 20) == {"ann": 6, "bob": 14}


def test_contexts_of_one_are_read_though_another_has_many(open_tiny: Open) -> None:
    bench = TickingBench(open_tiny(pages=256), max_pending=64)
    flood = [bench.hint(text(n, 192), tenant="bob", probability=1.0) for n in range(20)]
    job = bench.hint(text(30, 192), probability=0.5)
    bench.speculate()
    bench.speculate()
    assert job.tokens is not None
    assert sum(other.tokens is not None for other in flood) == 1


def test_by_weight_one_gets_more_of_it(open_tiny: Open) -> None:
    bench = TickingBench(open_tiny(pages=256), max_pending=64)
    bench.foresight.set_shares(Shares({"bob": Share(weight=3.0)}))
    had = chunks(bench, 12)
    assert had["bob"] == pytest.approx(9, abs=1)
    assert had["ann"] == pytest.approx(3, abs=1)


def test_a_step_that_was_given_up_is_paid_for_as_well(open_tiny: Open) -> None:
    bench = TickingBench(open_tiny(pages=64))
    bench.hint(text(1, 64))
    bench.speculate()
    bench.speculate(abandon=lambda: True)
    assert bench.ledger.tokens_abandoned == 64
    assert bench.foresight.meters.stats()["ann"]["prefill_s"] > 0
    assert bench.foresight.planner.counters.level("ann") > 0


def test_what_lies_in_the_pool_unused_is_metered_and_where_memory_has_a_price_paid_for(open_tiny: Open) -> None:
    bench = TickingBench(open_tiny(pages=8))
    bench.foresight.meters.page_bytes = 1_000
    bench.hint(text(1, 64), probability=0.9)
    bench.speculate_all()
    bench.foresight.occupied(100.0)
    bench.foresight.occupied(110.0)
    assert bench.foresight.meters.stats()["ann"]["byte_seconds"] == 4 * 1_000 * 10
    had = bench.foresight.planner.counters.level("ann")
    bench.ask(text(2, 64), 1)
    bench.serve()  # the pool is full now
    bench.hint(text(3, 64), tenant="bob")
    bench.speculate_all()
    assert bench.foresight.planner.load.price > 0
    bench.foresight.occupied(120.0)
    assert bench.foresight.planner.counters.level("ann") > had


def test_a_worker_tells_what_each_tenant_has_had(open_tiny: Open) -> None:
    with local(open_tiny()) as kv:
        kv.prefetch(kv.context(token_ids=text(1, 64)), probability=0.9).wait(20)
        meter = kv.stats()["speculation"][kv.tenant]
        assert meter["prefill_s"] > 0
        assert meter["byte_seconds"] >= 0
