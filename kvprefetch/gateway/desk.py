"""The books of one engine: what its cache holds, what is foreseen, each preload and what became of it.

Told what happens, with the time; asked what to warm next. Used by the event loop's thread alone; nothing here blocks.
What it counts as tokens are blocks of canonical bytes (see `replica`), but for `computed_tokens`, which engines said.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvprefetch.cache.block import Block
from kvprefetch.cache.evict import Demand
from kvprefetch.cache.keys import BlockKey
from kvprefetch.cache.misses import explain
from kvprefetch.gateway.answers import Habit
from kvprefetch.gateway.contract import Draft
from kvprefetch.gateway.job import WarmJob
from kvprefetch.gateway.replica import BLOCK_BYTES, BLOCK_UNITS, Replica
from kvprefetch.outcomes import Outcome, Result
from kvprefetch.plan.foresight import NEXT_TURN, Foresight
from kvprefetch.plan.ledger import Ledger, Ticket
from kvprefetch.plan.library import PREDICTED
from kvprefetch.plan.planner import Decision
from kvprefetch.plan.preloads import Preloads
from kvprefetch.settings import SpeculationSettings

RETURN, OPENING = "return", "shared_opening"
"""Kinds of evidence: a session's context was evicted; many sessions begin alike."""
_TOLD = 64  # lost sessions that are proposed again at once
_ITS_OWN = (NEXT_TURN, RETURN, OPENING)  # what a session does by itself says when it comes


@dataclass(frozen=True)
class Found:
    """What a request's prompt is believed to have ready in the engine, in blocks."""

    blocks: int
    total: int
    preloaded: int  # of them, those that nobody had used before

    @property
    def how(self) -> str:
        """For the metrics."""
        return "preloaded" if self.preloaded else "cached" if self.blocks else "cold"


