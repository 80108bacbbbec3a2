"""How long until a session's next request: a hazard learnt online, in bins of log time.

A **gap** runs from an event (a turn ended, a signal came) to the session's next request. Each bin of a gap's age has a
hazard: of the gaps that reached it, how many ended in it (the life-table estimate: Cutler & Ederer 1958). A gap that is
still open counts in every bin that it has outlived, so sessions that never return are not forgotten but lower the
hazard of old age. Cells are hierarchical: a specific one borrows from the more general one above it as if it had seen
`_PRIOR` gaps of that (empirical Bayes), so a new tenant starts from what is common.

From the hazard follows the **index** of an open gap: max over τ of P(X ≤ τ) ÷ E[min(X, τ)], the best rate at which
holding its context for some time τ pays, per second (DESIGN §7.3; the form is Gittins', 1979). Times in seconds.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import log
from operator import neg

_FIRST, _RATIO, _COUNT = 0.25, 2**0.5, 46  # 0.25 s … 1.5 million s
EDGES = tuple([0.0] + [_FIRST * _RATIO**k for k in range(_COUNT)])
BINS = len(EDGES) - 1
WIDTHS = tuple(high - low for low, high in pairwise(EDGES))
_PRIOR = 6.0  # gaps' worth of the more general cell
_MEMORY = 4000.0  # gaps a bin remembers: beyond that, old ones fade (drift)
_REFRESH = 0.03  # a cell's table is made anew when its gaps have grown by this share

Levels = tuple[Hashable, ...]
"""Cells of a gap, the most general first."""


def bin_of(age: float) -> int:
    """The bin that `age` lies in; the last one has no end."""
    return min(bisect_right(EDGES, max(age, 0.0)) - 1, BINS - 1)


@dataclass(slots=True)
class Cell:
    """What is known of one kind of gap: per bin, gaps that ended in it and gaps that outlived it."""

    ended: list[float] = field(default_factory=lambda: [0.0] * BINS)
    outlived: list[float] = field(default_factory=lambda: [0.0] * BINS)
    gaps: float = 0.0  # that ended
    seen: float = 0.0  # events since the start, for refreshing
    fresh_at: float = -1.0  # `seen` when the table was made
    hazard: list[float] = field(default_factory=list)
    index: list[float] = field(default_factory=list)
    hold: list[float] = field(default_factory=list)  # the τ that gives each bin's index, from the bin's beginning
    survival: list[float] = field(default_factory=list)  # S at each edge

    def fade(self, k: int) -> None:
        """Halve a bin that is full: what is newer weighs more."""
        if self.ended[k] + self.outlived[k] > _MEMORY:
            self.ended[k] /= 2
            self.outlived[k] /= 2


class GapModel:
    """Cells by name; bounded by `max_cells`, beyond which new kinds of gaps fall to their general cell.

    A cell takes about 6 KB.
    """

    def __init__(self, max_cells: int = 4096) -> None:
        self.cells: dict[Hashable, Cell] = {}
        self.max_cells = max_cells

    def outlived(self, levels: Levels, k: int) -> None:
        """An open gap has passed bin `k`."""
        for cell in self._cells(levels):
            cell.outlived[k] += 1
            cell.seen += 1
            cell.fade(k)

    def ended(self, levels: Levels, age: float) -> None:
        """A gap ended at `age`; the bins before it were reported as outlived."""
        k = bin_of(age)
        for cell in self._cells(levels):
            cell.ended[k] += 1
            cell.gaps += 1
            cell.seen += 1
            cell.fade(k)

    def gaps(self, levels: Levels) -> float:
        """How many gaps of the most specific known kind have ended."""
        cell = self.cells.get(levels[-1])
        return cell.gaps if cell else 0.0

    def index(self, levels: Levels, age: float) -> float:
        """The index of an open gap of `age`, per second, between the bins by log age."""
        cell = self._table(levels)
        k = bin_of(age)
        if k == 0 or k == BINS - 1:
            return cell.index[k]
        share = log(age / EDGES[k]) / log(EDGES[k + 1] / EDGES[k])
        return cell.index[k] * (1 - share) + cell.index[k + 1] * share

    def hold(self, levels: Levels, age: float) -> float:
        """For how many seconds from `age` holding pays at the index; not less than to the end of the bin."""
        k = bin_of(age)
        return max(EDGES[k] + self._table(levels).hold[k], EDGES[k + 1]) - age

    def within(self, levels: Levels, age: float, horizon: float) -> float:
        """P(the gap ends within `horizon` s | it has lasted `age`)."""
        cell = self._table(levels)
        here = _survival(cell.survival, age)
        return 1 - _survival(cell.survival, age + horizon) / here if here > 0 else 0.0

    def residency(self, levels: Levels, age: float, horizon: float) -> float:
        """E[min(time to the gap's end, horizon)] given that it has lasted `age`."""
        cell = self._table(levels)
        here = _survival(cell.survival, age)
        if here <= 0:
            return 0.0
        total, at, s = 0.0, age, here
        for edge in (*EDGES[bisect_right(EDGES, age) :], age + horizon):
            end = min(edge, age + horizon)
            s_end = _survival(cell.survival, end)
            total += (s + s_end) / 2 * (end - at)
            at, s = end, s_end
            if end >= age + horizon:
                break
        return total / here

    def quantile(self, levels: Levels, age: float, share: float) -> float:
        """Seconds from `age` within which the gap ends with probability `share`; inf if it may never."""
        cell = self._table(levels)
        goal = _survival(cell.survival, age) * (1 - share)
        k = max(bisect_right(EDGES, age), bisect_left(cell.survival, -goal, key=neg))
        return EDGES[k] - age if k < len(EDGES) else float("inf")

    # -- within ----------------------------------------------------------------------------------------
    def _cells(self, levels: Levels) -> list[Cell]:
        found = []
        for name in levels:
            cell = self.cells.get(name)
            if cell is None and len(self.cells) < self.max_cells:
                cell = self.cells[name] = Cell()
            if cell is not None:
                found.append(cell)
        return found

    def _table(self, levels: Levels) -> Cell:
        """The most specific known cell, its table made anew where it has learnt enough since."""
        above: Cell | None = None
        for name in levels:
            cell = self.cells.get(name)
            if cell is None:
                continue
            if cell.seen > cell.fresh_at * (1 + _REFRESH) or cell.fresh_at < 0:
                _refresh(cell, above)
            above = cell
        if above is None:
            above = self.cells.setdefault(levels[0], Cell())
            _refresh(above, None)
        return above


def _refresh(cell: Cell, above: Cell | None) -> None:
    """Hazards, survival and indices from the counts. O(bins²)."""
    cell.fresh_at = cell.seen
    hazard = []
    for k in range(BINS):
        n = cell.ended[k] + cell.outlived[k]
        prior = above.hazard[k] if above else 0.05  # a gap lasts some twenty bins, for want of any knowledge
        weight = _PRIOR if above else 1.0
        hazard.append((cell.ended[k] + weight * prior) / (n + weight))
    cell.hazard = hazard
    survival = [1.0]
    for h in hazard:
        survival.append(survival[-1] * (1 - h))
    cell.survival = survival
    best = [_best_rate(hazard, k) for k in range(BINS)]
    cell.index = [rate for rate, _ in best]
    cell.hold = [tau for _, tau in best]


def _best_rate(hazard: Sequence[float], start: int) -> tuple[float, float]:
    """max over τ of P(X ≤ τ) ÷ E[min(X, τ)] for a gap at the beginning of bin `start`, and that τ."""
    best, hold, alive, residency = 0.0, 0.0, 1.0, 0.0
    for k in range(start, BINS):
        after = alive * (1 - hazard[k])
        residency += (alive + after) / 2 * WIDTHS[k]
        rate = (1 - after) / residency
        if rate > best:
            best, hold = rate, EDGES[k + 1] - EDGES[start]
        elif alive < 1e-3:
            break
        alive = after
    return best, hold


def _survival(at_edges: Sequence[float], age: float) -> float:
    """S at `age`, linear between the edges."""
    k = bin_of(age)
    share = min((age - EDGES[k]) / WIDTHS[k], 1.0)
    return at_edges[k] + (at_edges[k + 1] - at_edges[k]) * share
