"""Experts' opinions made one: a softmax over candidates whose weights are learnt online.

Each candidate is a set of named opinions with a strength; its score is Σ weight · strength, and the candidates compete
with "none of these", which has opinions of its own. After the outcome every weight moves along the gradient of the
log likelihood, each with its own step (AdaGrad: Duchi, Hazan & Singer 2011). A log-linear mixture lets experts that
say the same thing share one weight's worth of evidence instead of counting it twice.

A **gate** is a circumstance with weights of its own that are added to the common ones: the kind of the latest event,
say, or the session. They start at nothing, so what is new is treated as what is common.
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from math import exp, sqrt
from operator import add

Opinions = list[tuple[int, float]]
"""(which, how strongly)."""
_RATE = 0.05
_LEAST = 4e-3  # errors below this teach nothing
_CAUTION = 4.0  # a gate's first steps are half as long as the common ones


class Weights:
    """Weights of all opinions, and each one's sum of squared slopes. About 3 KB."""

    __slots__ = ("squares", "values")

    def __init__(self, values: Sequence[float], squares: float) -> None:
        self.values = list(values)
        self.squares = [squares] * len(self.values)

    def step(self, gradient: Sequence[tuple[int, float, float]]) -> None:
        """One step uphill: (which, _RATE · slope, slope²)."""
        values, squares = self.values, self.squares
        for which, stride, square in gradient:
            squares[which] = total = squares[which] + square
            values[which] += stride / sqrt(total)


class Mixture:
    """Common weights and those of at most `max_gates` gates, of which the longest unused is forgotten."""

    def __init__(self, start: Sequence[float], max_gates: int = 512) -> None:
        self.common = Weights(start, 1.0)
        self.gates: OrderedDict[Hashable, Weights] = OrderedDict()
        self.max_gates = max_gates

    def weights(self, gates: Sequence[Hashable]) -> list[float]:
        """What opinions are worth in these circumstances."""
        total = self.common.values
        for gate in gates:
            own = self.gates.get(gate)
            if own is not None:
                total = list(map(add, total, own.values))
        return list(total)

    def learn(
        self, candidates: Sequence[Opinions], shares: Sequence[float], outcome: int, gates: Sequence[Hashable]
    ) -> None:
        """`candidates`, the last of which is none of them, had these probabilities; `outcome` came true."""
        slopes = [0.0] * len(self.common.values)
        for i, share in enumerate(shares):
            error = (i == outcome) - share
            if -_LEAST < error < _LEAST:
                continue
            for which, strength in candidates[i]:
                slopes[which] += error * strength
        gradient = [(which, _RATE * slope, slope * slope) for which, slope in enumerate(slopes) if slope]
        self.common.step(gradient)
        for gate in gates:
            own = self.gates.get(gate)
            if own is None:
                own = self.gates[gate] = Weights([0.0] * len(self.common.values), _CAUTION)
                if len(self.gates) > self.max_gates:
                    self.gates.popitem(last=False)
            self.gates.move_to_end(gate)
            own.step(gradient)


def softmax(candidates: Sequence[Opinions], weights: Sequence[float]) -> list[float]:
    """The candidates' probabilities; they sum to 1."""
    scores = []
    for opinions in candidates:
        score = 0.0
        for which, strength in opinions:
            score += weights[which] * strength
        scores.append(score)
    top = max(scores)
    exps = [exp(score - top) for score in scores]
    total = sum(exps)
    return [e / total for e in exps]
