"""Live requests of several tenants: nobody is stuck behind another's parade, and nobody's pages keep others out."""

import threading
import time
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings
from workers import Bench, cold_answer, local, text

from kvprefetch.cache.shares import Share, Shares
from kvprefetch.contexts import Sampling
from kvprefetch.engines.engine import TransformersEngine
from kvprefetch.worker.admission import PATIENCE_S
from kvprefetch.worker.request import LiveRequest

Open = Callable[..., TransformersEngine]


def step(bench: Bench, seconds: float = 0.0) -> None:
    bench.now += seconds
    bench.live.step(bench.clock, lambda: False)
    bench.pool.check()


def answered(*requests: LiveRequest) -> int:
    return sum(request.timing.first_token is not None for request in requests)


def parade(bench: Bench, batch: str) -> int:
    """Eight long prompts of `batch` are queued when ann asks; how many are answered before her three short ones?"""
    queued = [bench.ask(text(n, 448), 1, tenant=batch) for n in range(8)]
    step(bench)
    short = [bench.ask(text(20 + n, 20), 1) for n in range(3)]
    while answered(*short) < 3:
        step(bench)
    return answered(*queued)


def test_a_short_request_is_not_stuck_behind_a_parade_of_long_ones(open_tiny: Open) -> None:
    assert parade(Bench(open_tiny(pages=256)), "batch") == 0


def test_first_come_first_served_it_would_be(open_tiny: Open) -> None:
    bench = Bench(open_tiny(pages=256))
    bench.live.turns._work = lambda request: 0.0  # type: ignore[method-assign]
    assert parade(bench, "ann") == 8, "one tenant and no work told apart: this is that order"


def test_the_parade_goes_on_beside_short_requests_without_end(open_tiny: Open) -> None:
    bench = Bench(open_tiny(pages=64))
    queued = [bench.ask(text(n, 400), 1, tenant="batch") for n in range(2)]
    for number in range(150):  # ann always has one waiting, and each takes a forward
        bench.ask(text(20 + number, 60), 1)
        step(bench)
        if answered(*queued) == 2:
            break
    assert 14 <= number <= 2 * 14 + 1_000 // 60, "it has its half, but for a lead of a second: of as many tokens"


def test_by_weight_it_goes_on_faster(open_tiny: Open) -> None:
    def forwards(weight: float) -> int:
        bench = Bench(open_tiny(pages=64))
        bench.live.turns.set_shares(Shares({"batch": Share(weight)}))
        queued = [bench.ask(text(n, 400), 1, tenant="batch") for n in range(2)]
        for number in range(200):
            bench.ask(text(20 + number, 60), 1)
            step(bench)
            if answered(*queued) == 2:
                return number
        raise AssertionError("it starves")

    assert forwards(4.0) < forwards(1.0) < forwards(0.5)


def test_of_one_tenant_what_has_least_left_goes_first_and_a_warm_prompt_has(open_tiny: Open) -> None:
    bench = Bench(open_tiny(pages=128))
    document = text(1, 320)
    bench.ask(document, 1)
    bench.serve()
    cold = [bench.ask(text(n, 200), 1) for n in (2, 3)]
    warm = bench.ask(document + text(4, 10), 1)
    step(bench)
    assert (answered(warm), answered(*cold)) == (1, 0)


def test_who_cannot_be_admitted_now_stands_in_nobodys_way(open_tiny: Open) -> None:
    bench = Bench(open_tiny(pages=32))
    first = bench.ask(text(1, 30), 300, tenant="batch")  # 21 pages
    step(bench)
    second = bench.ask(text(2, 30), 300, tenant="batch")  # its turn comes first, but it has to wait for them
    short = [bench.ask(text(3 + n, 60), 2) for n in range(4)]
    while answered(*short) < 4:
        step(bench)
    assert first.timing.finished is None
    assert second in bench.live.waiting
    bench.serve()
    assert second.stream.tokens == cold_answer(bench.engine, text(2, 30), 300)


def test_alone_a_tenant_has_all_pages_and_beside_another_its_part(open_tiny: Open) -> None:
    bench = Bench(open_tiny(pages=32))
    admission = bench.live.turns.admission
    batch = [bench.ask(text(n, 100), 21 + n, tenant="batch") for n in range(12)]  # 8 pages each, ending one by one
    while admission.pinned("batch") < 32:
        step(bench)
    ann = [bench.ask(text(40 + n, 220), 21) for n in range(3)]  # 15 pages: more than one of batch leaves
    at_first = [r for r in batch if r in bench.live.waiting]
    while ann[0] in bench.live.waiting:
        step(bench)
        assert [r for r in batch if r in bench.live.waiting] == at_first
    while any(r in bench.live.waiting for r in ann):
        step(bench)
        assert admission.pinned("batch") <= 16
    bench.serve()
    assert answered(*batch, *ann) == 15
    assert not admission._pinned
    assert not admission._running
    assert not admission._waiting


def test_beside_one_that_is_guaranteed_more_the_part_is_smaller(open_tiny: Open) -> None:
    bench = Bench(open_tiny(pages=32))
    bench.live.turns.set_shares(Shares({"ann": Share(guarantee=0.5), "batch": Share(weight=3.0)}))
    admission = bench.live.turns.admission
    bench.ask(text(1, 100), 1, tenant="batch")
    assert admission.part("batch", 32) == 32
    bench.ask(text(2, 100), 1)
    assert (admission.part("batch", 32), admission.part("ann", 32)) == (12.0, 20.0)
    bench.serve()


