"""Which pages to move so that live ones lie packed at the low end, and in sequence order if wanted.

Pure. A plan is a list of phases; the moves of one phase can run at once and in any order, because none of its
targets is one of its sources, and every target is free when the phase begins. After each phase the page table
is published; should a phase fail, its targets are still free and every block is readable where it was.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise

Move = tuple[int, int]  # from page, to page
Phase = list[Move]


def packing(live: Iterable[int], pinned: Iterable[int]) -> list[Phase]:
    """The fewest moves that leave every page but the pinned ones as low as it can be: one phase, or none.

    `live`: pages with content; `pinned`: those of them that must stay where they are.
    """
    occupied, stuck = set(live), set(pinned)
    places = _lowest(len(occupied), stuck)
    sources = sorted(occupied - places)
    moves = list(zip(sources, sorted(places - occupied), strict=True))
    return [moves] if moves else []


def vacating(live: Iterable[int], pinned: Iterable[int], end: int) -> list[Phase]:
    """The fewest moves that leave no page but pinned ones at `end` or above: one phase, or none.

    There must be room: at least as many free pages below `end` as pages to move.
    """
    occupied, stuck = set(live), set(pinned)
    sources = sorted(page for page in occupied - stuck if page >= end)
    targets = (page for page in range(end) if page not in occupied)
    moves = list(zip(sources, targets, strict=False))
    return [moves] if moves else []


def ordering(sequences: Sequence[Sequence[int]], pinned: Iterable[int], pages: int) -> list[Phase]:
    """Moves that pack the pages and lay each sequence's out one after the other, sequences as they lie now.

    `sequences`: the live ones of `pages` pages, each in one sequence, in its order. Pinned pages stay, and the
    pages around them close up. A cycle of moves goes through a free page; in a full pool cycles stay as they are.
    """
    stuck = set(pinned)
    moving = [[page for page in sequence if page not in stuck] for sequence in sequences]
    moving = sorted((pages for pages in moving if pages), key=min)
    wanted = [page for pages in moving for page in pages]
    places = sorted(_lowest(len(wanted) + len(stuck), stuck) - stuck)
    moves = {source: target for source, target in zip(wanted, places, strict=True) if source != target}
    occupied = {page for sequence in sequences for page in sequence}
    free = set(range(pages)) - occupied - set(moves.values())
    return _schedule(moves, occupied, max(free, default=None))


def runs(sequence: Sequence[int]) -> int:
    """Contiguous runs of pages in a sequence: the copies that it takes to move it."""
    return sum(after != before + 1 for before, after in pairwise(sequence)) + bool(sequence)


def _lowest(count: int, stuck: set[int]) -> set[int]:
    """The places of `count` pages: where pages are stuck, and the lowest others."""
    places = set(stuck)
    page = 0
    while len(places) < count:
        places.add(page)
        page += 1
    return places


def _schedule(moves: dict[int, int], occupied: set[int], through: int | None) -> list[Phase]:
    """Order `moves` into phases, breaking cycles through a page that is free and no move's target."""
    waiting, taken = dict(moves), set(occupied)
    phases: list[Phase] = []
    while waiting:
        phase = [(source, target) for source, target in waiting.items() if target not in taken]
        if not phase:  # only cycles are left
            if through is None or through in taken:
                break
            source = next(iter(waiting))
            phase = [(source, through)]
            waiting[through] = waiting[source]
        for source, target in phase:
            del waiting[source]
            taken.discard(source)
            taken.add(target)
        phases.append(phase)
    return phases
