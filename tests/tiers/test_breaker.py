from kvprefetch.tiers.breaker import Breaker


def test_a_dead_place_costs_its_timeout_once() -> None:
    breaker = Breaker(first_s=1.0)
    assert breaker.allows(0.0)
    breaker.failed(0.0)
    assert not breaker.allows(0.5)
    assert breaker.is_open


def test_after_a_while_one_caller_tries_alone() -> None:
    breaker = Breaker(first_s=1.0)
    breaker.failed(0.0)
    assert breaker.allows(1.0)
    assert not breaker.allows(1.0)


def test_failures_of_those_who_tried_double_the_wait_up_to_a_limit() -> None:
    breaker = Breaker(first_s=1.0, longest_s=3.0)
    breaker.failed(0.0)
    assert breaker.allows(1.0)
    breaker.failed(1.0)
    assert not breaker.allows(2.9)
    assert breaker.allows(3.0)
    breaker.failed(3.0)
    assert not breaker.allows(5.9)
    assert breaker.allows(6.0)


def test_many_who_fail_at_once_count_as_one() -> None:
    breaker = Breaker(first_s=1.0)
    for _ in range(10):
        breaker.failed(0.0)
    assert breaker.allows(1.0)


def test_an_answer_closes_it() -> None:
    breaker = Breaker(first_s=1.0)
    breaker.failed(0.0)
    assert breaker.allows(1.0)
    breaker.succeeded()
    assert not breaker.is_open
    assert breaker.allows(1.0)
    assert breaker.allows(1.0)
