"""A softmax over candidates whose weights follow what comes true."""

from math import isclose

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvprefetch.predict.mixture import Mixture, Opinions, softmax

NONE: Opinions = [(2, 1.0)]
GATES = (("kind", "read"),)


def shares_after(mixture: Mixture, outcomes: int, right: int) -> list[float]:
    """Two experts name one candidate each; `right` of them is right `outcomes` times."""
    candidates: list[Opinions] = [[(0, 1.0)], [(1, 1.0)], NONE]
    for _ in range(outcomes):
        shares = softmax(candidates, mixture.weights(GATES))
        mixture.learn(candidates, shares, right, GATES)
    return softmax(candidates, mixture.weights(GATES))


@pytest.mark.parametrize("right", [0, 1, 2])
def test_who_is_right_gains_weight(right: int) -> None:
    shares = shares_after(Mixture([0.0, 0.0, 0.0]), 200, right)
    assert shares[right] > 0.8


def test_a_new_circumstance_starts_from_what_is_common() -> None:
    mixture = Mixture([0.0, 0.0, 0.0])
    shares_after(mixture, 100, 1)
    elsewhere = mixture.weights((("kind", "never seen"),))
    assert elsewhere == mixture.common.values
    assert elsewhere[1] > elsewhere[0]


def test_circumstances_do_not_teach_each_other_all() -> None:
    """What is right in one gate and wrong in another ends right in both."""
    mixture = Mixture([0.0, 0.0, 0.0])
    candidates: list[Opinions] = [[(0, 1.0)], [(1, 1.0)], NONE]
    for turn in range(400):
        gates = (("kind", turn % 2),)
        mixture.learn(candidates, softmax(candidates, mixture.weights(gates)), turn % 2, gates)
    for right in (0, 1):
        shares = softmax(candidates, mixture.weights((("kind", right),)))
        assert shares[right] == max(shares)


def test_weights_are_a_copy() -> None:
    mixture = Mixture([1.0])
    mixture.weights(())[0] = 5.0
    assert mixture.common.values == [1.0]


def test_the_gate_longest_unused_is_forgotten() -> None:
    mixture = Mixture([0.0], max_gates=2)
    for gate in ("a", "b", "a", "c"):
        mixture.learn([[(0, 1.0)], []], [0.5, 0.5], 0, (gate,))
    assert list(mixture.gates) == ["a", "c"]


WEIGHTS = st.lists(st.floats(-1e6, 1e6), min_size=3, max_size=3)
CANDIDATES = st.lists(st.lists(st.tuples(st.integers(0, 2), st.floats(-50, 50)), max_size=6), min_size=1, max_size=9)


@given(CANDIDATES, WEIGHTS)
def test_probabilities_sum_to_one(candidates: list[Opinions], weights: list[float]) -> None:
    shares = softmax(candidates, weights)
    assert all(0 <= share <= 1 for share in shares)
    assert isclose(sum(shares), 1.0)


@given(CANDIDATES, WEIGHTS, st.data())
def test_a_lesson_makes_the_outcome_likelier(
    candidates: list[Opinions], weights: list[float], data: st.DataObject
) -> None:
    start = [max(min(weight, 2.0), -2.0) for weight in weights]
    outcome = data.draw(st.integers(0, len(candidates) - 1))
    mild = [[(which, strength / 50) for which, strength in opinions] for opinions in candidates]
    mixture = Mixture(start)
    before = softmax(mild, mixture.weights(()))
    mixture.learn(mild, before, outcome, ())
    assert softmax(mild, mixture.weights(()))[outcome] >= before[outcome] - 1e-9
