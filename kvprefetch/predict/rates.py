"""Shares learnt online: of what was expected, how much came true. Hierarchical, and they forget slowly.

A specific cell borrows from the more general one above it as if it had seen `prior` outcomes of that (empirical
Bayes, as in `predict/gaps.py`), so a new tenant starts from what is common and soon speaks for itself.
"""

from collections.abc import Hashable, Sequence
from math import isfinite

_MEMORY = 500.0  # outcomes that a cell remembers


class Shares:
    """Means of shares or ratios by cell; at most `max_cells`, beyond which a new kind falls to its general cell."""

    def __init__(self, start: float, prior: float = 4.0, max_cells: int = 4096) -> None:
        self.start, self.prior, self.max_cells = start, prior, max_cells
        self.cells: dict[Hashable, list[float]] = {}  # [sum, outcomes]

    def learn(self, levels: Sequence[Hashable], share: float, weight: float = 1.0) -> None:
        """An outcome; `levels` from the most general cell to the most specific. What is no number teaches nothing."""
        if not (isfinite(share) and isfinite(weight)):
            return
        for name in levels:
            cell = self.cells.get(name)
            if cell is None:
                if len(self.cells) >= self.max_cells:
                    continue
                cell = self.cells[name] = [0.0, 0.0]
            cell[0] += share * weight
            cell[1] += weight
            if cell[1] > _MEMORY:
                cell[0] *= 0.5
                cell[1] *= 0.5

    def mean(self, levels: Sequence[Hashable]) -> float:
        """The expected share."""
        value = self.start
        for name in levels:
            cell = self.cells.get(name)
            if cell is not None:
                value = (cell[0] + self.prior * value) / (cell[1] + self.prior)
        return value

    def outcomes(self, name: Hashable) -> float:
        """How many outcomes this cell remembers."""
        return self.cells.get(name, (0.0, 0.0))[1]
