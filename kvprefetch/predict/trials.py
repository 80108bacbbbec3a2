"""What came of what was foreseen: claimed probabilities against the record, per kind of evidence.

A **trial** is opened when a context is proposed for preloading, whether or not anything is then done, and closes when
its session's next request comes or when it was foreseen to be there: the outcome is the share of the context that was
used. Contexts proposed are those that were displaced, and of these fewer come back than of all; the record of trials
knows that, a gap's hazard does not. What is learnt is the ratio of what came true to what was claimed, so that better
claims stay better within a cell. Explicit hints go the same way: what a caller states is one more thing to
calibrate. Memory: one open trial per session until it is due, and the cells of `Shares`.
"""

import heapq
from collections.abc import Hashable
from dataclasses import dataclass, field
from itertools import count
from math import isfinite

from kvprefetch.predict.rates import Shares

_STEPS = 6
_MOST = 65_536  # open trials; nothing is learnt from the oldest of more
_LEAST = 0.02  # claims below this are taken for it


@dataclass(slots=True, eq=False)
class Trial:
    """A proposal whose outcome is open."""

    session: str
    levels: tuple[Hashable, ...]
    claimed: float


@dataclass
class Trials:
    """See the module's promises."""

    ratios: Shares = field(default_factory=lambda: Shares(start=1.0))  # of what was used to what was claimed
    open: dict[str, Trial] = field(default_factory=dict)
    _due: list[tuple[float, int, Trial]] = field(default_factory=list)
    _order: "count[int]" = field(default_factory=count)

    def calibrated(self, kind: str, tenant: str, claimed: float, idle: int) -> float:
        """The share that will probably be used of what is proposed with these claims. NaN counts as the least claim."""
        claimed = _sound(claimed)
        return min(claimed * self.ratios.mean(_levels(kind, tenant, claimed, idle)), 1.0)

    def outcomes(self, kind: str) -> float:
        """How many uses were claimed, in all, by the trials of this kind that are remembered."""
        return self.ratios.outcomes(("use", kind))

    def ratio(self, kind: str) -> float:
        """What came true of what was claimed with this kind of evidence, over all; 1 before anything is known."""
        return self.ratios.mean((("use", kind),))

    def propose(
        self, session: str, kind: str, tenant: str, claimed: float, idle: int, now: float, until: float
    ) -> None:
        """Open a trial that closes at `until`; a session's older one is closed as not used."""
        before = self.open.pop(session, None)
        if before is not None:
            self._learn(before, 0.0)
        claimed = _sound(claimed)
        trial = self.open[session] = Trial(session, _levels(kind, tenant, claimed, idle), claimed)
        if len(self.open) > _MOST:
            del self.open[next(iter(self.open))]
        heapq.heappush(self._due, (until if until > now else now, next(self._order), trial))  # NaN: now
        if len(self._due) > 2 * len(self.open) + 64:  # most are closed
            self._due = [due for due in self._due if self.open.get(due[2].session) is due[2]]
            heapq.heapify(self._due)
        self.advance(now)

    def used(self, session: str, share: float, now: float) -> None:
        """The session's request has come, and begins with this share of its context. NaN counts as 0."""
        self.advance(now)
        trial = self.open.pop(session, None)
        if trial is not None:
            self._learn(trial, min(max(0.0, share), 1.0))

    def withdraw(self, session: str) -> None:
        """Its proposal was taken back: nothing is learnt from it."""
        self.open.pop(session, None)

    def resumed(self) -> None:
        """Another run goes on with what was learnt: no proposal is open."""
        self.open.clear()
        self._due.clear()

    def advance(self, now: float) -> None:
        """Close what is overdue."""
        while self._due and self._due[0][0] < now:
            _, _, trial = heapq.heappop(self._due)
            if self.open.get(trial.session) is trial:
                del self.open[trial.session]
                self._learn(trial, 0.0)

    def _learn(self, trial: Trial, share: float) -> None:
        self.ratios.learn(trial.levels, share / trial.claimed, trial.claimed)


def _sound(claimed: float) -> float:
    return min(max(claimed, _LEAST), 1.0) if isfinite(claimed) else _LEAST


def _levels(kind: str, tenant: str, claimed: float, idle: int) -> tuple[Hashable, ...]:
    step = min(int(claimed * _STEPS), _STEPS - 1)
    general = ("use", kind), ("use", kind, step), ("use", kind, idle), ("use", kind, step, idle)
    return (*general, ("use", kind, step, idle, tenant))
