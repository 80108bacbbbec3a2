"""What came of what was foreseen: claims against the record."""

from math import inf, nan

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvprefetch.predict.rates import Shares
from kvprefetch.predict.trials import Trials


def record(
    trials: Trials, claimed: float, share: float, times: int, kind: str = "hint", tenant: str = "ann", idle: int = 1
) -> None:
    """So many contexts were proposed with this claim, and this share of each was then used."""
    for i in range(times):
        trials.propose("s", kind, tenant, claimed, idle, float(i), i + 60.0)
        trials.used("s", share, float(i))


def outcomes(trials: Trials, claimed: float, true: str, kind: str = "hint", tenant: str = "ann") -> None:
    """Contexts that were used, as "1", or not, as "0"."""
    for i, came in enumerate(true):
        trials.propose("s", kind, tenant, claimed, 1, float(i), i + 0.5)
        if came == "1":
            trials.used("s", 1.0, i + 0.25)
        trials.advance(i + 0.75)


# -- calibration -------------------------------------------------------------------------------------------
def test_without_a_record_a_claim_is_taken_at_its_word() -> None:
    assert Trials().calibrated("hint", "ann", 0.7, 1) == pytest.approx(0.7)


@pytest.mark.parametrize(("claimed", "true"), [(0.9, "1000100010"), (0.3, "1101110110")])
def test_what_comes_true_more_or_less_often_than_claimed_is_corrected(claimed: float, true: str) -> None:
    trials = Trials()
    outcomes(trials, claimed, true * 20)
    assert trials.calibrated("hint", "ann", claimed, 1) == pytest.approx(true.count("1") / 10, abs=0.05)


def test_a_part_that_was_used_counts_as_a_part() -> None:
    trials = Trials()
    record(trials, 0.8, 0.5, 100)
    assert trials.calibrated("hint", "ann", 0.8, 1) == pytest.approx(0.5, abs=0.02)


def test_better_claims_stay_better() -> None:
    trials = Trials()
    record(trials, 0.6, 0.3, 100)
    worse, better = (trials.calibrated("hint", "ann", claimed, 1) for claimed in (0.52, 0.64))
    assert worse == pytest.approx(better * 0.52 / 0.64)


def test_kinds_have_records_of_their_own() -> None:
    trials = Trials()
    record(trials, 0.9, 0.1, 100, "hover")
    assert trials.calibrated("hover", "ann", 0.9, 1) < 0.15
    assert trials.calibrated("hint", "ann", 0.9, 1) == pytest.approx(0.9)


def test_idleness_is_told_apart() -> None:
    trials = Trials()
    for _ in range(20):
        record(trials, 0.8, 0.8, 5, idle=1)
        record(trials, 0.8, 0.0, 5, idle=6)
    assert trials.calibrated("hint", "ann", 0.8, 1) > 0.7
    assert trials.calibrated("hint", "ann", 0.8, 6) < 0.1
    assert trials.calibrated("hint", "bob", 0.8, 1) > 0.7 > 0.1 > trials.calibrated("hint", "bob", 0.8, 6)


def test_a_new_tenant_starts_from_the_common_record_and_soon_speaks_for_itself() -> None:
    trials = Trials()
    record(trials, 0.9, 0.3, 100, tenant="ann")
    assert trials.calibrated("hint", "bob", 0.9, 1) == pytest.approx(0.3, abs=0.03)
    beliefs = []
    for _ in range(4):
        record(trials, 0.9, 0.9, 5, tenant="bob")
        beliefs.append(trials.calibrated("hint", "bob", 0.9, 1))
    assert beliefs == sorted(beliefs)
    assert beliefs[-1] > 0.75
    assert trials.calibrated("hint", "ann", 0.9, 1) < 0.4


def test_certain_hints_that_never_come_true_end_near_zero() -> None:
    trials = Trials()
    outcomes(trials, 1.0, "0" * 60)
    assert trials.calibrated("hint", "ann", 1.0, 1) < 0.01
    assert trials.calibrated("hint", "bob", 1.0, 1) < 0.05


def test_a_kind_that_has_become_true_is_believed_again() -> None:
    trials = Trials()
    outcomes(trials, 1.0, "0" * 2000)
    outcomes(trials, 1.0, "1" * 2000)
    assert trials.calibrated("hint", "ann", 1.0, 1) > 0.8


# -- trials ------------------------------------------------------------------------------------------------
def test_what_is_overdue_was_not_used() -> None:
    trials = Trials()
    trials.propose("s", "hint", "ann", 0.5, 1, 0.0, 10.0)
    trials.advance(10.0)
    assert trials.outcomes("hint") == 0
    trials.used("s", 1.0, 10.5)
    assert trials.outcomes("hint") == 0.5
    assert trials.calibrated("hint", "ann", 0.5, 1) < 0.5


