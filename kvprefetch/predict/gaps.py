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
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import log
from operator import neg

_FIRST, _COUNT = 0.25, 46  # 0.25 s … 1.5 million s, two to an octave
EDGES = tuple([0.0] + [_FIRST * 2 ** (k / 2) for k in range(_COUNT)])  # whole seconds are hit exactly
BINS = len(EDGES) - 1
WIDTHS = tuple(high - low for low, high in pairwise(EDGES))


def bin_of(age: float) -> int:
    """The bin that `age` lies in; the last one has no end."""
    return min(bisect_right(EDGES, max(age, 0.0)) - 1, BINS - 1)


_PRIOR = 25.0  # gaps' worth of the more general cell
_EVENTS = 8.0  # ends of gaps' worth of it
_STRETCHES = (0, *(bin_of(s) for s in (2.0, 15.0, 60.0, 300.0, 900.0, 1800.0, 3600.0, 7200.0, 14_400.0)), BINS)
_MEMORY = 4000.0  # gaps a bin remembers: beyond that, old ones fade (drift)
_REFRESH = 0.03  # a cell's table is made anew when this share of what it remembers is new
_UNKNOWN = (0.05,) * BINS  # a gap lasts some twenty bins, for want of any knowledge

Levels = tuple[Hashable, ...]
"""Cells of a gap, the most general first."""


@dataclass(slots=True, eq=False)
class Cell:
    """What is known of one kind of gap: per bin, gaps that ended in it and gaps that outlived it. 7 to 14 KB."""

    above: "Cell | None"
    ended: list[float] = field(default_factory=lambda: [0.0] * BINS)
    outlived: list[float] = field(default_factory=lambda: [0.0] * BINS)
    gaps: float = 0.0  # that ended
    seen: float = 0.0  # events since the start, for refreshing
    fresh_at: float = -1.0  # `seen` when the table was made
    version: int = 0  # of the table
    above_version: int = 0  # of the table above that it was made with
    hazard: list[float] = field(default_factory=list)
    survival: list[float] = field(default_factory=list)  # S at each edge
    best: dict[int, tuple[float, float]] = field(default_factory=dict)  # by bin: index, and the τ that gives it

    def note_outlived(self, k: int) -> None:
        """A gap has passed bin `k`."""
        self.outlived[k] += 1
        self.seen += 1
        self._fade(k)

    def note_ended(self, k: int) -> None:
        """A gap has ended in bin `k`."""
        self.ended[k] += 1
        self.gaps += 1
        self.seen += 1
        self._fade(k)

    def _fade(self, k: int) -> None:
        """Halve a bin that is full: what is newer weighs more."""
        if self.ended[k] + self.outlived[k] > _MEMORY:
            self.ended[k] /= 2
            self.outlived[k] /= 2

    def refresh(self) -> "Cell":
        """Hazard and survival from the counts and from the cell above, where either has learnt enough since."""
        above = self.above.refresh() if self.above else None
        is_stale = self.seen > self.fresh_at + _REFRESH * min(self.fresh_at, _MEMORY * BINS)
        if not is_stale and (above is None or above.version == self.above_version):
            return self
        self.fresh_at, self.version = self.seen, self.version + 1
        self.above_version = above.version if above else 0
        prior, weight = (self._scaled(above.hazard), _PRIOR) if above else (_UNKNOWN, 1.0)
        self.hazard = [
            (ended + weight * p) / (ended + outlived + weight)
            for ended, outlived, p in zip(self.ended, self.outlived, prior, strict=True)
        ]
        self.survival = [1.0]
        for h in self.hazard:
            self.survival.append(self.survival[-1] * (1 - h))
        self.best = {}
        return self

    def _scaled(self, hazard: Sequence[float]) -> list[float]:
        """The hazard above, times what this cell saw of what was to be expected by it, a stretch of ages at a time."""
        scaled: list[float] = []
        for first, end in pairwise(_STRETCHES):
            expected = ended = _EVENTS
            for k in range(first, end):
                ended += self.ended[k]
                expected += (self.ended[k] + self.outlived[k]) * hazard[k]
            ratio = ended / expected
            scaled += [min(hazard[k] * ratio, 0.95) for k in range(first, end)]
        return scaled

    def best_from(self, k: int) -> tuple[float, float]:
        """The index of a gap at the beginning of bin `k`, and the τ that gives it."""
        best = self.best.get(k)
        if best is None:
            best = self.best[k] = _best_rate(self.hazard, k)
        return best

    def index(self, age: float) -> float:
        """The index of an open gap of `age`, per second, between the bins by log age."""
        self.refresh()
        k = bin_of(age)
        here = self.best_from(k)[0]
        if k == 0 or k == BINS - 1:
            return here
        share = log(age / EDGES[k]) / log(EDGES[k + 1] / EDGES[k])
        return here * (1 - share) + self.best_from(k + 1)[0] * share

    def hold(self, age: float) -> float:
        """For how many seconds from `age` holding pays at the index; not less than to the end of the bin.

        0 beyond the last edge, where nothing is known.
        """
        k = bin_of(age)
        return max(0.0, max(EDGES[k] + self.refresh().best_from(k)[1], EDGES[k + 1]) - age)

    def within(self, age: float, horizon: float) -> float:
        """P(the gap ends within `horizon` s | it has lasted `age`)."""
        self.refresh()
        here = _survival(self.survival, age)
        return 1 - _survival(self.survival, age + horizon) / here if here > 0 else 0.0

    def residency(self, age: float, horizon: float) -> float:
        """E[min(time to the gap's end, horizon)] given that it has lasted `age`."""
        self.refresh()
        here = _survival(self.survival, age)
        if not (here > 0 and horizon > 0):
            return 0.0
        total, at, s = 0.0, age, here
        for edge in (*EDGES[bisect_right(EDGES, age) :], age + horizon):
            end = min(edge, age + horizon)
            s_end = _survival(self.survival, end)
            total += (s + s_end) / 2 * (end - at)
            at, s = end, s_end
            if end >= age + horizon:
                break
        return total / here

    def quantile(self, age: float, share: float) -> float:
        """Seconds from `age` within which the gap ends with probability `share`; inf if it may never."""
        self.refresh()
        goal = _survival(self.survival, age) * (1 - share)
        k = max(bisect_right(EDGES, age), bisect_left(self.survival, -goal, key=neg))
        return EDGES[k] - age if k < len(EDGES) else float("inf")


class GapModel:
    """Cells by name; bounded by `max_cells`, beyond which new kinds of gaps fall to their general cell."""

    def __init__(self, max_cells: int = 4096) -> None:
        self.cells: dict[Hashable, Cell] = {}
        self.max_cells = max_cells

    def cell(self, levels: Levels) -> Cell:
        """The most specific cell that there is room for; the others are above it."""
        above: Cell | None = None
        for name in levels:
            cell = self.cells.get(name)
            if cell is None:
                if above is not None and len(self.cells) >= self.max_cells:
                    return above
                cell = self.cells[name] = Cell(above)
            above = cell
        assert above is not None
        return above

    def outlived(self, cell: Cell, k: int) -> None:
        """An open gap has passed bin `k`."""
        for one in _upwards(cell):
            one.note_outlived(k)

    def ended(self, cell: Cell, age: float) -> None:
        """A gap ended at `age`; the bins before it were reported as outlived."""
        k = bin_of(age)
        for one in _upwards(cell):
            one.note_ended(k)


def _upwards(cell: Cell | None) -> Iterator[Cell]:
    while cell is not None:
        yield cell
        cell = cell.above


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
