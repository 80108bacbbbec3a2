"""What a kind of evidence may waste: its own record widens or closes it."""

from math import inf, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvprefetch.plan.budget import Budget


def small(per_useful: float = 1.5) -> Budget:
    """Starts with 1000 tokens, two more a second."""
    return Budget(per_useful=per_useful, start=1000.0, cap=4000.0, trickle=2.0)


def speculate(budget: Budget, share: float, claimed: float, account: str = "typing", now: float = 0.0) -> int:
    """Move contexts of 100 tokens of which this share is used, for as long as it is allowed; how many were moved."""
    for moved in range(1000):
        if not budget.allows(account, 100, claimed, now):
            return moved
        budget.spend(account, 100)
        budget.earn(account, round(100 * share))
    return 1000


def test_every_account_starts_with_some_credit() -> None:
    assert small().left("typing", 0.0) == 1000.0
    assert small().allows("typing", 100, 0.9, 0.0)


def test_a_kind_that_wastes_is_closed_and_recovers_by_waiting() -> None:
    budget = small()
    assert speculate(budget, share=0.0, claimed=1.0) == 10
    assert budget.left("typing", 0.0) == 0.0
    assert not budget.allows("typing", 100, 1.0, 49.0)
    assert budget.allows("typing", 100, 1.0, 50.0)
    assert budget.left("typing", 1e9) == 1000.0, "no more than it started with"


def test_a_kind_that_pays_for_itself_stays_open() -> None:
    assert speculate(small(per_useful=1.5), share=0.8, claimed=0.8) == 1000
    assert speculate(small(per_useful=1.5), share=0.6, claimed=1.0) < 100, "whatever it claims"


def test_what_pays_for_itself_needs_only_credit_for_the_case_that_it_fails() -> None:
    budget = small(per_useful=1.5)
    budget.spend("typing", 900)
    assert budget.allows("typing", 100, 0.7, 0.0)
    assert not budget.allows("typing", 101, 0.7, 0.0)


def test_what_does_not_pay_for_itself_lives_on_what_is_left_over() -> None:
    budget = Budget(per_useful=1.5, start=1000.0, caution=32.0)
    assert budget.allows("typing", 31, 0.0, 0.0)
    assert not budget.allows("typing", 32, 0.0, 0.0)
    assert budget.allows("typing", 60, 1 / 3, 0.0), "half of it is lost, so twice as much may be moved"
    assert not budget.allows("typing", 64, 1 / 3, 0.0)


def test_what_is_large_is_not_shut_out_for_ever() -> None:
    """Of a context larger than the whole credit a quarter of that suffices."""
    budget = small()
    assert budget.allows("typing", 10_000, 1.0, 0.0)
    budget.spend("typing", 760)
    assert not budget.allows("typing", 10_000, 1.0, 0.0)


def test_a_good_past_does_not_pay_for_a_bad_present() -> None:
    budget = small()
    for _ in range(1000):
        budget.earn("typing", 100)
    assert budget.left("typing", 0.0) == 4000.0
    assert speculate(budget, share=0.0, claimed=1.0) == 40


def test_accounts_are_separate() -> None:
    budget = small()
    speculate(budget, share=0.0, claimed=1.0, account="ann")
    assert budget.left("ann", 0.0) == 0.0
    assert budget.left("bob", 0.0) == 1000.0
    budget.earn("bob", 100)
    assert budget.left("ann", 0.0) == 0.0


def test_a_clock_set_back_gives_nothing() -> None:
    budget = small()
    budget.left("typing", 100.0)
    budget.spend("typing", 1000)
    for now in (50.0, 100.0, 0.0, -inf):
        assert budget.left("typing", now) == 0.0
    assert budget.left("typing", 101.0) == 2.0


@pytest.mark.parametrize("now", [nan, inf])
def test_a_time_that_cannot_be_does_not_stop_the_clock(now: float) -> None:
    budget = small()
    budget.left("typing", now)
    budget.spend("typing", 1000)
    budget.left("typing", 10.0)
    budget.left("typing", now)
    assert budget.left("typing", 20.0) == pytest.approx(20.0)


@pytest.mark.parametrize("share", [nan, -inf, -1.0])
def test_a_share_that_cannot_be_is_taken_for_a_loss(share: float) -> None:
    assert not small().allows("typing", 100, share, 0.0)


STEPS = st.lists(
    st.tuples(st.integers(1, 3000), st.floats(0, 1), st.floats(0, 1) | st.just(1e9), st.floats(0, 100)), max_size=60
)


@given(STEPS, st.floats(0.5, 2))
def test_in_the_long_run_no_more_is_moved_than_per_useful_allows(
    steps: list[tuple[int, float, float, float]], per_useful: float
) -> None:
    """Honest or not: `per_useful` tokens for each that was used, the start, what trickles in, and one job under way."""
    budget, now, moved, used, largest = small(per_useful), 0.0, 0, 0, 0
    for tokens, share, claimed, wait in steps:
        now += wait
        if budget.allows("typing", tokens, claimed, now):
            budget.spend("typing", tokens)
            budget.earn("typing", int(tokens * share))
            moved, used, largest = moved + tokens, used + int(tokens * share), max(largest, tokens)
        under_way = max(largest - budget.start / 4, 0)
        assert moved <= per_useful * used + budget.start + budget.trickle * now + under_way + 1e-6
        assert budget.left("typing", now) <= budget.cap


@given(STEPS)
def test_an_honest_kind_that_pays_for_itself_is_never_closed(steps: list[tuple[int, float, float, float]]) -> None:
    budget, now = small(per_useful=1.5), 0.0
    for tokens, _, _, wait in steps:
        now += wait
        assert budget.allows("typing", tokens, 0.75, now)
        budget.spend("typing", tokens)
        budget.earn("typing", -(-tokens * 3 // 4))