def test_a_newer_proposal_closes_the_older_as_not_used() -> None:
    trials = Trials()
    trials.propose("s", "hint", "ann", 0.5, 1, 0.0, 10.0)
    trials.propose("s", "hint", "ann", 0.5, 1, 1.0, 11.0)
    assert (trials.outcomes("hint"), len(trials.open)) == (0.5, 1)
    trials.advance(10.5)
    assert len(trials.open) == 1, "the newer one is open for longer"
    trials.used("s", 1.0, 10.7)
    assert trials.outcomes("hint") == 1.0
    assert trials.calibrated("hint", "ann", 0.5, 1) == pytest.approx(0.5), "one of two, claimed at a half each"


def test_a_request_counts_once_and_for_its_own_session() -> None:
    trials = Trials()
    for session in "ab":
        trials.propose(session, "hint", "ann", 1.0, 1, 0.0, 10.0)
    trials.used("a", 1.0, 1.0)
    trials.used("a", 1.0, 1.0)
    trials.used("nobody", 1.0, 1.0)
    assert trials.outcomes("hint") == 1.0
    assert set(trials.open) == {"b"}


def test_what_is_withdrawn_or_left_open_by_another_run_teaches_nothing() -> None:
    trials = Trials()
    trials.propose("a", "hint", "ann", 0.5, 1, 0.0, 10.0)
    trials.propose("b", "hint", "ann", 0.5, 1, 0.0, 10.0)
    trials.withdraw("a")
    trials.withdraw("nobody")
    trials.advance(5.0)
    trials.resumed()
    trials.advance(20.0)
    assert (trials.outcomes("hint"), trials.open) == (0.0, {})
    assert trials.ratio("hint") == 1.0


@pytest.mark.parametrize(
    ("claimed", "taken"), [(2.0, 1.0), (-1.0, 0.02), (nan, 0.02), (inf, 0.02), (-inf, 0.02), (0.0, 0.02)]
)
def test_claims_that_cannot_be_are_bounded(claimed: float, taken: float) -> None:
    trials = Trials()
    assert trials.calibrated("hint", "ann", claimed, 1) == taken
    trials.propose("s", "hint", "ann", claimed, 1, 0.0, 10.0)
    assert trials.open["s"].claimed == taken


@pytest.mark.parametrize(("share", "taken"), [(nan, 0.0), (-5.0, 0.0), (-inf, 0.0), (7.0, 1.0), (inf, 1.0)])
def test_shares_that_cannot_be_are_bounded(share: float, taken: float) -> None:
    odd, sound = Trials(), Trials()
    record(odd, 0.5, share, 3)
    record(sound, 0.5, taken, 3)
    assert odd.calibrated("hint", "ann", 0.5, 1) == sound.calibrated("hint", "ann", 0.5, 1)


# -- bounds ------------------------------------------------------------------------------------------------
def test_one_session_proposed_forever_keeps_little_open() -> None:
    trials = Trials()
    trials.propose("other", "hint", "ann", 0.5, 1, 0.0, 4000.0)
    for i in range(5000):
        trials.propose("s", "hint", "ann", 0.5, 1, float(i), i + 1e6)
        assert ("other" in trials.open) is (i <= 4000), "what is open is closed in its time"
    assert len(trials.open) == 1
    assert len(trials._due) <= 66


@pytest.mark.parametrize("until", [nan, -inf, -5.0])
def test_an_end_that_cannot_be_does_not_keep_others_open(until: float) -> None:
    trials = Trials()
    trials.propose("odd", "hint", "ann", 0.5, 1, 1.0, until)
    trials.propose("s", "hint", "ann", 0.5, 1, 2.0, 4.0)
    trials.advance(5.0)
    assert not trials.open
    assert not trials._due


TIMES = st.sampled_from([nan, inf, -inf, -1.0]) | st.floats(0, 100)
CLAIMS = st.sampled_from([nan, inf, -1.0, 2.0]) | st.floats(0, 1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("pua"), st.sampled_from("xyz"), CLAIMS, TIMES, TIMES), max_size=40))
def test_any_events_in_any_order(events: list[tuple[str, str, float, float, float]]) -> None:
    trials = Trials(ratios=Shares(start=1.0, max_cells=20))
    for what, session, number, now, until in events:
        if what == "p":
            trials.propose(session, "hint", session, number, 1, now, until)
        elif what == "u":
            trials.used(session, number, now)
        else:
            trials.advance(now)
        assert 0 <= trials.calibrated("hint", session, number, 1) <= 1
        assert len(trials.open) <= len({session for _, session, *_ in events})
        assert len(trials._due) <= 2 * len(trials.open) + 66
    assert len(trials.ratios.cells) <= 20
