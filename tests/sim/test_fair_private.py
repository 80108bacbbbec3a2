"""Private pools: what each tenant would have had for itself alone."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvprefetch.cache.shares import Share, Shares
from kvprefetch.sim.baselines import Reactive
from kvprefetch.sim.fair import FairWorker
from kvprefetch.sim.machine import Machine
from kvprefetch.sim.private import private_hits
from kvprefetch.sim.together import Together, worst_window
from kvprefetch.sim.trace import Request, Trace
from kvprefetch.sim.worker import Live

SMALL = Machine(
    gpu_tokens=24, host_tokens=48, block_tokens=1, kv_bytes_per_token=1e9, reload_gbps=100, prefill_tflops=1e-1,
    params=5e8, layers=0, slice_s=0.05,
)  # fmt: skip
"""One token: 0.01 s of prefill or of loading."""


def served(session: str, comes: float, first: int, count: int, speaks: float = 0.1, runs: float = 0.2) -> Live:
    """A request that was let in at once."""
    request = Request(session, "ann", comes, count + 1, 0, None, ((first, count),))
    return Live(request, count, admitted_at=comes, ttft_s=speaks, ends_at=comes + runs)


def found(*lives: Live, capacity: int = 10) -> list[int]:
    hits = private_hits(lives, lambda tenant: capacity)
    return [hits[live] for live in lives]


def test_one_after_the_other_it_is_a_plain_lru() -> None:
    a, b = 100, 200
    story = [(a, 4), (b, 4), (a, 4), (b, 6), (a, 4), (b, 6), (300, 5), (a, 4), (b, 6)]
    lives = [served("s", n, first, count) for n, (first, count) in enumerate(story)]
    assert found(*lives) == [0, 0, 4, 4, 4, 6, 0, 0, 1]


def test_each_tenant_has_its_own() -> None:
    ann, bob = served("a", 0, 100, 8), served("b", 1, 200, 8)
    bob.request = replace(bob.request, tenant="bob")
    assert found(ann, bob, served("a", 2, 100, 8)) == [0, 0, 8]


def test_of_a_long_prompt_the_beginning_is_kept() -> None:
    assert found(served("a", 0, 100, 15), served("a", 1, 100, 15)) == [0, 10]


def test_before_the_first_token_nobody_finds_it() -> None:
    assert found(served("a", 0, 100, 5, speaks=3, runs=4), served("a", 1, 100, 5), served("a", 4.5, 100, 5)) == [
        0,
        0,
        5,
    ]


def test_what_runs_is_there_before_anything_else() -> None:
    """While it does, others of its tenant displace each other; and when it has ended it was used last."""
    long = served("a", 0, 100, 8, runs=10)
    beside = [served("b", 2, 200, 5), served("b", 4, 200, 5)]
    assert found(long, *beside, served("a", 10.5, 100, 8)) == [0, 0, 2, 8]


def test_what_is_promised_leaves_no_room() -> None:
    assert found(served("a", 0, 100, 6), served("b", 1, 200, 8, speaks=2, runs=3), served("a", 2, 100, 6)) == [0, 0, 2]


REQUESTS = st.lists(
    st.tuples(
        st.sampled_from(["ann", "bob", "cat"]),
        st.integers(0, 2),  # the session
        st.integers(1, 14),  # blocks
        st.floats(0.0, 0.4),  # seconds after the one before
        st.floats(0.0, 1.0),  # seconds that it runs
    ),
    min_size=1,
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(REQUESTS, st.lists(st.integers(0, 8), min_size=3, max_size=3))
def test_whoever_shares_fairly_finds_all_that_its_guarantee_would_hold(
    story: list[tuple[str, int, int, float, float]], guaranteed: list[int]
) -> None:
    names, at, sessions = ["ann", "bob", "cat"], 0.0, dict[str, list[Request]]()
    for tenant, number, blocks, gap, runs in story:
        at += gap + 1e-3
        first = 1000 * (3 * names.index(tenant) + number)
        request = Request(f"{tenant}-{number}", tenant, at, blocks + 1, 0, runs, ((first, blocks),))
        sessions.setdefault(request.session, []).append(request)
    shares = Shares({name: Share(guarantee=count / 24) for name, count in zip(names, guaranteed, strict=True)})
    together = Together(Trace(1, tuple(map(tuple, sessions.values())), is_placed=True), SMALL)
    served = together.serve(lambda machine, clock, record: FairWorker(machine, clock, Reactive(), record, shares))
    assert worst_window(served, lambda tenant: shares.guaranteed(tenant, 24)).points >= 0


def test_a_window_without_anything_to_find_is_none() -> None:
    assert worst_window([], lambda tenant: 5).windows == 0
    assert worst_window([], lambda tenant: 5).points == pytest.approx(float("inf"))
