"""The preloads that wait or are in work: each of them ends once, with an outcome (law 6).

Pure, and used by one thread alone. Bounded: `max_pending` of them wait, and `max_open` wait or are on hold, of which
each tenant may have its part whatever others have; where too many wait, one of the tenant with the most makes room, one
that is worth nothing if there is such. Raises nothing.
"""

from collections import Counter
from collections.abc import Callable
from math import inf
from typing import Generic

from kvprefetch.outcomes import Outcome, Result
from kvprefetch.plan.foresight import Foresight
from kvprefetch.plan.ledger import Ledger
from kvprefetch.plan.planner import Action, Decision
from kvprefetch.plan.preload import P
from kvprefetch.settings import SpeculationSettings


class Preloads(Generic[P]):
    """See the module's promises. `block_tokens` of the pool that they are for."""

    def __init__(
        self, ledger: Ledger, foresight: Foresight[P], settings: SpeculationSettings, block_tokens: int
    ) -> None:
        self.ledger, self.foresight, self.settings, self.block_tokens = ledger, foresight, settings, block_tokens
        self.jobs: list[P] = []
        self.next_expiry = inf
        self.changed: Callable[[], None] = lambda: None  # called where what was planned may hold no longer

    def add(self, job: P, now: float) -> None:
        """Queue a job, or reject it when too many wait. A session has one next turn: an older one is cancelled."""
        if job.is_next_turn:
            for old in [j for j in self.jobs if j.is_next_turn and j.ticket.session == job.ticket.session]:
                self.end(old, Result(Outcome.CANCELLED, 0, "a newer turn took its place"), now)
        self.jobs.append(job)
        self.changed()
        self.next_expiry = min(self.next_expiry, job.ticket.expires_at)
        spec, ledger, tenant = self.settings, self.ledger, job.ticket.tenant
        if len(self.jobs) > spec.max_pending:
            self._make_room(job, now)
        if ledger.open > spec.max_open and ledger.open_by[tenant] * len(ledger.open_by) > spec.max_open:
            self.end(job, Result(Outcome.REJECTED, 0, f"{spec.max_open} preloads are open already"), now)
        elif not spec.enabled:
            self.end(job, Result(Outcome.REJECTED, 0, "speculation is switched off"), now)

    def end(self, job: P, result: Result, now: float) -> None:
        """Resolve and forget a job; a job that is gone is left alone."""
        if job not in self.jobs:
            return
        self.jobs.remove(job)
        self.changed()
        self.foresight.drop(job, result.outcome)
        self.ledger.resolve(job.ticket, result, now, result.tokens // self.block_tokens)
        job.resolved(result)

    def withdraw(self, which: Callable[[P], bool], reason: str, now: float) -> None:
        """End those of a kind as CANCELLED."""
        for job in list(filter(which, self.jobs)):
            self.end(job, Result(Outcome.CANCELLED, 0, reason), now)

    def expire(self, now: float) -> None:
        """End the jobs whose time has passed, busy or not."""
        if now <= self.next_expiry:
            return
        for job in [j for j in self.jobs if j.ticket.expires_at < now]:
            self.end(job, Result(Outcome.EXPIRED, self.resident_tokens(job), self._why_expired(job)), now)
        self.next_expiry = min((job.ticket.expires_at for job in self.jobs), default=inf)

    def next(self, now: float) -> tuple[P, Decision] | None:
        """What the planner wants; what it finds to be there already is done."""
        chosen = self.foresight.next(now)
        while self.foresight.warm:
            job, action = self.foresight.warm.pop()
            if action is Action.HOLD:  # else its blocks stay as long as nobody needs their pages
                pool = self.foresight.pool
                pool.extend_hold(pool.match(job.keys), now + job.ticket.hold_s, job.ticket.tenant)
            outcome = Outcome.WARM if job.has_computed else Outcome.ALREADY_WARM
            self.end(job, Result(outcome, job.size), now)
        return chosen

    def resident_tokens(self, job: P) -> int:
        """So many of its tokens are there."""
        return len(self.foresight.pool.match(job.keys)) * self.block_tokens

    def _make_room(self, newest: P, now: float) -> None:
        """Where too many wait, one of the tenant who has the most goes: what is worth nothing, else its oldest."""
        waits = Counter(job.ticket.tenant for job in self.jobs)
        most = max(waits, key=lambda tenant: (waits[tenant], tenant == newest.ticket.tenant))
        name = self.foresight.planner.sleeper(most)
        reason = f"{self.settings.max_pending} preloads wait already"
        if name is not None:
            gone = self.foresight.jobs[name]
            reason = f"too many preloads wait; this was valued at {self.foresight.because(gone)}"
        elif most == newest.ticket.tenant:
            gone = newest
        else:
            gone = next(job for job in self.jobs if job.ticket.tenant == most)
        self.end(gone, Result(Outcome.REJECTED, self.resident_tokens(gone), reason), now)

    def _why_expired(self, job: P) -> str:
        because = self.foresight.because(job)
        return f"its time has passed; last valued at {because}" if because else "its time has passed"
