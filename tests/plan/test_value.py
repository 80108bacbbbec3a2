"""What a preload is worth, term by term."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvprefetch.plan.value import Load, Value, value_of
from kvprefetch.predict.outlook import Outlook

LIKELY = Outlook(within=0.8, before_ready=0.0, residency=10.0, hold_s=30.0, index=0.08)


def worth(
    outlook: Outlook = LIKELY,
    saved: float = 2.0,
    work: float = 0.5,
    kept: float = 1.0,
    weight: float = 1.0,
    **load: float,
) -> Value:
    """Of two seconds saved by half a second of work, on an idle machine with room."""
    return value_of(outlook, saved, work, kept, weight, Load(**load))


def test_on_an_idle_machine_it_is_worth_what_it_probably_saves() -> None:
    assert worth().total == worth().saves == pytest.approx(0.8 * 2.0)
    assert worth(kept=0.5).saves == pytest.approx(0.8 * 2.0 / 2)
    assert worth(weight=3.0).saves == pytest.approx(0.8 * 2.0 * 3)
    assert worth().hold_s == 30.0


def test_what_is_half_ready_is_worth_half() -> None:
    """Of what comes before it is ready, a half is there on average."""
    soon = Outlook(within=0.8, before_ready=0.8, residency=0.2, hold_s=30.0, index=1.0)
    assert worth(soon).ready == 0.5
    assert worth(soon).saves == worth().saves / 2
    some = Outlook(within=0.8, before_ready=0.4, residency=0.2, hold_s=30.0, index=1.0)
    assert worth(some).ready == 0.75


def test_live_requests_that_wait_for_a_step_are_counted() -> None:
    """While 0.5 s of work go on, four requests a second arrive; each waits for half a step."""
    value = worth(arrivals=4.0, step_s=0.02)
    assert value.delays == pytest.approx(4.0 * 0.5 * 0.02 / 2)
    assert value.total == pytest.approx(value.saves - value.delays)


def test_memory_has_the_price_of_what_it_is_worth_to_others() -> None:
    value = worth(price=0.01)
    assert value.occupies == pytest.approx(0.01 * 2.0 * 10.0)
    assert value.total == pytest.approx(value.saves - value.occupies)


def test_at_its_own_index_as_the_price_it_is_worth_nothing() -> None:
    """The marginal block: what displaces it must be worth more (DESIGN §7.3)."""
    assert worth(price=LIKELY.within / LIKELY.residency).total == pytest.approx(0.0)


def test_what_will_not_be_used_is_worth_less_than_nothing() -> None:
    never = Outlook(within=0.0, before_ready=0.0, residency=30.0, hold_s=30.0, index=0.0)
    assert worth(never).saves == 0.0
    assert worth(never).total == 0.0
    assert worth(never, price=0.01).total < 0
    assert worth(never, arrivals=1.0).total < 0


def test_the_terms_are_named() -> None:
    because = worth(price=0.01, arrivals=4.0).because
    for term in ("V=", "p=0.80", "kept=1.00", "ready=1.00", "saves=1.6s", "delays=", "occupies=0.2s", "hold=30s"):
        assert term in because


SHARES = st.floats(0, 1)
SECONDS = st.floats(0, 1e4)


@given(SHARES, SHARES, SECONDS, SECONDS, SECONDS, st.floats(0, 10), st.floats(0, 10))
def test_it_falls_with_arrivals_price_and_what_comes_before_it_is_ready(
    within: float, share: float, residency: float, saved: float, work: float, less: float, more: float
) -> None:
    less, more = sorted((less, more))
    late = Outlook(within, within * share, residency, 60.0, 0.1)
    early = Outlook(within, within * share / 2, residency, 60.0, 0.1)
    assert worth(late, saved, work).total <= worth(early, saved, work).total
    assert worth(late, saved, work, arrivals=more).total <= worth(late, saved, work, arrivals=less).total
    assert worth(late, saved, work, price=more).total <= worth(late, saved, work, price=less).total
    assert worth(late, saved, work).total <= within * saved
    assert 0.5 <= worth(late, saved, work).ready <= 1 or within == 0
