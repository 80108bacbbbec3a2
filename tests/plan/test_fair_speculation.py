"""Idle time is shared by weight among the tenants that want it; whoever claims falsely gains nothing by it."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvprefetch.plan.budget import Budget
from kvprefetch.plan.meter import SpeculationMeters
from kvprefetch.plan.planner import Action, Candidate, Job, Planner
from kvprefetch.predict.outlook import Outlook

CHUNK_S, JOB_S, TOKENS_PER_S = 0.1, 1.0, 1_000


class IdleTime:
    """One engine with nothing else to do; each hint is a job of a second, worked off in chunks."""

    def __init__(self, **weights: float) -> None:
        self.left: dict[str, float] = {}
        self.planner = Planner(self.assess, Budget(start=50_000.0, trickle=0.0), weights=weights)
        self.claims: dict[str, float] = {}
        self.had: Counter[str] = Counter()
        self.done: Counter[str] = Counter()
        self.hints: Counter[str] = Counter()
        self.now = 0.0

    def assess(self, candidate: Candidate, now: float) -> Job:
        left, claim = self.left[candidate.session], self.claims[candidate.tenant]
        outlook = Outlook(claim, 0.0, 100.0, 100.0, claim / 100)
        return Job(Action.PREFILL, round(left * TOKENS_PER_S), left, left, 1.0, outlook)

    def hint(self, tenant: str, claim: float = 0.9) -> None:
        self.hints[tenant] += 1
        name = f"{tenant} {self.hints[tenant]}"
        self.left[name], self.claims[tenant] = JOB_S, claim
        self.planner.offer(name, tenant, "hint", self.now)

    def work(self, chunks: int, honest: set[str]) -> None:
        """Of those who are honest all is used."""
        for _ in range(chunks):
            self.now += CHUNK_S
            decision = self.planner.next(self.now)
            if decision is None:
                continue
            candidate, tokens = decision.candidate, round(CHUNK_S * TOKENS_PER_S)
            account = candidate.kind, candidate.tenant
            self.planner.budget.spend(account, tokens)
            self.planner.charge(candidate.tenant, CHUNK_S)
            self.had[candidate.tenant] += CHUNK_S
            self.left[candidate.session] -= CHUNK_S
            if self.left[candidate.session] < CHUNK_S / 2:
                self.planner.withdraw(candidate.session)
                self.done[candidate.tenant] += 1
                if candidate.tenant in honest:
                    self.planner.budget.earn(account, round(JOB_S * TOKENS_PER_S))


def beside(neighbour: str, times: int, claim: float, seconds: int = 200) -> IdleTime:
    """An honest tenant that hints once a second, and another one that hints `times` as often."""
    idle = IdleTime()
    for _ in range(seconds):
        idle.hint("honest")
        for _ in range(times):
            idle.hint(neighbour, claim)
        idle.work(10, {"honest", "equal"})
    return idle


def test_ten_times_the_hints_all_false_gain_nothing_and_cost_nothing() -> None:
    equal, liar = beside("equal", 1, 0.9), beside("liar", 10, 1.0)
    false_hint_gain = liar.had["liar"] / equal.had["equal"]
    assert false_hint_gain <= 1
    assert liar.done["honest"] >= equal.done["honest"] - 1
    assert abs(equal.had["honest"] - equal.had["equal"]) <= CHUNK_S + 1e-6


def test_even_while_it_is_believed_a_liar_has_no_more_than_its_part() -> None:
    idle = IdleTime()
    for _ in range(40):
        idle.hint("honest", 0.5)
        for _ in range(10):
            idle.hint("liar", 1.0)
        idle.work(10, {"honest"})
    assert idle.had["liar"] == pytest.approx(20.0, abs=CHUNK_S)
    assert idle.had["honest"] == pytest.approx(20.0, abs=CHUNK_S)


def test_what_one_does_not_want_the_other_may_have() -> None:
    idle = IdleTime()
    for second in range(60):
        idle.hint("ann")
        if second < 10:
            idle.hint("bob")
        idle.work(10, {"ann", "bob"})
    assert idle.had["bob"] == pytest.approx(10.0, abs=CHUNK_S)
    assert idle.had["ann"] == pytest.approx(50.0, abs=CHUNK_S)


def test_who_was_silent_has_no_credit_for_it() -> None:
    idle = IdleTime()
    for _ in range(100):
        idle.hint("ann")
        idle.work(10, {"ann"})
    for _ in range(60):
        idle.hint("ann")
        idle.hint("bob")
    idle.work(100, {"ann", "bob"})
    assert idle.had["bob"] == pytest.approx(5.0, abs=CHUNK_S)


def test_within_a_tenant_the_best_value_goes_first_and_between_equals_too() -> None:
    idle = IdleTime()
    idle.hint("ann", 0.5)
    idle.hint("bob", 0.9)
    decision = idle.planner.next(0.0)
    assert decision is not None
    assert decision.candidate.tenant == "bob", "nobody has had anything yet"


@settings(max_examples=40, deadline=None)
@given(
    weights=st.lists(st.floats(0.25, 4.0), min_size=2, max_size=5),
    claims=st.lists(st.floats(0.2, 1.0), min_size=5, max_size=5),
    often=st.lists(st.integers(1, 10), min_size=5, max_size=5),
)
def test_idle_time_goes_by_weight_whatever_is_claimed(
    weights: list[float], claims: list[float], often: list[int]
) -> None:
    names = [f"t{number}" for number in range(len(weights))]
    idle = IdleTime(**dict(zip(names, weights, strict=True)))
    for name, claim, times in zip(names, claims, often, strict=False):
        for _ in range(20 * times):
            idle.hint(name, claim)
    idle.work(100, set(names))
    shares = [idle.had[name] / weight for name, weight in zip(names, weights, strict=True)]
    assert max(shares) - min(shares) <= CHUNK_S / min(weights) + 1e-6


def test_a_call_looks_at_few_however_many_tenants_there_are() -> None:
    idle = IdleTime()
    looked = 0

    def assess(candidate: Candidate, now: float) -> Job:
        nonlocal looked
        looked += 1
        return IdleTime.assess(idle, candidate, now)

    for number in range(2_000):
        idle.hint(f"t{number}")
    for _ in range(10):
        idle.work(1, set())
    idle.planner.assess = assess
    for _ in range(100):
        looked = 0
        idle.work(1, set())
        assert looked <= 64 + 256
    assert max(idle.had.values()) == pytest.approx(CHUNK_S)
    for number in range(2_000):
        idle.planner.withdraw(f"t{number} 1")
    idle.work(100, set())
    idle.planner.offer("x", "x", "hint", idle.now)
    assert (len(idle.planner._awake), idle.planner._entries) == (0, 0)


def test_meters_tell_what_each_tenant_has_had() -> None:
    meters = SpeculationMeters(page_bytes=100)
    meters.computed("ann", 0.5)
    meters.moved("ann", 3, 0.25)
    meters.resident({"ann": 2, "bob": 0}, 10.0)
    meters.resident({"ann": 2, "bob": 1}, 15.0)
    meters.resident({"ann": 9}, 12.0)  # the clock went back
    meters.resident({}, 13.0)
    assert meters.stats() == {
        "ann": {"prefill_s": 0.5, "load_s": 0.25, "bytes_moved": 300, "byte_seconds": 1_000.0},
        "bob": {"prefill_s": 0.0, "load_s": 0.0, "bytes_moved": 0, "byte_seconds": 500.0},
    }


def test_of_too_many_tenants_the_sum_is_kept() -> None:
    meters = SpeculationMeters(max_tenants=10)
    for number in range(1_000):
        meters.computed(f"t{number}", 1.0)
        assert len(meters.by_tenant) <= 11
    assert sum(meter["prefill_s"] for meter in meters.stats().values()) == pytest.approx(1_000.0)
