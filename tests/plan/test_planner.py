"""The planner: the best by value per second of work, within its budget, asked again after every event."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvprefetch.plan.budget import Budget
from kvprefetch.plan.planner import Action, Candidate, Job, Planner
from kvprefetch.plan.value import Load
from kvprefetch.predict.outlook import Outlook


def outlook(probability: float, hold_s: float = 100.0) -> Outlook:
    return Outlook(probability, 0.0, hold_s, hold_s, probability / hold_s)


def job(probability: float = 0.9, tokens: int = 1_000, work_s: float = 1.0, enough: bool = True) -> Job:
    return Job(Action.LOAD, tokens, work_s, work_s, 1.0, outlook(probability), enough)


class World:
    """What each candidate would mean now; changed at will."""

    def __init__(self, **budget: float) -> None:
        self.jobs: dict[str, Job] = {}
        self.asked: list[str] = []
        self.planner = Planner(self.assess, Budget(**budget))

    def assess(self, candidate: Candidate, now: float) -> Job:
        self.asked.append(candidate.session)
        return self.jobs[candidate.session]

    def offer(self, session: str, job: Job, now: float = 0.0, kind: str = "signal") -> None:
        self.jobs[session] = job
        self.planner.offer(session, "ann", kind, now)

    def best(self, now: float = 0.0) -> str | None:
        decision = self.planner.next(now)
        return decision.candidate.session if decision else None


def test_what_is_worth_most_per_second_of_work_goes_first() -> None:
    world = World()
    world.offer("likely and long", Job(Action.LOAD, 1_000, 4.0, 2.0, 1.0, outlook(0.9)))
    world.offer("likely and short", Job(Action.LOAD, 1_000, 1.0, 2.0, 1.0, outlook(0.8)))
    world.offer("unlikely", job(0.3))
    assert world.best() == "likely and short"
    world.planner.withdraw("likely and short")
    assert world.best() == "likely and long"


def test_the_answer_stays_until_something_happens() -> None:
    world = World()
    for name in "abc":
        world.offer(name, job())
    assert {world.best() for _ in range(9)} == {"c"}, "of equals, the one offered last"


def test_equals_go_by_the_order_they_were_given() -> None:
    world = World()
    for name, order in (("first", 7), ("second", 3)):
        world.jobs[name] = job()
        world.planner.offer(name, "ann", "hint", 0.0, order=order)
    assert world.best() == "first"


def test_a_better_one_that_comes_meanwhile_goes_ahead() -> None:
    world = World()
    world.offer("good", job(0.6))
    assert world.best() == "good"
    world.offer("better", job(0.9))
    assert world.best() == "better"


def test_what_became_worthless_sleeps_and_is_looked_at_again() -> None:
    world = World()
    world.offer("a", job(0.9))
    assert world.best() == "a"
    world.jobs["a"] = job(0.0)
    assert world.best(1.0) is None
    world.jobs["a"] = job(0.9)
    assert world.best(2.0) is None, "it sleeps a quarter of its hold"
    assert world.planner.wakes_at == pytest.approx(26.0)
    assert world.best(26.0) == "a"


def test_what_is_there_already_is_no_candidate_any_more() -> None:
    world = World()
    world.offer("a", Job(Action.NOTHING, 0, 0.0, 0.0, 1.0, outlook(0.9)))
    assert world.best() is None
    assert not world.planner.knows("a")


def test_a_kind_that_only_wastes_is_not_believed_for_ever() -> None:
    world = World(start=10_000.0, cap=10_000.0, trickle=0.0, per_useful=1.4)
    for number in range(40):
        world.offer(f"s{number}", job(0.95))
        decision = world.planner.next(0.0)
        if decision is None:
            break
        world.planner.budget.spend((decision.candidate.kind, "ann"), decision.job.tokens)
        world.planner.withdraw(decision.candidate.session)
    else:
        pytest.fail("it was believed forty times")
    world.offer("another kind", job(0.95), kind="hint")
    assert world.best() == "another kind"


def test_a_learnt_rule_without_outcomes_does_not_act() -> None:
    world = World()
    world.offer("a", job(0.99, enough=False))
    assert world.best() is None


def test_live_load_makes_the_doubtful_worthless() -> None:
    world = World()
    world.offer("a", job(0.01))
    world.planner.load = Load(arrivals=10.0, step_s=0.1)
    assert world.best() is None
    world.planner.load = Load()
    assert world.best(100.0) == "a"


def test_a_price_of_memory_is_paid_for_the_time_it_is_held() -> None:
    world = World()
    world.planner.load = Load(price=0.1)  # per second; held for 100 s
    world.offer("a", job(0.9))
    assert world.best() is None
    world.planner.load = Load(price=0.001)
    assert world.best(100.0) == "a"


def test_a_tenant_of_more_weight_goes_first() -> None:
    world = World()
    world.planner.weights = {"bob": 2.0}
    world.offer("ann's", job(0.9))
    world.jobs["bob's"] = job(0.6)
    world.planner.offer("bob's", "bob", "signal", 0.0)
    assert world.best() == "bob's"


def test_a_decision_says_why() -> None:
    world = World()
    world.offer("a", job(0.9))
    decision = world.planner.next(0.0)
    assert decision is not None
    assert decision.because.startswith("signal: load 1000 tokens, V=0.9s: p=0.90 kept=1.00 ready=1.00")
    assert world.planner.because("a")


def test_a_million_candidates_are_bounded_and_the_one_offered_longest_ago_is_dropped() -> None:
    world = World()
    world.planner.max_candidates = 3
    for number in range(10):
        world.offer(f"s{number}", job())
    assert [world.planner.knows(f"s{n}") for n in range(10)] == [False] * 7 + [True] * 3
    assert world.best() == "s9"


def test_only_what_changed_is_looked_at() -> None:
    world = World()
    for number in range(1_000):
        world.offer(f"s{number}", job(0.5 + number / 4_000))
    while len(world.asked) < 1_000:
        before = len(world.asked)
        world.best()
        assert len(world.asked) - before <= 256 + 64, "one call looks at a bounded number"
    world.asked.clear()
    for _ in range(10):
        world.planner.withdraw(str(world.best()))
    assert len(world.asked) <= 30


def test_when_all_values_fall_at_once_one_call_still_looks_at_few() -> None:
    world = World()
    for number in range(200):
        world.offer(f"s{number}", job(0.5 + number / 1_000))
    world.best()
    world.jobs = {name: job(old.outlook.within / 2) for name, old in world.jobs.items()}
    world.asked.clear()
    assert world.best() is not None
    assert len(world.asked) <= 64


def test_those_that_are_gone_leave_nothing_behind() -> None:
    world = World()
    for number in range(2_000):
        world.offer("x", job(0.0 if number % 2 else 0.9))
        world.best(float(number))
        world.planner.withdraw("x")
    lines = world.planner._awake.values()
    assert len(world.planner._asleep) + sum(len(line.entries) for line in lines) <= 140
    assert len(world.planner._tenants) <= 66


def test_a_doze_ends_in_time_even_where_holds_are_long() -> None:
    world = World()
    world.planner.longest_doze_s = 10.0
    world.offer("a", Job(Action.LOAD, 100, 1.0, 1.0, 1.0, outlook(0.0, hold_s=3_600.0)))
    assert world.best() is None
    assert world.planner.wakes_at == pytest.approx(10.0)
    assert world.planner.sleeper("ann") == "a"
    assert world.planner.sleeper("bob") is None


@given(
    st.lists(
        st.tuples(
            st.sampled_from("abcdef"),
            st.floats() | st.floats(0, 1),
            st.integers(-5, 5_000),
            st.floats(0, 100),
            st.floats(allow_nan=False, allow_infinity=False, min_value=-10, max_value=1e6),
        ),
        max_size=40,
    )
)
def test_whatever_happens_it_ends_and_proposes_nothing_worthless(
    story: list[tuple[str, float, int, float, float]],
) -> None:
    world = World()
    for session, probability, tokens, work_s, now in story:
        world.offer(session, Job(Action.LOAD, tokens, work_s, work_s, 1.0, outlook(probability)), now)
        decision = world.planner.next(now)
        if decision is not None:
            assert decision.value.total > 0
            assert decision.job.tokens > 0
