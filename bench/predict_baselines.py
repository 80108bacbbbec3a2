"""The baselines of `bench/predict.py`: simple rankers, each tuned on what comes before the evaluated part.

Every ranker's probabilities are calibrated online by rank: the share of predictions at that rank that came true.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable
from typing import Protocol

from kvprefetch.sim.events import Event

LISTED = 5
GROWTHS = (1.0, 1.02, 1.05, 1.1, 1.2, 1.3, 1.5)


class Ranker(Protocol):
    """Ranks what a session may use next."""

    def rank(self, event: Event) -> list[str]:
        """Up to LISTED contexts; of `event` only its session, user and tenant may be looked at."""

    def learn(self, event: Event) -> None:
        """It was used."""


SCOPES: dict[str, Callable[[Event], Hashable]] = {
    "session": lambda e: (e.tenant, e.session),
    "user": lambda e: (e.tenant, e.user),
    "tenant": lambda e: e.tenant,
}


class Faded:
    """Counts whose unit grows by `growth` with every use: 1 is frequency, much more is recency, between is a blend."""

    def __init__(self, scope: str, growth: float) -> None:
        self.scope, self.growth = SCOPES[scope], growth
        self.counts: dict[Hashable, dict[str, float]] = defaultdict(dict)
        self.unit: dict[Hashable, float] = defaultdict(lambda: 1.0)

    def rank(self, event: Event) -> list[str]:
        """The heaviest."""
        counts = self.counts[self.scope(event)]
        return sorted(counts, key=counts.__getitem__, reverse=True)[:LISTED]

    def learn(self, event: Event) -> None:
        """One more."""
        assert event.context is not None
        key = self.scope(event)
        counts = self.counts[key]
        self.unit[key] *= self.growth
        counts[event.context] = counts.get(event.context, 0.0) + self.unit[key]
        if self.unit[key] > 1e100:
            self.counts[key] = {name: count * 1e-100 for name, count in counts.items()}
            self.unit[key] *= 1e-100


class Ppm:
    """Transitions of orders `order`…`lowest`; the longest known history speaks first (Cleary & Witten 1984)."""

    def __init__(self, order: int, lowest: int, scope: str = "tenant") -> None:
        self.order, self.lowest, self.scope = order, lowest, SCOPES[scope]
        self.counts: dict[Hashable, Counter[str]] = defaultdict(Counter)
        self.trails: dict[Hashable, list[str]] = defaultdict(list)

    def _histories(self, event: Event) -> list[tuple[Hashable, ...]]:
        trail = self.trails[SCOPES["session"](event)][-self.order :]
        lengths = range(len(trail), self.lowest - 1, -1)
        return [(self.scope(event), *trail[len(trail) - n :]) for n in lengths]

    def rank(self, event: Event) -> list[str]:
        """What followed the longest history most often, then the shorter ones."""
        found: dict[str, None] = {}
        for history in self._histories(event):
            if history in self.counts:
                found.update(dict.fromkeys(name for name, _ in self.counts[history].most_common(LISTED)))
            if len(found) >= LISTED:
                break
        return list(found)[:LISTED]

    def learn(self, event: Event) -> None:
        """It followed."""
        assert event.context is not None
        for history in self._histories(event):
            self.counts[history][event.context] += 1
        trail = self.trails[SCOPES["session"](event)]
        trail.append(event.context)
        del trail[: -self.order - 1]


FAMILIES: dict[str, dict[str, Callable[[], Ranker]]] = {
    "recency": {scope: lambda scope=scope: Faded(scope, 2.0) for scope in SCOPES},  # type: ignore[misc]
    "frequency": {scope: lambda scope=scope: Faded(scope, 1.0) for scope in ("session", "user")},  # type: ignore[misc]
    "popularity": {"tenant": lambda: Faded("tenant", 1.0)},
    "recency-frequency": {
        f"{scope} {growth}": lambda scope=scope, growth=growth: Faded(scope, growth)  # type: ignore[misc]
        for scope in SCOPES
        for growth in GROWTHS
    },
    "markov": {scope: lambda scope=scope: Ppm(1, 1, scope) for scope in ("user", "tenant")},  # type: ignore[misc]
    "ppm": {
        f"{scope} {order}": lambda scope=scope, order=order: Ppm(order, 0, scope)  # type: ignore[misc]
        for scope in ("user", "tenant")
        for order in (1, 2, 3, 4)
    },
}
"""Makers by family and setting."""


class Calibrated:
    """A ranker whose ranks carry the probability that came true so far."""

    def __init__(self, ranker: Ranker) -> None:
        self.ranker = ranker
        self.hits = [0.5] * LISTED
        self.said = [5.0] * LISTED

    def predict(self, event: Event) -> list[tuple[str, float]]:
        """(context, probability), the likeliest first."""
        return [(name, self.hits[r] / self.said[r]) for r, name in enumerate(self.ranker.rank(event))]

    def learn(self, event: Event, said: list[tuple[str, float]]) -> None:
        """It was used, where this had been said."""
        for r, (name, _) in enumerate(said):
            self.said[r] += 1
            self.hits[r] += name == event.context
        self.ranker.learn(event)
