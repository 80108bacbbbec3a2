import random

import pytest

from kvprefetch.service.placement import Placement

A, B, C = b"a" * 16, b"b" * 16, b"c" * 16


def test_without_workers_there_is_no_place() -> None:
    assert Placement().likely("ann", "s", [], 0.0) is None


def test_the_only_worker_is_certain() -> None:
    likely = Placement().likely("ann", "s", [A], 0.0)
    assert likely is not None
    assert (likely.worker, likely.probability) == (A, 1.0)


def test_an_unknown_session_may_come_anywhere() -> None:
    placement = Placement()
    assert placement.probabilities("ann", "new", [A, B], 0.0) == {A: 0.5, B: 0.5}


def test_an_unknown_session_rather_comes_where_the_traffic_goes() -> None:
    placement = Placement()
    for at in range(8):
        placement.served("ann", f"s{at}", A, float(at))
    chances = placement.probabilities("ann", "new", [A, B], 8.0)
    assert chances[A] == pytest.approx(0.9, abs=0.01)
    later = placement.probabilities("ann", "new", [A, B], 3_600.0)
    assert later[A] == pytest.approx(0.5, abs=0.01)


def test_a_session_is_expected_where_it_went() -> None:
    placement = Placement()
    placement.served("ann", "s", B, 0.0)
    likely = placement.likely("ann", "s", [A, B], 1.0)
    assert likely is not None
    assert likely.worker == B
    assert likely.probability > 0.75


def test_what_a_session_did_last_weighs_most() -> None:
    placement = Placement()
    for at, worker in enumerate((A, A, A, B, B)):
        placement.served("ann", "s", worker, float(at))
    likely = placement.likely("ann", "s", [A, B], 5.0)
    assert likely is not None
    assert likely.worker == B


def test_another_tenants_session_of_the_same_name_teaches_nothing() -> None:
    placement = Placement()
    placement.served("ann", "s", A, 0.0)
    bob = placement.probabilities("bob", "s", [A, B], 0.0)
    assert bob == placement.probabilities("bob", "other", [A, B], 0.0)


def test_a_worker_that_is_not_there_is_not_expected() -> None:
    placement = Placement()
    placement.served("ann", "s", A, 0.0)
    likely = placement.likely("ann", "s", [B, C], 0.0)
    assert likely is not None
    assert likely.worker in (B, C)
    assert likely.probability == pytest.approx(0.5)


def test_what_was_learnt_of_a_worker_goes_when_it_left() -> None:
    placement = Placement()
    placement.served("ann", "s", A, 0.0)
    placement.left(A)
    assert len(placement) == 0
    assert placement.probabilities("ann", "s", [A, B], 0.0) == {A: 0.5, B: 0.5}


@pytest.mark.parametrize(("sticky", "bounds"), [(True, (0.9, 1.0)), (False, (0.4, 0.6))])
def test_confidence_is_what_came_true(sticky: bool, bounds: tuple[float, float]) -> None:
    """Under random routing no session is thought to stick, however often it was seen."""
    dice = random.Random(7)
    placement = Placement()
    now, said = 0.0, []
    for at in range(600):
        session = f"s{at % 20}"
        now += 1.0
        if at > 400:
            likely = placement.likely("ann", session, [A, B], now)
            assert likely is not None
            said.append(likely.probability)
        home = A if hash(int(session[1:]) % 2) else B
        placement.served("ann", session, home if sticky else dice.choice((A, B)), now)
    mean = sum(said) / len(said)
    assert bounds[0] <= mean <= bounds[1]


def test_probabilities_sum_to_one() -> None:
    placement = Placement()
    for at, worker in enumerate((A, B, C, A)):
        placement.served("ann", "s", worker, float(at))
    assert sum(placement.probabilities("ann", "s", [A, B, C], 9.0).values()) == pytest.approx(1.0)


def test_the_memory_is_bounded() -> None:
    placement = Placement(sessions=3)
    for at in range(10):
        placement.served("ann", f"s{at}", A, float(at))
    assert len(placement) == 3
    for at in range(30):
        placement.served("ann", "s9", bytes([at]) * 16, float(at))
    (visits,) = [v for name, v in placement._seen.items() if name == ("ann", "s9")]
    assert len(visits) <= 8


def test_a_session_that_ended_is_forgotten() -> None:
    placement = Placement()
    placement.served("ann", "s", A, 0.0)
    placement.ended("ann", "s")
    assert len(placement) == 0
