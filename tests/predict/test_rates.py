"""Shares learnt online, by cell."""

from math import inf, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvprefetch.predict.rates import Shares

ANN, BOB = ("all", "ann"), ("all", "bob")


def test_nothing_learnt_gives_the_start() -> None:
    assert Shares(start=0.9).mean(ANN) == 0.9


def test_a_mean_starts_from_the_general_one_and_soon_speaks_for_itself() -> None:
    shares = Shares(start=0.5, prior=4.0)
    for _ in range(100):
        shares.learn(ANN, 1.0)
    assert shares.mean(BOB) == shares.mean(("all",)) > 0.95
    for _ in range(16):
        shares.learn(BOB, 0.0)
    assert shares.mean(BOB) < 0.25
    assert shares.mean(ANN) > 0.9


def test_the_prior_weighs_as_so_many_outcomes() -> None:
    shares = Shares(start=0.5, prior=4.0)
    shares.learn(("all",), 1.0, weight=4.0)
    assert shares.mean(("all",)) == 0.75
    assert shares.outcomes("all") == 4.0
    assert shares.outcomes("nothing") == 0.0


def test_what_is_newer_weighs_more() -> None:
    shares = Shares(start=0.5)
    for _ in range(5000):
        shares.learn(("all",), 0.0)
    for _ in range(1000):
        shares.learn(("all",), 1.0)
    assert shares.mean(("all",)) > 0.7
    assert shares.outcomes("all") <= 500


def test_a_full_table_goes_on_learning_in_the_cells_it_has() -> None:
    shares = Shares(start=0.5, max_cells=2)
    shares.learn(("all", "idle"), 1.0)
    shares.learn(("all", "step", "idle"), 1.0)
    assert set(shares.cells) == {"all", "idle"}
    assert (shares.outcomes("all"), shares.outcomes("idle")) == (2.0, 2.0)


@pytest.mark.parametrize(("share", "weight"), [(nan, 1.0), (inf, 1.0), (1.0, nan), (1.0, inf)])
def test_what_is_no_number_teaches_nothing(share: float, weight: float) -> None:
    shares = Shares(start=0.5)
    shares.learn(ANN, share, weight)
    assert not shares.cells


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 1), st.floats(0, 600)), max_size=30), st.floats(0, 1))
def test_means_stay_among_what_was_learnt(events: list[tuple[str, float, float]], start: float) -> None:
    shares = Shares(start, max_cells=3)
    for name, share, weight in events:
        shares.learn(("all", name), share, weight)
    known = [start, *(share for _, share, _ in events)]
    for name in "abcd":
        assert min(known) - 1e-9 <= shares.mean(("all", name)) <= max(known) + 1e-9
    assert len(shares.cells) <= 3
