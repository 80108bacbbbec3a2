"""What to preload next: every candidate's value, the best first, within its budget.

Promises
- Pure: told what happened, with the time; the caller does the work. Owns its candidates, at most `max_candidates` of
  them (the one offered longest ago is dropped), one per session: a newer one replaces it.
- `next` is O(log n) per candidate that it looks at, and looks at each only when something about it may have changed:
  when it was offered, or when it has slept for a while that grows with how long its session is idle. It looks at a
  bounded number in one call; where the values of many have fallen at once, it takes the best of those.
- What became worthless is dropped to sleep, what is in progress is asked about again after each chunk, and a better
  candidate goes ahead of it then. Raises nothing.
"""

import heapq
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from itertools import count
from math import inf

from kvprefetch.plan.budget import Budget
from kvprefetch.plan.value import Load, Value, value_of
from kvprefetch.predict.outlook import Outlook

_WOKEN, _LOOKED_AT = 256, 64
"""Candidates that one call looks at, at most: planning is a step like others, and a live request waits for it."""


class Action(Enum):
    """What can be done for a context."""

    LOAD = "load"
    PREFILL = "prefill"
    HOLD = "hold"
    RELEASE = "release"
    NOTHING = "nothing"


@dataclass(slots=True, eq=False)
class Candidate:
    """A context that might be wanted."""

    session: str
    tenant: str
    kind: str  # the evidence: a signal's name, "hint", or "return" where nothing but its record speaks for it
    number: int = 0
    offered: int = 0  # among equals the newest goes first: it says most about what comes next
    proposed: bool = False  # the predictor keeps the record of what it proposed
    sleeps: bool = False  # it was not worth anything, or more than its budget
    because: str = ""  # the last decision about it


@dataclass(frozen=True, slots=True)
class Job:
    """What acting on a candidate would mean now. Costs from measured rates; seconds."""

    action: Action
    tokens: int  # that would be moved or computed
    work_s: float
    saved_s: float  # TTFT that all of it saves
    kept: float  # the share of them that the next request will probably begin with
    outlook: Outlook
    enough: bool = True  # evidence to act on at all


@dataclass(frozen=True, slots=True)
class Decision:
    """Do this next."""

    candidate: Candidate
    job: Job
    value: Value

    @property
    def because(self) -> str:
        """Which evidence, which action, and the terms of its value."""
        return f"{self.candidate.kind}: {self.job.action.value} {self.job.tokens} tokens, {self.value.because}"


@dataclass
class Planner:
    """See the module's promises."""

    assess: Callable[[Candidate, float], Job]
    budget: Budget = field(default_factory=Budget)
    load: Load = field(default_factory=Load)
    weights: dict[str, float] = field(default_factory=dict)  # w by tenant, 1 where unsaid
    max_candidates: int = 100_000
    doze_s: float = 1.0
    longest_doze_s: float = inf  # what is worthless now is looked at again at least so often
    _known: OrderedDict[str, Candidate] = field(default_factory=OrderedDict)
    _awake: list[tuple[float, int, int, Candidate]] = field(default_factory=list)  # by −V per second of work
    _asleep: list[tuple[float, int, Candidate]] = field(default_factory=list)  # by when to look again
    _numbers: "count[int]" = field(default_factory=count)

    def offer(self, session: str, tenant: str, kind: str, now: float, order: int | None = None) -> None:
        """There is new evidence that the session's context may be wanted, or it is not resident any more.

        Of equal candidates the one of the highest `order` goes first; by default the one offered last.
        """
        if kind == "return" and session in self._known:
            kind = self._known[session].kind  # what is known of it says more
        number = next(self._numbers)
        candidate = Candidate(session, tenant, kind, number, number if order is None else order)
        self._known[session] = candidate
        self._known.move_to_end(session)
        if len(self._known) > self.max_candidates:
            self._known.popitem(last=False)
        heapq.heappush(self._asleep, (now, candidate.number, candidate))
        self._sweep()

    def knows(self, session: str) -> bool:
        """Whether it is a candidate already."""
        return session in self._known

    def because(self, session: str) -> str:
        """The latest decision about a candidate; "" if there is none."""
        candidate = self._known.get(session)
        return candidate.because if candidate else ""

    def withdraw(self, session: str) -> None:
        """Its request has come, or it is over."""
        self._known.pop(session, None)

    def sleep(self, candidate: Candidate, now: float, seconds: float = 0.0) -> None:
        """Nothing can be done about it now; look again later."""
        if self._known.get(candidate.session) is candidate:
            candidate.number, candidate.sleeps = next(self._numbers), True
            pause = max(min(seconds, self.longest_doze_s), self.doze_s)
            heapq.heappush(self._asleep, (now + pause, candidate.number, candidate))
            self._sweep()

    def sleeper(self) -> str | None:
        """The session of the candidate that was offered longest ago of those that sleep. O(candidates)."""
        return next((session for session, candidate in self._known.items() if candidate.sleeps), None)

    @property
    def wakes_at(self) -> float:
        """When a candidate that sleeps is to be looked at again; inf: none."""
        return self._asleep[0][0] if self._asleep else inf

    def next(self, now: float) -> Decision | None:
        """The best thing to do now, or None; unchanged until something happens, so it may be asked again."""
        woken = 0
        while self._asleep and self._asleep[0][0] <= now and woken < _WOKEN:
            _, number, candidate = heapq.heappop(self._asleep)
            if self._is_live(candidate, number):
                self._rank(candidate, now)
                woken += 1
        best: tuple[float, int, Decision] | None = None
        for _ in range(_LOOKED_AT):
            if not self._awake:
                break
            _, _, number, candidate = heapq.heappop(self._awake)
            if not self._is_live(candidate, number):
                continue
            decision = self._rank(candidate, now)
            if decision is None:
                continue
            if self._awake[0][3] is candidate:
                return decision
            worth = decision.value.total / max(decision.job.work_s, 1e-9), candidate.offered, decision
            best = worth if best is None or worth[:2] > best[:2] else best
        return best[2] if best else None

    def _sweep(self) -> None:
        """Entries of candidates that are gone must not pile up."""
        if len(self._asleep) > 2 * len(self._known) + 64:
            self._asleep = [entry for entry in self._asleep if self._is_live(entry[2], entry[1])]
            heapq.heapify(self._asleep)
        if len(self._awake) > 2 * len(self._known) + 64:
            self._awake = [entry for entry in self._awake if self._is_live(entry[3], entry[2])]
            heapq.heapify(self._awake)

    def _is_live(self, candidate: Candidate, number: int) -> bool:
        return candidate.number == number and self._known.get(candidate.session) is candidate

    def _rank(self, candidate: Candidate, now: float) -> Decision | None:
        """Value it, and put it where it belongs."""
        job = self.assess(candidate, now)
        value = value_of(
            job.outlook, job.saved_s, job.work_s, job.kept, self.weights.get(candidate.tenant, 1.0), self.load
        )
        candidate.because = value.because
        if job.tokens <= 0:
            self.withdraw(candidate.session)
            return None
        account = (candidate.kind, candidate.tenant)
        affordable = self.budget.allows(account, job.tokens, value.probability * job.kept, now)
        if value.total <= 0 or not affordable or not job.enough:
            self.sleep(candidate, now, job.outlook.hold_s / 4)
            return None
        candidate.number, candidate.sleeps = next(self._numbers), False
        worth = -value.total / max(job.work_s, 1e-9)
        heapq.heappush(self._awake, (worth, -candidate.offered, candidate.number, candidate))
        return Decision(candidate, job, value)
