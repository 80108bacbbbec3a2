"""How good predictions were: hits, log loss, calibration and skill."""

from collections import defaultdict
from dataclasses import dataclass, field
from math import log

_BINS = 15
_UNKNOWN = 1e-4  # of what was left for all that was not listed: the share of the one that came


@dataclass
class Score:
    """Of one predictor, over the evaluated events."""

    events: int = 0
    hit1: int = 0
    hit5: int = 0
    loss: float = 0.0
    listed: list[tuple[float, bool, str, int]] = field(default_factory=list)  # probability, came true, kind, rank

    def add(self, said: list[tuple[str, float]], came: str | None, kind: str) -> None:
        """`said`: (context, probability), the likeliest first; the first five count as listed."""
        names = [name for name, _ in said[:5]]
        self.events += 1
        self.hit1 += came in names[:1]
        self.hit5 += came in names
        left = max(1 - sum(share for _, share in said), 1e-3)
        self.loss -= log(max(dict(said).get(came or "", left * _UNKNOWN), 1e-9))
        self.listed += [(share, name == came, kind, rank) for rank, (name, share) in enumerate(said[:5])]

    def figures(self) -> dict[str, float]:
        """Shares of the events, nats, and calibration of all listed predictions."""
        n = max(self.events, 1)
        return {
            "hit1": self.hit1 / n,
            "hit5": self.hit5 / n,
            "log_loss": self.loss / n,
            "ece": _ece(self.listed),
            "brier_skill": _skill(self.listed),
            "brier_skill_first": _skill([x for x in self.listed if x[3] == 0]),
        }


def _ece(listed: list[tuple[float, bool, str, int]]) -> float:
    """Expected calibration error over bins of equal size (Naeini, Cooper & Hauskrecht 2015)."""
    ordered, error = sorted(listed), 0.0
    for k in range(_BINS):
        part = ordered[k * len(ordered) // _BINS : (k + 1) * len(ordered) // _BINS]
        if part:
            error += abs(sum(x[0] for x in part) - sum(x[1] for x in part))
    return error / max(len(ordered), 1)


def _skill(listed: list[tuple[float, bool, str, int]]) -> float:
    """1 − Brier score ÷ that of always saying the share that came true for this kind."""
    true: dict[str, list[bool]] = defaultdict(list)
    for _, came, kind, _ in listed:
        true[kind].append(came)
    base = {kind: sum(outcomes) / len(outcomes) for kind, outcomes in true.items()}
    ours = sum((share - came) ** 2 for share, came, _, _ in listed)
    constant = sum((base[kind] - came) ** 2 for _, came, kind, _ in listed)
    return 1 - ours / constant if constant else 0.0
