"""Files opened, edited and asked about on a tiny machine, replayed."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest

import kvprefetch.sim.navigate as navigate
from kvprefetch.cache.spans import Run
from kvprefetch.errors import InvalidRequest
from kvprefetch.predict.which import Which
from kvprefetch.sim.arrivals import Signals
from kvprefetch.sim.machine import Machine
from kvprefetch.sim.navigate import NavigationReplay
from kvprefetch.sim.prefilling import STEP_S
from kvprefetch.sim.replay import Experiment
from kvprefetch.sim.report import Served
from kvprefetch.sim.trace import Request
from kvprefetch.sim.visits import BLOCK, Opening, Visit

BLOCK_S = 0.01  # to compute a block; to load one: a hundredth
TINY = Machine(
    gpu_tokens=100 * BLOCK, host_tokens=1000 * BLOCK, kv_bytes_per_token=1e9 * BLOCK_S / BLOCK, reload_gbps=100,
    prefill_tflops=1e-3, params=5e8 * BLOCK_S / BLOCK, layers=0, decode_s=0.0,
)  # fmt: skip
PAST: tuple[Run, ...] = ((10_000, 10),)


def visit(context: str, at: float, path: Sequence[Run], after: Sequence[Run] = (), **other: Any) -> Visit:
    dwell, session, tenant = other.get("dwell", 5.0), other.get("session", "s"), other.get("tenant", "ann")
    path = tuple(path)
    tokens = sum(count for _, count in path) * BLOCK + 1
    request = Request(session, tenant, at, tokens, 1, None, path)
    return Visit(context, "u", "M", at - dwell, request, tuple(after) or path, other.get("is_new", True))


WARM_UP = visit("past", 10.0, PAST)  # so that rates are known


def serve(
    monkeypatch: pytest.MonkeyPatch, policy: str, *visits: Visit, openings: list[Opening] | None = None, **machine: Any
) -> tuple[dict[str, Any], dict[float, Served]]:
    served: dict[float, Served] = {}
    original = navigate._served

    def record(live: Any, known: int) -> Served:
        served[live.request.at] = original(live, known)
        return served[live.request.at]

    monkeypatch.setattr(navigate, "_served", record)
    tiny = dataclasses.replace(TINY, **machine)
    replay = NavigationReplay(visits, Experiment(tiny, signals=Signals(1.0, 1.0)))
    if openings is not None:
        replay.openings = openings
    report = replay.run(policy)
    monkeypatch.setattr(navigate, "_served", original)
    return report, served


@pytest.mark.parametrize("policy", ["kvprefetch", "oracle"])
def test_an_opened_file_is_computed_while_it_is_looked_at(monkeypatch: pytest.MonkeyPatch, policy: str) -> None:
    story = WARM_UP, visit("f", 100.0, [(0, 50)])
    _, ours = serve(monkeypatch, policy, *story)
    _, reactive = serve(monkeypatch, "reactive", *story)
    assert reactive[100.0].ttft_s == pytest.approx(50 * BLOCK_S, rel=0.01)
    assert ours[100.0].ttft_s < BLOCK_S


def test_what_is_half_done_when_the_question_comes_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    report, served = serve(monkeypatch, "kvprefetch", WARM_UP, visit("f", 100.0, [(0, 50)], dwell=0.3))
    assert report["prefetch"]["late_share"] == 1.0
    assert served[100.0].ttft_s == pytest.approx(20 * BLOCK_S, abs=STEP_S + 2 * BLOCK_S)


def test_an_edit_costs_the_tail_only(monkeypatch: pytest.MonkeyPatch) -> None:
    edited = [(0, 30), (500, 20)]
    story = WARM_UP, visit("f", 100.0, [(0, 50)], edited), visit("f", 200.0, edited, is_new=False)
    for policy in ("reactive", "kvprefetch"):
        report, served = serve(monkeypatch, policy, *story)
        second = served[200.0]
        assert second.gpu == 30 * BLOCK if policy == "reactive" else 50 * BLOCK
        assert second.ttft_s == pytest.approx(20 * BLOCK_S if policy == "reactive" else 0, abs=BLOCK_S)
    assert report["prefetch"]["computed_tokens"] <= (50 + 20) * BLOCK


def test_what_others_have_open_is_computed_anew_when_it_is_edited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Which, "predictions", lambda *_: [])
    edited = [(0, 30), (500, 20)]
    _, served = serve(
        monkeypatch,
        "kvprefetch",
        WARM_UP,
        visit("f", 100.0, [(0, 50)], edited, dwell=20.0),
        visit("f", 110.0, edited, session="t", dwell=20.0, is_new=False),
    )
    assert served[110.0].ttft_s < BLOCK_S


def test_a_false_opening_costs_a_live_request_at_most_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    story = WARM_UP, visit("f", 20.0, [(0, 50)]), visit("g", 100.0, [(1000, 40)])
    _, quiet = serve(monkeypatch, "kvprefetch", *story, openings=[])
    for late in (0.005, 0.05, 0.2):
        false = [Opening(100.0 - late, "s", "ann", "u", "h")]
        other = visit("h", 500.0, [(2000, 90)], dwell=480.0)  # known since 20, asked about much later
        _, disturbed = serve(monkeypatch, "kvprefetch", *story, other, openings=false)
        assert disturbed[100.0].ttft_s <= quiet[100.0].ttft_s + STEP_S + 1e-9
        assert disturbed[100.0].ttft_s > 0


def test_oracle_is_at_least_as_good_as_ours_and_ours_as_cold(monkeypatch: pytest.MonkeyPatch) -> None:
    story = [WARM_UP, *(visit(f"f{n % 4}", 50.0 + 15 * n, [(1000 * (n % 4), 40)]) for n in range(20))]
    means = [
        serve(monkeypatch, policy, *story)[0]["ttft_s"]["all"]["mean"]
        for policy in ("oracle", "kvprefetch", "reactive", "cold")
    ]
    assert means == sorted(means)
    assert means[0] < means[2] < means[3]


@pytest.mark.parametrize("policy", navigate.NAMES.split(", "))
def test_every_policy_ends_with_a_full_pool(monkeypatch: pytest.MonkeyPatch, policy: str) -> None:
    story = [
        visit(f"f{n % 9}", 10.0 + 3 * n, [(1000 * (n % 9), 40)], session=f"s{n % 5}", tenant=f"t{n % 3}")
        for n in range(90)
    ]
    report, served = serve(monkeypatch, policy, *story, gpu_tokens=60 * BLOCK, host_tokens=100 * BLOCK)
    assert len(served) == report["requests"] == 90


def test_openings_worth_the_same_do_not_keep_the_planner_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = visit("busy", 94.9, [(9000, 30)], session="b", dwell=0.0)
    both = [visit(f"f{n}", 100.0 + n, [(1000 * n, 30)], session=f"s{n}", dwell=5.0 + n) for n in range(2)]
    openings = [Opening(v.opened, v.request.session, "ann", "u", v.context) for v in both]
    _, served = serve(monkeypatch, "kvprefetch", WARM_UP, busy, *both, openings=openings)
    assert max(served[100.0].ttft_s, served[101.0].ttft_s) < BLOCK_S


def test_what_another_tenant_displaced_is_brought_back_as_far_as_the_own_share_goes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of 20 displaced blocks, with no host, the 10 that the tenant's past gives way to are there for the question."""
    _, served = serve(
        monkeypatch,
        "kvprefetch",
        WARM_UP,
        visit("f", 100.0, [(0, 50)], dwell=20.0),
        visit("g", 90.0, [(5000, 60)], tenant="bob", session="t", dwell=0.01),
        host_tokens=0,
    )
    assert served[100.0].ttft_s == pytest.approx(10 * BLOCK_S, abs=2 * BLOCK_S)