def test_pages_that_requests_of_a_tenant_share_count_once(open_tiny: Open) -> None:
    bench = Bench(open_tiny(pages=32))
    document = text(1, 160)
    bench.ask(document, 1, tenant="batch")
    bench.serve()
    held = [bench.ask(document + text(n, 20), 12, tenant="batch") for n in range(2, 5)]  # 12 pages, 10 of them shared
    bench.ask(text(50, 300), 100)  # waits for half of the pool and more
    while answered(*held) < 3:
        step(bench)
    assert bench.live.turns.admission.pinned("batch") == 16
    bench.serve()


def test_rows_are_shared_as_pages_are(open_tiny: Open) -> None:
    bench = Bench(open_tiny(pages=128, max_rows=4))
    batch = [bench.ask(text(n, 20), 30 + 5 * n, tenant="batch") for n in range(10)]
    while sum(r.is_decoding for r in bench.live.active) < 4:
        step(bench)
    ann = [bench.ask(text(40 + n, 20), 200) for n in range(2)]
    bench.live.turns.counters.charge("ann", 60.0)  # she has had much: it is not her turn
    while any(r in bench.live.waiting for r in ann):
        step(bench)
        assert len([r for r in batch if r not in bench.live.waiting]) == 4
    assert len([r for r in batch if r in bench.live.active]) == 2
    bench.serve()
    assert answered(*batch) == 10


def test_a_request_larger_than_its_part_runs_at_some_time(open_tiny: Open) -> None:
    bench = Bench(open_tiny(pages=32))
    large = None
    for number in range(400):  # batch never lets more than a few pages be free
        while len(bench.live.waiting) < 4:
            bench.ask(text(10 + number % 300, 90), 20, tenant="batch")
        if number == 20:
            large = bench.ask(text(1, 400), 40)  # 28 pages
        step(bench, seconds=0.5)
        if large is not None and large not in bench.live.waiting:
            break
    assert large is not None
    assert large in bench.live.active
    assert (number - 20) * 0.5 > PATIENCE_S, "not at once: it is larger than its part"
    bench.serve()
    assert large.stream.tokens == cold_answer(bench.engine, text(1, 400), 40)


def test_one_that_is_waited_for_and_goes_away_lets_the_others_in(open_tiny: Open) -> None:
    bench = Bench(open_tiny(pages=32))
    bench.ask(text(2, 90), 300, tenant="batch")
    step(bench)
    large = bench.ask(text(1, 450), 40)
    step(bench)
    other = bench.ask(text(3, 30), 2, tenant="batch")
    bench.now += 100.0
    step(bench)
    assert bench.live.turns.admission.awaited is large
    assert other in bench.live.waiting
    large.cancelled = True
    step(bench)
    assert bench.live.turns.admission.awaited is None
    assert other not in bench.live.waiting
    bench.serve()


def test_a_clock_that_goes_back_does_no_harm(open_tiny: Open) -> None:
    bench = Bench(open_tiny(pages=32))
    bench.now = 1_000.0
    requests = [bench.ask(text(n, 100), 21, tenant="ab"[n % 2]) for n in range(8)]
    for _ in range(20):
        step(bench, seconds=-100.0)
    bench.serve()
    assert answered(*requests) == 8


def test_on_a_worker_of_its_own_thread_the_short_ones_come_first_too(open_tiny: Open) -> None:
    with local(open_tiny(pages=256)) as kv:
        core, go = kv.core, threading.Event()
        core.worker.post(lambda: go.wait())  # all of them are queued when it goes on
        how = Sampling(max_tokens=1, ignore_eos=True)
        batch = [core.request(text(n, 400), how, time.monotonic(), "batch") for n in range(8)]
        short = [core.request(text(20 + n, 20), how, time.monotonic(), "ann") for n in range(3)]
        for request in (*batch, *short):
            core.submit(request, "")
        go.set()
        for request in (*batch, *short):
            request.stream.result()
        first = [request.timing.first_token or 0.0 for request in (*batch, *short)]
        assert max(first[8:]) < min(first[:8])
        core.worker.set_shares(Shares({"ann": Share(2.0, 0.5)}))
        assert core.worker.call(lambda: core.worker.pool.shares).of("ann") == Share(2.0, 0.5)
        assert core.worker.foresight.planner.weights == {"ann": 2.0}
        assert core.worker.live.turns.counters.weight("ann") == 2.0


@pytest.mark.parametrize("pages", [24])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    story=st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(0, 5), st.integers(1, 200), st.integers(1, 20), st.booleans()),
        min_size=1,
        max_size=12,
    ),
    pauses=st.lists(st.integers(0, 6), min_size=12, max_size=12),
)
def test_whoever_asks_is_answered_and_the_books_of_admission_are_exact(
    open_tiny: Open, pages: int, story: list[tuple[str, int, int, int, bool]], pauses: list[int]
) -> None:
    bench = Bench(open_tiny(pages=pages))
    admission = bench.live.turns.admission
    requests = []
    for (tenant, start, tokens, new, cancelled), pause in zip(story, pauses, strict=False):
        request = bench.ask(text(start, tokens), new, tenant=tenant)
        requests.append((request, cancelled))
        for _ in range(pause):
            step(bench, seconds=1.0)
            assert set(admission._held) == set(bench.live.active)
            for name in "abc":
                mine = [r for r in bench.live.active if r.tenant == name]
                assert admission._running[name] == len(mine)
                assert admission.pinned(name) == len({block for r in mine for block in admission._held[r]})
        request.cancelled = cancelled
    bench.serve()
    for request, cancelled in requests:
        assert cancelled or len(request.stream.tokens) == request.max_new
    assert not admission._pinned
    assert not admission._held
    assert not bench.pool.holders
