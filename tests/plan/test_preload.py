import pytest

from kvprefetch.plan.ledger import Ledger
from kvprefetch.plan.preload import Candidate, choose, expires_at


def candidate(ledger: Ledger, probability: float, expected_in_s: float = 5.0) -> Candidate:
    return Candidate(
        ledger.issue(
            100.0,
            tenant="ann",
            session="s",
            probability=probability,
            expected_in_s=expected_in_s,
            hold_s=60.0,
            because="hint",
        )
    )


def test_nothing_waiting_gives_nothing_to_do() -> None:
    assert choose([], 0.0) is None


def test_the_most_likely_goes_first_even_if_it_is_expected_later() -> None:
    ledger = Ledger()
    likely, soon = candidate(ledger, 0.9, 30.0), candidate(ledger, 0.8, 1.0)
    assert choose([soon, likely], 0.0) is likely
    assert choose([likely, soon], 0.0) is likely


def test_among_equally_likely_the_soonest_expected_goes_first_even_if_it_is_older() -> None:
    ledger = Ledger()
    soon, late = candidate(ledger, 0.5, 1.0), candidate(ledger, 0.5, 30.0)
    assert choose([late, soon], 0.0) is soon
    assert choose([soon, late], 0.0) is soon


def test_among_equals_the_newest_hint_goes_first() -> None:
    ledger = Ledger()
    older, newer = candidate(ledger, 0.5), candidate(ledger, 0.5)
    assert choose([older, newer], 0.0) is newer
    assert choose([newer, older], 0.0) is newer


@pytest.mark.parametrize(("now", "expired"), [(100.0, False), (105.0, False), (165.0, False), (165.1, True)])
def test_a_preload_expires_when_its_hold_would_be_over(now: float, expired: bool) -> None:
    """Expected at 105 and worth holding for 60 s after that."""
    assert (expires_at(candidate(Ledger(), 0.5).ticket) < now) is expired


def test_once_they_are_due_the_newest_hint_goes_first() -> None:
    ledger = Ledger()
    older, newer = candidate(ledger, 0.5, 1.0), candidate(ledger, 0.5, 2.0)
    assert choose([older, newer], 100.0) is older
    assert choose([older, newer], 110.0) is newer
