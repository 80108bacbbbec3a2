"""Where the next request of a session will land: P(worker | tenant, session), learnt from where it went. Pure.

Promises
- A session sticks by default: what it did last weighs most, what it did long ago fades. Of a session that nobody has
  seen, the workers' recent traffic is all that is known.
- Probabilities of the workers asked about sum to 1. A worker that left counts for nothing.
- `likely` says how often such a prediction came true of late, not what the counts claim: where requests are routed at
  random, no session is thought to stick.
- Bounded: the `sessions` seen last, with at most `_PLACES` workers each. No clock: times in seconds are arguments.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

_PLACES = 8  # workers remembered for a session
_FADE = 0.7  # what a session's visit weighs after its next one
_PRIOR = 0.5  # visits that the recent traffic of all counts for
_TRAFFIC_S = 300.0  # half-life of a worker's traffic
_BINS = 10  # of predictions, by their probability
_CLAIM = 4.0  # outcomes that a prediction's own claim counts for
_RECORD = 0.98  # what an outcome weighs after the next one of its bin


@dataclass(frozen=True, slots=True)
class Likely:
    """The worker that a session is expected at, and how surely."""

    worker: bytes
    probability: float


@dataclass(slots=True)
class _Traffic:
    """Requests of late, halving every `_TRAFFIC_S`."""

    count: float = 0.0
    at: float = 0.0

    def at_time(self, now: float) -> float:
        return self.count * math.exp2(-max(now - self.at, 0.0) / _TRAFFIC_S)

    def add(self, now: float) -> None:
        self.count, self.at = self.at_time(now) + 1.0, now


@dataclass(slots=True)
class _Record:
    """How often predictions of about the same probability came true, of late."""

    hits: float = 0.0
    tries: float = 0.0

    def add(self, is_hit: bool) -> None:
        self.hits, self.tries = self.hits * _RECORD + is_hit, self.tries * _RECORD + 1.0

    def correct(self, claim: float) -> float:
        return (self.hits + _CLAIM * claim) / (self.tries + _CLAIM)


@dataclass
class Placement:
    """See the module's promises. Workers are named by their instances."""

    sessions: int = 65_536
    _seen: OrderedDict[tuple[str, str], dict[bytes, float]] = field(default_factory=OrderedDict)
    _traffic: dict[bytes, _Traffic] = field(default_factory=dict)
    _records: list[_Record] = field(default_factory=lambda: [_Record() for _ in range(_BINS)])

    def __len__(self) -> int:
        return len(self._seen)

    def served(self, tenant: str, session: str, worker: bytes, now: float) -> None:
        """A live request was served there; `session` is "" if unknown."""
        if session and (tenant, session) in self._seen and len(self._traffic) > 1:
            best, claim = self._best(tenant, session, list(self._traffic), now)
            self._record(claim).add(best == worker)
        self._traffic.setdefault(worker, _Traffic()).add(now)
        if not session:
            return
        visits = self._seen.setdefault((tenant, session), {})
        self._seen.move_to_end((tenant, session))
        for place in visits:
            visits[place] *= _FADE
        visits[worker] = visits.get(worker, 0.0) + 1.0
        if len(visits) > _PLACES:
            del visits[min(visits, key=lambda place: visits[place])]
        if len(self._seen) > self.sessions:
            self._seen.popitem(last=False)

    def left(self, worker: bytes) -> None:
        """That worker is gone: what was learnt of it goes with it."""
        self._traffic.pop(worker, None)
        empty = [name for name, visits in self._seen.items() if visits.pop(worker, None) and not visits]
        for name in empty:
            del self._seen[name]

    def ended(self, tenant: str, session: str) -> None:
        """The session is over."""
        self._seen.pop((tenant, session), None)

    def probabilities(self, tenant: str, session: str, workers: Sequence[bytes], now: float) -> dict[bytes, float]:
        """P(worker | session) among `workers`, which are all that the next request may come to."""
        visits = self._seen.get((tenant, session), {})
        traffic = {worker: self._traffic.get(worker, _Traffic()).at_time(now) + 1.0 for worker in workers}
        total = sum(traffic.values())
        weights = {worker: visits.get(worker, 0.0) + _PRIOR * traffic[worker] / total for worker in workers}
        whole = sum(weights.values())
        return {worker: weight / whole for worker, weight in weights.items()}

    def likely(self, tenant: str, session: str, workers: Sequence[bytes], now: float) -> Likely | None:
        """The most likely of `workers`; the first of equals; None: there are none."""
        if not workers:
            return None
        best, claim = self._best(tenant, session, workers, now)
        if len(workers) == 1 or (tenant, session) not in self._seen:
            return Likely(best, claim)
        return Likely(best, self._record(claim).correct(claim))

    # -- within ----------------------------------------------------------------------------------------
    def _best(self, tenant: str, session: str, workers: Sequence[bytes], now: float) -> tuple[bytes, float]:
        chances = self.probabilities(tenant, session, workers, now)
        best = max(workers, key=lambda worker: chances[worker])
        return best, chances[best]

    def _record(self, claim: float) -> _Record:
        return self._records[min(int(claim * _BINS), _BINS - 1)]
