"""How well an attacker tells two cases apart: the area under the ROC curve, with an interval.

What an attacker sees of one probe is anything that can be compared for equality. It learns what each sight is worth
from one half of the probes, by which case it went with how often, and guesses the other half, and the other way round;
so no score has seen its own answer. The two areas are averaged.

The variance is DeLong's (DeLong, DeLong and Clarke-Pearson, Biometrics 1988), from midranks as in Sun and Xu (IEEE
Signal Processing Letters 2014). A surface on which every probe looks the same has 0.5 and no variance.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import log, sqrt
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

LEVEL = 0.99


@dataclass(frozen=True)
class Auc:
    """An area, and its two-sided interval at `LEVEL`."""

    area: float
    low: float
    high: float
    probes: int

    @property
    def half_width(self) -> float:
        """Of the interval."""
        return (self.high - self.low) / 2


def of_sights(bits: Sequence[bool], sights: Sequence[Hashable]) -> Auc:
    """What each probe looked like, and what was true of it. Each half should have as many of either case."""
    halves = [slice(0, len(bits) // 2), slice(len(bits) // 2, None)]
    parts = []
    for learn, guess in (halves, halves[::-1]):
        worth = _worth(bits[learn], sights[learn])
        parts.append(_delong(bits[guess], [worth.get(sight, 0.0) for sight in sights[guess]]))
    area, variance = (sum(values) for values in zip(*parts, strict=True))
    return _interval(area / 2, variance / 4, len(bits))


def of_scores(bits: Sequence[bool], scores: Sequence[float]) -> Auc:
    """Numbers that are higher where the attacker thinks that it is true."""
    area, variance = _delong(bits, scores)
    return _interval(area, variance, len(bits))


def _worth(bits: Sequence[bool], sights: Sequence[Hashable]) -> dict[Hashable, float]:
    """The log odds of each sight, as if each had been seen once more with either case."""
    seen = Counter(zip(sights, bits, strict=True))
    return {sight: log((seen[sight, True] + 1) / (seen[sight, False] + 1)) for sight in set(sights)}


def _delong(bits: Sequence[bool], scores: Sequence[float]) -> tuple[float, float]:
    """The area and its variance."""
    truth, values = np.asarray(bits, dtype=bool), np.asarray(scores, dtype=float)
    ones, zeros = values[truth], values[~truth]
    m, n = len(ones), len(zeros)
    if m < 2 or n < 2:
        raise ValueError(f"{m} and {n} probes of the two cases; at least 2 of each are needed")
    everything = _midranks(np.concatenate([ones, zeros]))
    of_ones = (everything[:m] - _midranks(ones)) / n
    of_zeros = 1 - (everything[m:] - _midranks(zeros)) / m
    return float(of_ones.mean()), float(of_ones.var(ddof=1) / m + of_zeros.var(ddof=1) / n)


def _midranks(values: ArrayLike) -> NDArray[np.float64]:
    """Ranks from 1; equals have the mean of theirs."""
    _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    middle: NDArray[np.float64] = (last - (counts - 1) / 2)[where]
    return middle


def _interval(area: float, variance: float, probes: int) -> Auc:
    spread = NormalDist().inv_cdf((1 + LEVEL) / 2) * sqrt(variance)
    return Auc(area, max(area - spread, 0.0), min(area + spread, 1.0), probes)