class Desk:
    """See the module's promises. `lost` is called with a session whose remembered context the engine has evicted."""

    def __init__(self, settings: SpeculationSettings, capacity_tokens: int | None, lost: Callable[[str], None]) -> None:
        self.settings, self._lost = settings, lost
        self.replica, self.ledger = Replica(capacity_tokens), Ledger()
        self.foresight: Foresight[WarmJob] = Foresight(self.replica, BLOCK_UNITS, settings, rules=False)
        self.preloads = Preloads(self.ledger, self.foresight, settings, BLOCK_UNITS)
        self.replica.on_evict = self._evicted
        self.answers = Habit()
        self._sessions_lost: dict[str, None] = {}
        self.computed_tokens = self.beaten = 0

    # -- live requests ---------------------------------------------------------------------------------
    def find(self, keys: Sequence[BlockKey]) -> Found:
        """What the engine has of a prompt. Changes nothing."""
        found = self.replica.match(keys)
        return Found(len(found), len(keys), sum(block.speculative for block in found))

    def requested(self, session: str, tenant: str, keys: Sequence[BlockKey], now: float) -> None:
        """A live request has come."""
        self.foresight.requested(session, tenant, keys, now)

    def served(
        self, session: str, tenant: str, keys: Sequence[BlockKey], found: Found, cached: float | None, now: float
    ) -> None:
        """It was answered. `found` when it came; `cached`: the share of its prompt that the engine says it had."""
        hits = found.blocks
        if cached is not None:
            said = round(cached * len(keys))
            if said < hits - 1:  # one block: theirs end elsewhere
                self.beaten += self.replica.correct(keys, said) > 0 and found.preloaded > 0
                hits = said
            elif said > hits + 1:
                self.replica.confirm(keys, said, Demand(tenant, speculative=False, now=now), session)
                hits = said
            elif hits:
                self.replica.agreed()
        hits = min(hits, len(self.replica.match(keys)))
        self.ledger.note_lookup(keys, explain(self.replica, keys, hits, BLOCK_UNITS), BLOCK_UNITS)
        first = [block for block in self.replica.match(keys[:hits]) if block.speculative]
        self.foresight.used(first)
        self.replica.use(keys, now, session)
        self.ledger.tokens_used += len(first) * BLOCK_UNITS

    def ended(self, session: str, tenant: str, kind: str, keys: Sequence[BlockKey], now: float) -> None:
        """Its answer is complete, or was cut off: the engine has what has these `keys`, prompt and perhaps answer."""
        self.replica.store(keys, Demand(tenant, speculative=False, now=now), session)
        self.replica.use(keys, now, session)
        self.foresight.turn_ended(session, tenant, kind, len(keys) * BLOCK_UNITS, keys, now)
        self._tell_lost()

    # -- preloads --------------------------------------------------------------------------------------
    def propose(
        self,
        draft: Draft,
        keys: Sequence[BlockKey],
        session: str,
        tenant: str,
        because: str,
        now: float,
        *,
        probability: float = 1.0,
        expected_in_s: float = 0.0,
        hold_s: float | None = None,
        named: str = "",
        resolved: Callable[[Result], None] = lambda result: None,
        settled: Callable[[Ticket], None] | None = None,
    ) -> WarmJob:
        """Open a ticket for a draft. It ends with an outcome, whatever happens; `settled` when it has its use."""
        ticket = self.ledger.issue(
            now,
            tenant=tenant,
            session=session,
            probability=probability,
            expected_in_s=expected_in_s,
            hold_s=self.settings.hold_s if hold_s is None else hold_s,
            because=because,
        )
        ticket.settled = settled
        job = WarmJob(
            ticket,
            draft,
            resolved,
            named=named,
            is_next_turn=because in _ITS_OWN,
            is_signalled=because.startswith("signal "),
            size=len(keys) * BLOCK_UNITS,
            keys=list(keys),
        )
        self.ledger.start(ticket, job.keys, len(self.replica.match(job.keys)))
        self.preloads.add(job, now)
        if not keys:
            result = Result(Outcome.ALREADY_WARM, 0, f"it is shorter than {BLOCK_BYTES} bytes: nothing would be gained")
            self.preloads.end(job, result, now)
        if job in self.preloads.jobs:
            self.foresight.offer(job, now)
        return job

    def next(self, now: float) -> tuple[WarmJob, Decision] | None:
        """What to warm now, if anything."""
        self.expire(now)
        return self.preloads.next(now)

    def expire(self, now: float) -> None:
        """End what has waited or was held for too long, whether or not the engine is there."""
        self.ledger.expire_holds(now)
        self.preloads.expire(now)

    def wakes_at(self) -> float:
        """When to ask again, if nothing happens before."""
        return min(self.foresight.planner.wakes_at, self.preloads.next_expiry)

    def warmed(self, job: WarmJob, share: float, computed: int, seconds: float, now: float) -> None:
        """A piece is done: this share of the job is warm now. `computed` tokens were new to the engine."""
        ready = len(self.replica.match(job.keys))
        end = min(int(share * len(job.keys) + 1e-6), len(job.keys))
        demand = Demand(job.ticket.tenant, speculative=computed > 0, now=now)  # else somebody else had it computed
        fresh: list[Block] = []
        if end > ready:
            until = now + job.ticket.hold_s
            fresh = self.replica.store(job.keys[:end], demand, job.ticket.session, job.ticket.because, until)
        job.blocks = len(self.replica.match(job.keys))
        self.computed_tokens += computed
        self.ledger.seconds += seconds
        if computed:
            job.has_computed = True
            self.ledger.tokens_computed += len(fresh) * BLOCK_UNITS
            self.foresight.computed(job, fresh, ready * BLOCK_UNITS, end * BLOCK_UNITS, seconds)
        self._tell_lost()

    def had(self, job: WarmJob, share: float) -> None:
        """The engine has only this share of what a job was believed to find."""
        self.replica.correct(job.keys, int(share * len(job.keys)))
        self._tell_lost()

    def finished(self, job: WarmJob, now: float, reason: str = "") -> None:
        """All of the job is warm."""
        if job.ticket.because == NEXT_TURN and job.is_sure:
            self.answers.looked(found=not job.computed)
        outcome, ready = Outcome.WARM if job.has_computed else Outcome.ALREADY_WARM, self.preloads.resident_tokens(job)
        if ready < job.size:
            outcome, reason = Outcome.CLIPPED, "the engine has no room for the rest"
        self.preloads.end(job, Result(outcome, ready, reason), now)

    def failed(self, job: WarmJob, reason: str, now: float) -> None:
        """It cannot be warmed; what is warm of it stays."""
        self.preloads.end(job, Result(Outcome.FAILED, self.preloads.resident_tokens(job), reason), now)

    def end_session(self, session: str, now: float) -> None:
        """No request of it will come: its preloads are withdrawn."""
        self.preloads.withdraw(lambda job: job.ticket.session == session, "the session ended", now)
        self.ledger.end_session(session)
        self.foresight.session_ended(session, now)

    def restarted(self) -> None:
        """The engine has lost all that it had."""
        for job in self.preloads.jobs:
            job.warm, job.is_sure, job.rendered, job.is_raised = 0, False, None, False
        self.replica.clear()
        self._tell_lost()

    def predicted(self, session: str, tenant: str, now: float) -> list[tuple[Draft, float]]:
        """What the session will probably use next beside its own context, and how likely; older ones are withdrawn."""
        self.preloads.withdraw(
            lambda job: job.ticket.because == PREDICTED and job.ticket.session == session, "newer predictions", now
        )
        return [(draft, said.probability) for draft, said in self.foresight.library.next(session, tenant, now)]

    # -- within ----------------------------------------------------------------------------------------
    def _evicted(self, block: Block, rule: str) -> None:
        self.ledger.note_evicted(block.key)
        if block.session:
            self._sessions_lost[block.session] = None

    def _tell_lost(self) -> None:
        lost, self._sessions_lost = list(self._sessions_lost), {}
        for session in lost[-_TOLD:]:  # whose contexts were used last: they are the likeliest to come back
            self._lost(session)
