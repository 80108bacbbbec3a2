"""What to preload next: of the tenant that had least speculation the candidate of the best value, within its budget.

Idle time is shared by weight among those who have something worth doing, with virtual-time counters as in
`kvprefetch.plan.counters`; who claims more, or says it more often, gets no more of it.

Promises
- Pure: told what happened, with the time; the caller does the work. Owns its candidates, at most `max_candidates` of
  them (the one offered longest ago is dropped), one per session: a newer one replaces it.
- `next` is O(log n) per candidate that it looks at, and looks at each only when something about it may have changed:
  when it was offered, or when it has slept for a while that grows with how long its session is idle. It looks at a
  bounded number in one call; where the values of many have fallen at once, it takes the best of those.
- Tenants who have had equally much, or within `lead_s` of the least, go by value; so all do where nothing is charged.
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
from kvprefetch.plan.counters import Counters
from kvprefetch.plan.value import Load, Value, value_of
from kvprefetch.predict.outlook import Outlook

_WOKEN, _LOOKED_AT = 256, 64
"""Candidates (and tenants) that one call looks at: planning is a step like others, and a live request waits for it."""


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


Entry = tuple[float, int, int, Candidate]
"""Of a line: by −V per second of work, then the newest."""


@dataclass(slots=True, eq=False)
class _Line:
    """One tenant's candidates that are worth something."""

    tenant: str
    entries: list[Entry] = field(default_factory=list)  # heap
    number: int = 0  # of its entry among the tenants


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
    lead_s: float = 0.0  # of speculative service, by weight
    counters: Counters = field(default_factory=Counters)
    _known: OrderedDict[str, Candidate] = field(default_factory=OrderedDict)
    _awake: dict[str, _Line] = field(default_factory=dict)  # by tenant
    _entries: int = 0  # of all lines
    _tenants: list[tuple[float, int, str]] = field(default_factory=list)  # heap by level; put right when looked at
    _asleep: list[tuple[float, int, Candidate]] = field(default_factory=list)  # by when to look again
    _numbers: "count[int]" = field(default_factory=count)

    def __post_init__(self) -> None:
        self.counters.weight = lambda tenant: self.weights.get(tenant, 1.0)

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
        self._sweep_asleep()
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
            self._sweep_asleep()

    def charge(self, tenant: str, seconds: float) -> None:
        """Speculation for it took so long."""
        self.counters.charge(tenant, seconds)

    def sleeper(self, tenant: str) -> str | None:
        """The session of its candidate that was offered longest ago of those that sleep. O(candidates)."""
        of_it = (session for session, known in self._known.items() if known.sleeps and known.tenant == tenant)
        return next(of_it, None)

    @property
    def wakes_at(self) -> float:
        """When a candidate that sleeps is to be looked at again; inf: none."""
        return self._asleep[0][0] if self._asleep else inf

    def next(self, now: float) -> Decision | None:
        """The best thing to do now, or None; unchanged until something happens, so it may be asked again."""
        self._sweep()
        woken = 0
        while self._asleep and self._asleep[0][0] <= now and woken < _WOKEN:
            _, number, candidate = heapq.heappop(self._asleep)
            if self._is_live(candidate, number):
                self._rank(candidate, now)
                woken += 1
        looks = _LOOKED_AT
        while looks > 0 and (near := self._near()):
            decision, looks = self._best(near, looks, now)
            if decision is not None:
                return decision
        return None

    # -- within ----------------------------------------------------------------------------------------
    def _best(self, near: list[_Line], looks: int, now: float) -> tuple[Decision | None, int]:
        """The best of these lines, after so many looks at most; and how many are left."""
        heads: list[tuple[Entry, _Line]] = [(line.entries[0], line) for line in near]
        heapq.heapify(heads)
        best: tuple[float, int, Decision] | None = None
        while heads and looks > 0:
            looks -= 1
            _, line = heapq.heappop(heads)
            _, _, number, candidate = heapq.heappop(line.entries)
            self._entries -= 1
            decision = self._rank(candidate, now) if self._is_live(candidate, number) else None
            if line.entries:
                heapq.heappush(heads, (line.entries[0], line))
            else:
                self._close(line)
            if decision is None:
                continue
            if heads[0][0][3] is candidate:
                return decision, looks
            worth = decision.value.total / max(decision.job.work_s, 1e-9), candidate.offered, decision
            best = worth if best is None or worth[:2] > best[:2] else best
        return best[2] if best else None, looks

    def _near(self) -> list[_Line]:
        """Lines of the tenants that have had least, or little more."""
        near: list[tuple[float, int, str]] = []
        while self._tenants and len(near) < _LOOKED_AT:
            noted, number, tenant = self._tenants[0]
            line, level = self._awake.get(tenant), self.counters.level(tenant)
            if line is None or line.number != number:
                heapq.heappop(self._tenants)
            elif level > noted:
                heapq.heapreplace(self._tenants, (level, number, tenant))
            elif near and level > near[0][0] + self.lead_s:
                break
            else:
                near.append(heapq.heappop(self._tenants))
        for entry in near:
            heapq.heappush(self._tenants, entry)
        return [self._awake[tenant] for _, _, tenant in near]

    def _push(self, candidate: Candidate, worth: float) -> None:
        line = self._awake.get(candidate.tenant)
        if line is None:
            line = self._awake[candidate.tenant] = _Line(candidate.tenant, number=next(self._numbers))
            self.counters.enter(candidate.tenant)
            heapq.heappush(self._tenants, (self.counters.level(candidate.tenant), line.number, candidate.tenant))
        heapq.heappush(line.entries, (-worth, -candidate.offered, candidate.number, candidate))
        self._entries += 1

    def _close(self, line: _Line) -> None:
        """There is nothing left in it."""
        del self._awake[line.tenant]
        self.counters.leave(line.tenant)

    def _sweep(self) -> None:
        """Entries of candidates that are gone must not pile up."""
        if self._entries > 2 * len(self._known) + 64:
            for line in list(self._awake.values()):
                line.entries = [entry for entry in line.entries if self._is_live(entry[3], entry[2])]
                heapq.heapify(line.entries)
                if not line.entries:
                    self._close(line)
            self._entries = sum(len(line.entries) for line in self._awake.values())
        if len(self._tenants) > 2 * len(self._awake) + 64:
            self._tenants = [(self.counters.level(name), line.number, name) for name, line in self._awake.items()]
            heapq.heapify(self._tenants)

    def _sweep_asleep(self) -> None:
        if len(self._asleep) > 2 * len(self._known) + 64:
            self._asleep = [entry for entry in self._asleep if self._is_live(entry[2], entry[1])]
            heapq.heapify(self._asleep)

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
        self._push(candidate, value.total / max(job.work_s, 1e-9))
        return Decision(candidate, job, value)
