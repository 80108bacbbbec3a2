"""How long until a session's next request: a hazard, and the index that follows from it."""

from math import inf, isfinite, nan

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvprefetch.predict.gaps import BINS, EDGES, Cell, GapModel, bin_of

HOUR = 3600.0


def see(gaps: GapModel, cell: Cell, age: float, times: int = 1, ended: bool = True) -> None:
    """So many gaps reached this age and ended there, or are still open."""
    for _ in range(times):
        for k in range(bin_of(age)):
            gaps.outlived(cell, k)
        if ended:
            gaps.ended(cell, age)


def learnt(*seen: tuple[float, int, bool]) -> Cell:
    """A kind of gap of which this was seen: age, how many, whether they ended there."""
    gaps = GapModel()
    cell = gaps.cell(("turn",))
    for age, times, ended in seen:
        see(gaps, cell, age, times, ended)
    return cell


HALF_AT_FIVE = (5.0, 400, True), (HOUR, 400, False)


@pytest.mark.parametrize(
    ("age", "bin"), [(-1.0, 0), (0.0, 0), (0.24, 0), (0.25, 1), (2.0, 7), (5.0, 9), (1e9, BINS - 1)]
)
def test_bins_have_their_lower_edge_and_the_last_one_has_no_end(age: float, bin: int) -> None:
    assert bin_of(age) == bin


# -- what was learnt shows ---------------------------------------------------------------------------------
def test_half_of_the_gaps_end_at_five_seconds() -> None:
    cell = learnt(*HALF_AT_FIVE)
    low, high = EDGES[bin_of(5.0)], EDGES[bin_of(5.0) + 1]
    assert cell.within(0.0, low) < 0.01
    assert cell.within(0.0, high) == pytest.approx(0.5, abs=0.01)
    assert cell.within(low, high - low) == pytest.approx(0.5, abs=0.01)
    assert cell.within(high, 600.0) < 0.02
    assert cell.quantile(0.0, 0.45) == high
    assert cell.quantile(0.0, 0.9) > HOUR
    assert cell.residency(0.0, high) == pytest.approx(low + (high - low) * 0.75, rel=0.02)


def test_the_index_rises_towards_the_time_of_the_return_and_falls_behind_it() -> None:
    cell = learnt(*HALF_AT_FIVE)
    assert cell.index(0.0) == pytest.approx(0.5 / cell.residency(0.0, EDGES[bin_of(5.0) + 1]), rel=0.02)
    assert cell.index(0.0) < cell.index(2.0) < cell.index(4.0)
    assert cell.index(6.0) < cell.index(0.0) / 50
    assert cell.hold(0.0) == EDGES[bin_of(5.0) + 1]
    assert cell.hold(4.5) == EDGES[bin_of(5.0) + 1] - 4.5


def test_what_is_learnt_after_the_index_was_asked_for_shows_in_it() -> None:
    gaps = GapModel()
    cell = gaps.cell(("turn",))
    before, hold = cell.index(4.0), cell.hold(4.0)
    see(gaps, cell, 100.0, times=50)
    assert cell.index(64.0) > cell.index(4.0)
    assert cell.index(4.0) != before
    assert cell.hold(4.0) != hold


def test_the_index_moves_without_steps_between_the_bins() -> None:
    cell = learnt(*HALF_AT_FIVE)
    low, high = EDGES[10], EDGES[11]
    assert cell.index(low) > cell.index((low * high) ** 0.5) > cell.index(high)
    assert cell.index((low * high) ** 0.5) == pytest.approx((cell.index(low) + cell.index(high)) / 2)
    assert cell.index(high - 1e-9) == pytest.approx(cell.index(high), rel=1e-6)


