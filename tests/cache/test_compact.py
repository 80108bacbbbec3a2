"""Compaction plans: packed, in order, safe in every phase, and no move too many."""

from collections.abc import Iterable
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from kvprefetch.cache.compact import Phase, ordering, packing, runs, vacating


def carried_out(phases: Iterable[Phase], occupied: Iterable[int]) -> dict[int, int]:
    """Where each page's content ends up. Proves on the way that no phase overwrites anything."""
    content = {page: page for page in occupied}
    for phase in phases:
        sources, targets = [s for s, _ in phase], [t for _, t in phase]
        assert phase, "an empty phase"
        assert len(set(sources)) == len(sources)
        assert len(set(targets)) == len(targets)
        assert set(targets).isdisjoint(content), "a target is not free when its phase begins"
        moved = {target: content[source] for source, target in phase}
        content = {page: c for page, c in content.items() if page not in set(sources)} | moved
    return {c: page for page, c in content.items()}


def test_holes_are_filled_from_the_top() -> None:
    assert packing(live=[0, 3, 4, 7], pinned=[]) == [[(4, 1), (7, 2)]]
    assert packing(live=[0, 1, 2], pinned=[]) == []
    assert packing(live=[], pinned=[]) == []


def test_a_pinned_page_stays_and_the_others_close_up() -> None:
    assert packing(live=[5, 6, 7], pinned=[6]) == [[(5, 0), (7, 1)]]


def test_only_what_lies_beyond_the_end_moves_to_vacate_it() -> None:
    assert vacating(live=[1, 3, 6, 7], pinned=[], end=5) == [[(6, 0), (7, 2)]]
    assert vacating(live=[1, 3, 6, 7], pinned=[6], end=5) == [[(7, 0)]]
    assert vacating(live=[1, 3], pinned=[1], end=5) == []


@given(st.sets(st.integers(0, 19)), st.integers(1, 20), st.data())
def test_nothing_but_pinned_pages_is_left_beyond_the_end(live: set[int], end: int, data: st.DataObject) -> None:
    pinned = data.draw(st.sets(st.sampled_from(sorted(live)))) if live else set()
    if len(live - pinned) + len({page for page in pinned if page < end}) > end:
        return
    content = carried_out(vacating(live, pinned, end), live)
    assert all(page < end for page in content.values() if page not in pinned)
    assert all(content[page] == page for page in pinned)
    assert sum(content[page] != page for page in live) == sum(page >= end for page in live - pinned)


def test_a_sequence_is_laid_out_in_its_order() -> None:
    phases = ordering([[4, 2, 6]], pinned=[], pages=8)
    assert carried_out(phases, [4, 2, 6]) == {4: 0, 2: 1, 6: 2}


def test_a_swap_goes_through_a_free_page_or_is_left() -> None:
    assert carried_out(ordering([[1, 0]], pinned=[], pages=3), [0, 1]) == {1: 0, 0: 1}
    assert ordering([[1, 0]], pinned=[], pages=2) == []


def test_runs_are_counted() -> None:
    assert [runs(pages) for pages in ([], [3], [3, 4, 5], [5, 4, 3], [0, 1, 7, 8])] == [0, 1, 1, 3, 2]


@st.composite
def pools(draw: st.DrawFn) -> tuple[list[list[int]], set[int]]:
    """Sequences of pages in a pool of 24, and some pinned pages of them."""
    pages = draw(st.permutations(range(24)))[: draw(st.integers(0, 24))]
    cuts = sorted(draw(st.lists(st.integers(0, len(pages)), max_size=4)))
    edges = [0, *cuts, len(pages)]
    sequences = [list(pages[a:b]) for a, b in pairwise(edges)]
    return sequences, set(draw(st.lists(st.sampled_from(pages), max_size=5))) if pages else set()


@given(pools())
def test_packing_is_complete_and_has_no_move_too_many(pool: tuple[list[list[int]], set[int]]) -> None:
    sequences, pinned = pool
    live = {page for sequence in sequences for page in sequence}
    phases = packing(live, pinned)
    where = carried_out(phases, live)
    assert all(where[page] == page for page in pinned)
    free = len(live - pinned)
    expected = sorted(pinned | set([p for p in range(48) if p not in pinned][:free]))
    assert sorted(where.values()) == expected
    assert sum(map(len, phases)) == len(live - set(expected))


@given(pools())
def test_ordering_packs_and_lays_every_sequence_out_in_order(pool: tuple[list[list[int]], set[int]]) -> None:
    sequences, pinned = pool
    live = {page for sequence in sequences for page in sequence}
    phases = ordering(sequences, pinned, pages=25)
    where = carried_out(phases, live)
    assert all(where[page] == page for page in pinned)
    places = [p for p in range(48) if p not in pinned]
    assert sorted(where[page] for page in live - pinned) == places[: len(live - pinned)]
    for sequence in sequences:
        moved = [places.index(where[page]) for page in sequence if page not in pinned]
        assert all(after == before + 1 for before, after in pairwise(moved)), "not in a run"