def test_the_same_seed_gives_the_same_report(monkeypatch: pytest.MonkeyPatch) -> None:
    story = [WARM_UP, *(visit(f"f{n % 4}", 50.0 + 15 * n, [(1000 * (n % 4), 40)]) for n in range(20))]
    first, second = (serve(monkeypatch, "kvprefetch", *story)[0] for _ in range(2))
    for report in (first, second):
        report.pop("wall_s")
    assert first == second
    assert first["prefetch"]["computed_useful_tokens"] <= first["prefetch"]["computed_tokens"]


@pytest.mark.parametrize("policy", ["popularity", "kvprefetch", "kvprefetch-inferred"])
def test_what_decides_never_sees_the_future(monkeypatch: pytest.MonkeyPatch, policy: str) -> None:
    """Whatever comes after 300, everything before it happens as it did."""
    start = [WARM_UP, *(visit(f"f{n % 4}", 50.0 + 15 * n, [(1000 * (n % 4), 40)]) for n in range(16))]
    kind = visit("f1", 400.0, [(1000, 40)], dwell=50.0, is_new=False)
    other = visit("g", 400.0, [(7000, 60)], dwell=50.0)
    _, one = serve(monkeypatch, policy, *start, kind)
    _, another = serve(monkeypatch, policy, *start, other)
    assert {at: s.ttft_s for at, s in one.items() if at < 300} == {
        at: s.ttft_s for at, s in another.items() if at < 300
    }


def test_unknown_policies_are_refused() -> None:
    with pytest.raises(InvalidRequest):
        NavigationReplay([WARM_UP], Experiment(TINY)).run("belady")