@pytest.mark.parametrize("age", [0.0, 1.0, EDGES[10], EDGES[12], EDGES[17]])
def test_the_index_is_the_best_that_brute_force_finds(age: float) -> None:
    """Over every time to hold, of gaps whose lengths are known; to within the width of a bin."""
    lengths = [5.0] * 300 + [60.0] * 200 + [400.0] * 300 + [inf] * 200
    cell = learnt((5.0, 300, True), (60.0, 200, True), (400.0, 300, True), (1e6, 200, False))
    rest = [length - age for length in lengths if length > age]
    rate, hold = max((sum(x <= tau for x in rest) / sum(min(x, tau) for x in rest), tau) for tau in set(rest) - {inf})
    assert cell.index(age) == pytest.approx(rate, rel=0.25)
    assert hold <= cell.hold(age) <= (age + hold) * 2**0.5 - age


def test_sessions_that_never_return_lower_the_hazard_of_old_age() -> None:
    gaps = GapModel()
    cell = gaps.cell(("turn",))
    see(gaps, cell, 60.0, times=10)
    believed = cell.within(40.0, 60.0)
    see(gaps, cell, 50.0, times=200, ended=False)
    assert cell.within(40.0, 60.0) == pytest.approx(believed, abs=0.01), "none of them is older than that yet"
    see(gaps, cell, HOUR, times=200, ended=False)
    assert believed > 0.9
    assert cell.within(40.0, 60.0) < 0.1
    assert cell.gaps == 10


# -- cells -------------------------------------------------------------------------------------------------
def test_a_kind_never_seen_speaks_as_its_general_kind_and_soon_for_itself() -> None:
    gaps = GapModel()
    see(gaps, gaps.cell(("turn", "chat")), 5.0, times=500)
    general, new = gaps.cell(("turn",)), gaps.cell(("turn", "tool"))
    assert new.within(0.0, 10.0) == pytest.approx(general.within(0.0, 10.0), abs=0.05)
    assert new.within(0.0, 10.0) > 0.9
    beliefs = [new.within(0.0, 10.0)]
    for _ in range(6):
        see(gaps, new, 600.0, times=10)
        beliefs.append(new.within(0.0, 10.0))
    assert beliefs == sorted(beliefs, reverse=True)
    assert beliefs[-1] < 0.15
    assert general.within(0.0, 10.0) > 0.8, "of all gaps, most are still short ones"


def test_a_kind_that_is_slower_by_little_soon_says_so() -> None:
    """Not only how many gaps end in a stretch of ages is its own, but where in it they do."""
    gaps = GapModel()
    see(gaps, gaps.cell(("turn", "chat")), 3.0, times=500)
    new = gaps.cell(("turn", "tool"))
    see(gaps, new, 10.0, times=100)
    assert new.within(0.0, 7.0) < 0.25
    assert new.within(0.0, 12.0) > 0.85


def test_what_a_specific_kind_learns_its_general_kind_learns_too() -> None:
    gaps = GapModel()
    see(gaps, gaps.cell(("turn", "tool", "ann")), 5.0)
    assert [gaps.cells[name].gaps for name in ("turn", "tool", "ann")] == [1, 1, 1]
    assert gaps.cells["ann"].ended == gaps.cells["turn"].ended
    assert gaps.cells["ann"].outlived == gaps.cells["turn"].outlived


def test_beyond_max_cells_new_kinds_fall_to_their_general_cell() -> None:
    gaps = GapModel(max_cells=3)
    assert gaps.cell(("turn", "a", "ann")) is gaps.cells["ann"]
    assert gaps.cell(("turn", "b", "bob")) is gaps.cells["turn"]
    assert gaps.cell(("turn", "a", "bob")) is gaps.cells["a"]
    for i in range(100):
        see(gaps, gaps.cell(("turn", i, (i, i))), 5.0)
    assert len(gaps.cells) == 3
    assert gaps.cells["turn"].gaps == 100


# -- drift -------------------------------------------------------------------------------------------------
def test_what_is_newer_weighs_more() -> None:
    gaps = GapModel()
    cell = gaps.cell(("turn",))
    for _ in range(20_000):
        cell.note_ended(bin_of(5.0))
    for _ in range(5_000):  # a quarter of what was seen, but most of what is remembered
        cell.note_outlived(bin_of(5.0))
    assert cell.within(4.0, 1.65) < 0.4


