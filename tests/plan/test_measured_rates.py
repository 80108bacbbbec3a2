"""How fast this machine is, learnt from its work."""

from math import inf, isfinite, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvprefetch.plan.rates import Line, Rates

CHUNK = 2048
NOISE = (1.1, 0.9, 1.05, 0.95, 1.0, 0.92, 1.08)  # factors


def prefill(start: int, end: int, linear: float, squared: float) -> float:
    """Seconds: so many per token, and per token that a token attends to."""
    return linear * (end - start) + squared * (end * end - start * start)


def measured(linear: float, squared: float, noise: tuple[float, ...] = (1.0,)) -> Rates:
    """Long prompts, chunk after chunk."""
    rates, times = Rates(), 0
    for tokens in (8, 32, 64, 16):
        for chunk in range(tokens):
            start, end = chunk * CHUNK, (chunk + 1) * CHUNK
            rates.computed(start, end, prefill(start, end, linear, squared) * noise[times % len(noise)])
            times += 1
    return rates


def test_nothing_is_known_before_anything_was_measured() -> None:
    rates = Rates()
    assert rates.load_s(100) is None
    assert rates.prefill_s(0, 100) is None
    rates.loaded(100, 0.5)
    assert rates.load_s(200) == pytest.approx(1.0)
    assert rates.prefill_s(0, 100) is None


@pytest.mark.parametrize("noise", [(1.0,), NOISE])
@pytest.mark.parametrize(("linear", "squared"), [(1e-4, 0.0), (1e-4, 5e-10), (1e-5, 1e-9), (0.0, 1e-9)])
@pytest.mark.parametrize(("start", "end"), [(0, 4 * CHUNK), (4 * CHUNK, 8 * CHUNK), (0, 100_000), (60_000, 128_000)])
def test_a_linear_and_a_squared_cost_are_learnt(
    linear: float, squared: float, noise: tuple[float, ...], start: int, end: int
) -> None:
    rates = measured(linear, squared, noise)
    cost = prefill(start, end, linear, squared)
    scale = max(cost, prefill(0, CHUNK * 16, linear, squared) if noise is NOISE else 0)  # a short one is the less known
    assert rates.prefill_s(start, end) == pytest.approx(cost, abs=0.05 * scale)


def test_one_kind_of_work_says_what_a_token_costs() -> None:
    rates = Rates()
    for _ in range(10):
        rates.computed(0, 1000, 0.5)
    assert rates.prefill_s(0, 1000) == pytest.approx(0.5)
    assert rates.prefill_s(0, 2000) == pytest.approx(1.0)


def test_what_is_newer_weighs_more() -> None:
    rates = Rates()
    for _ in range(500):
        rates.loaded(1000, 1.0)
    for _ in range(150):
        rates.loaded(1000, 3.0)
    assert rates.load_s(1000) == pytest.approx(3.0, rel=0.05)


def test_the_squared_part_alone_is_learnt_where_the_linear_one_would_be_negative() -> None:
    line = Line()
    for x, y, seconds in ((1.0, 1.0, 0.9), (1.0, 4.0, 4.1), (1.0, 9.0, 9.2)):
        line.learn(x, y, seconds)
    assert line.at(1.0, 16.0) == pytest.approx(16.0, rel=0.05)
    assert line.at(1.0, 0.0) == 0.0


def test_the_linear_part_alone_is_learnt_where_the_squared_one_would_be_negative() -> None:
    line = Line()
    for x, y, seconds in ((1.0, 1.0, 1.1), (2.0, 4.0, 2.0), (3.0, 9.0, 2.9)):
        line.learn(x, y, seconds)
    assert line.at(10.0, 100.0) == pytest.approx(10.0, rel=0.05)


@pytest.mark.parametrize("seconds", [nan, inf, -inf, -1.0, 0.0])
def test_a_time_that_cannot_be_teaches_nothing(seconds: float) -> None:
    rates = Rates()
    rates.loaded(100, seconds)
    rates.computed(0, 100, seconds)
    assert rates.load_s(100) is None
    assert rates.prefill_s(0, 100) is None
    rates.loaded(100, 1.0)
    rates.loaded(100, seconds)
    assert rates.load_s(100) == pytest.approx(1.0)


def test_no_work_teaches_nothing() -> None:
    rates = Rates()
    rates.loaded(0, 1.0)
    rates.computed(50, 50, 1.0)
    rates.computed(50, 40, 1.0)
    assert rates.load_s(100) is None
    assert rates.prefill_s(0, 100) is None


TIMES = st.sampled_from([nan, inf, -1.0, 0.0]) | st.floats(0, 100)
PLACES = st.integers(0, 200_000)


@given(st.lists(st.tuples(PLACES, PLACES, TIMES), max_size=30), PLACES, PLACES)
def test_whatever_was_measured_no_work_takes_less_than_no_time(
    seen: list[tuple[int, int, float]], start: int, end: int
) -> None:
    rates = Rates()
    for one, other, seconds in seen:
        rates.loaded(one, seconds)
        rates.computed(one, other, seconds)
    start, end = sorted((start, end))
    for said in (rates.load_s(end), rates.prefill_s(start, end)):
        assert said is None or (said >= 0 and isfinite(said))