def test_a_long_past_does_not_delay_what_is_new() -> None:
    cell = learnt()
    for _ in range(400_000):
        cell.note_ended(bin_of(5.0))
    assert cell.within(4.0, 1.65) > 0.95
    for _ in range(10_000):
        cell.note_outlived(bin_of(5.0))
    assert cell.within(4.0, 1.65) < 0.2


def test_a_change_of_the_general_kind_reaches_the_specific_one() -> None:
    gaps = GapModel()
    new = gaps.cell(("turn", "tool"))
    before = new.within(0.0, 10.0)
    see(gaps, gaps.cell(("turn",)), 5.0, times=200)
    assert new.within(0.0, 10.0) > before + 0.3


# -- whatever was counted ----------------------------------------------------------------------------------
SEEN = st.lists(
    st.tuples(st.sampled_from("ab"), st.floats(0, 3e6), st.integers(1, 60), st.booleans()), min_size=0, max_size=8
)
SPANS = st.floats(0, 3e6) | st.floats(0, 30)


@settings(max_examples=80, deadline=None)
@given(SEEN, SPANS, SPANS, SPANS, st.floats(0, 1))
def test_what_is_said_of_a_gap_fits_together(
    seen: list[tuple[str, float, int, bool]], age: float, one: float, other: float, share: float
) -> None:
    gaps = GapModel()
    for kind, at, times, ended in seen:
        see(gaps, gaps.cell(("turn", kind)), at, times, ended)
    cell = gaps.cell(("turn", "a"))
    shorter, longer = sorted((one, other))
    assert 0 <= cell.within(age, shorter) <= cell.within(age, longer) + 1e-12 <= 1 + 1e-9
    assert 0 <= cell.residency(age, shorter) <= cell.residency(age, longer) + 1e-6
    for horizon in (shorter, longer):
        staying = 1 - cell.within(age, horizon)
        assert horizon * staying * (1 - 1e-9) - 1e-6 <= cell.residency(age, horizon) <= horizon * (1 + 1e-9) + 1e-6
    goes_by = cell.quantile(age, share)
    assert goes_by >= 0
    if isfinite(goes_by):
        assert cell.within(age, goes_by) >= share - 1e-9
    assert cell.survival[0] == 1.0
    assert all(0 <= after <= before for before, after in zip(cell.survival, cell.survival[1:], strict=False))
    assert 0 <= cell.index(age) < inf
    assert 0 <= cell.hold(age) < inf


@settings(max_examples=40, deadline=None)
@given(SEEN, st.integers(0, BINS - 1))
def test_no_hold_does_better_than_the_index(seen: list[tuple[str, float, int, bool]], k: int) -> None:
    """And the hold that it names does as well."""
    gaps = GapModel()
    for kind, at, times, ended in seen:
        see(gaps, gaps.cell(("turn", kind)), at, times, ended)
    cell, age = gaps.cell(("turn", "a")), EDGES[k]

    def rate(hold: float) -> float:
        return cell.within(age, hold) / cell.residency(age, hold)

    assert cell.index(age) == pytest.approx(rate(cell.hold(age)), rel=1e-6)
    assert cell.index(age) >= max(rate(edge - age) for edge in EDGES[k + 1 :]) * 0.998


@pytest.mark.parametrize("age", [2e6, 1e12, inf, nan])
def test_nothing_is_held_for_what_is_older_than_all_that_is_known(age: float) -> None:
    cell = learnt((5.0, 100, True))
    hold = cell.hold(age)
    assert hold == 0.0
    assert cell.within(age, hold) == 0.0
    assert cell.residency(age, hold) == 0.0


def test_asking_changes_nothing() -> None:
    cell = learnt(*HALF_AT_FIVE)

    def ask(age: float) -> tuple[float, ...]:
        return cell.index(age), cell.hold(age), cell.within(age, 9.0), cell.residency(age, 9.0), cell.quantile(age, 0.5)

    def counts() -> object:
        return cell.gaps, cell.seen, list(cell.ended), list(cell.outlived)

    before = counts()
    assert [ask(age) for age in (0.0, 3.0, 90.0)] == [ask(age) for age in (0.0, 3.0, 90.0)]
    assert counts() == before
