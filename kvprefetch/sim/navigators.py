"""Policies of a navigation replay: what is computed before it is asked about."""

from collections import Counter
from dataclasses import dataclass

from kvprefetch.cache.spans import Path, Span
from kvprefetch.plan.budget import Budget
from kvprefetch.plan.planner import Action, Candidate, Decision, Job, Planner
from kvprefetch.plan.rates import Rates
from kvprefetch.predict.outlook import Outlook
from kvprefetch.predict.trials import Trials
from kvprefetch.predict.which import Which
from kvprefetch.sim.baselines import Reactive
from kvprefetch.sim.ours import NO_JOB
from kvprefetch.sim.prefilling import PrefillingWorker
from kvprefetch.sim.visits import Opening, Visit
from kvprefetch.sim.worker import Preload

HOLD_S = 600.0
"""How long policies without judgement hold what they computed."""


class Navigator(Reactive):
    """Reactive: computes and loads what a question needs when it comes. The texts of today's files are at hand."""

    worker: PrefillingWorker

    def __init__(self) -> None:
        self.library: dict[tuple[str, str], Path] = {}

    def opened(self, opening: Opening) -> None:
        """A signal."""

    def asked(self, visit: Visit) -> None:
        """A question about a file has come."""

    def foreseen(self, visit: Visit) -> None:
        """For policies that know the future."""

    def next_prefill(self) -> Preload | None:
        """See `PrefillStrategy`."""
        return None

    def prefilled(self, preload: Preload, blocks: int) -> None:
        """See `PrefillStrategy`."""

    def computed_used(self, span: Span) -> None:
        """See `PrefillStrategy`."""

    def _preload(self, key: str, tenant: str, path: Path, hold_s: float, worth: float = float("inf")) -> Preload:
        blocks = sum(count for _, count in path)
        return Preload(key, tenant, path, blocks, self.worker.clock.now + hold_s, worth)


class InTurn(Navigator):
    """What is told is loaded or computed in that order, at once. A key told again is told anew, in its old place."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: dict[str, Preload] = {}

    def tell(self, key: str, tenant: str, path: Path) -> None:
        """Compute this, too."""
        self.queue[key] = self._preload(key, tenant, path, HOLD_S)
        self.worker.wake()

    def next_preload(self) -> Preload | None:
        """What the host has of the first one."""
        worker, first = self.worker, next(iter(self.queue.values()), None)
        if first and worker.host.match(first.path) > worker.gpu.match(first.path):
            return first
        return None

    def next_prefill(self) -> Preload | None:
        """The first one, once the host has no more of it."""
        return next(iter(self.queue.values()), None) if self.next_preload() is None else None

    def failed(self, preload: Preload) -> None:
        """Done, or no room."""
        if self.queue.get(preload.session) is preload:
            del self.queue[preload.session]


class Popularity(InTurn):
    """After a question, the tenant's most popular files are brought to the GPU: each text once in its hold."""

    COUNT = 5

    def __init__(self) -> None:
        super().__init__()
        self.visits: dict[str, Counter[str]] = {}
        self.told: dict[tuple[str, str], tuple[Path, float]] = {}  # the latest text of each, and when

    def asked(self, visit: Visit) -> None:
        """One more for this file."""
        tenant, now = visit.request.tenant, self.worker.clock.now
        counts = self.visits.setdefault(tenant, Counter())
        counts[visit.context] += 1
        for context, _ in counts.most_common(self.COUNT):
            key, path = (tenant, context), self.library.get((tenant, context), ())
            before, at = self.told.get(key, ((), now))
            if path and (path != before or now - at >= HOLD_S):
                self.told[key] = path, now
                self.tell(f"{tenant}|{context}", tenant, path)


class Oracle(InTurn):
    """Knows what will be asked about."""

    def foreseen(self, visit: Visit) -> None:
        """It is computed now."""
        self.tell(_key(visit.request.session, visit.context), visit.request.tenant, visit.request.path)


@dataclass(slots=True)
class Wanted:
    """A file that may be asked about."""

    session: str
    tenant: str
    context: str
    claimed: float  # probability


class Foresighted(Navigator):
    """kvprefetch: opened files and predicted ones, each as far as the record of its kind and its value bear it."""

    CLAIM_OF_OPENED = 0.5  # before there is a record
    LEAST = 0.03

    def __init__(self, per_useful: float) -> None:
        super().__init__()
        self.which, self.trials, self.rates = Which(), Trials(), Rates()
        self.loads = Planner(self._load, Budget(per_useful))
        self.prefills = Planner(self._prefill, Budget(per_useful))
        self.wanted: dict[str, Wanted] = {}
        self.accounts: dict[str, tuple[Planner, tuple[str, str]]] = {}  # that paid for each key's latest work
        self.decisions: dict[str, tuple[Planner, Decision]] = {}

    def opened(self, opening: Opening) -> None:
        """It will probably be asked about."""
        o, now = opening, self.worker.clock.now
        self.which.signalled(o.session, o.tenant, o.user, "opened", o.context, now)
        self._want(Wanted(o.session, o.tenant, o.context, self.CLAIM_OF_OPENED), "opened", now)
        self.worker.wake()

    def asked(self, visit: Visit) -> None:
        """Learn from it, and foresee the next one."""
        now, request = self.worker.clock.now, visit.request
        key = _key(request.session, visit.context)
        self.which.used(request.session, request.tenant, visit.user, visit.context, visit.kind, now)
        self.trials.used(key, 1.0, now)
        self.wanted.pop(key, None)
        for planner in (self.loads, self.prefills):
            planner.withdraw(key)
        for said in self.which.predictions(request.session, request.tenant, visit.user, now):
            if said.probability >= self.LEAST:
                self._want(Wanted(request.session, request.tenant, said.context, said.probability), "next", now)
        self.worker.wake()

    def _want(self, wanted: Wanted, kind: str, now: float) -> None:
        key = _key(wanted.session, wanted.context)
        self.wanted[key] = wanted
        until = now + self._hold_s(wanted, now)
        self.trials.propose(key, kind, wanted.tenant, wanted.claimed, 0, now, until)
        for planner in (self.loads, self.prefills):
            planner.offer(key, wanted.tenant, kind, now)

    def loaded(self, tokens: int, seconds: float) -> None:
        """Learn how fast the link is."""
        self.rates.loaded(tokens, seconds)

    def computed(self, start: int, end: int, seconds: float) -> None:
        """Learn how fast the GPU is."""
        self.rates.computed(start, end, seconds)

    def next_preload(self) -> Preload | None:
        """The best thing to load."""
        return self._next(self.loads)

    def next_prefill(self) -> Preload | None:
        """The best thing to compute."""
        return self._next(self.prefills)

    def moved(self, preload: Preload, blocks: int) -> None:
        """Its account pays."""
        self._spend(preload, blocks)

    def prefilled(self, preload: Preload, blocks: int) -> None:
        """Its account pays."""
        self._spend(preload, blocks)

    def used(self, span: Span) -> None:
        """What was loaded was used: its account earns."""
        self._earn(self.loads, span)

    def computed_used(self, span: Span) -> None:
        """What was computed was used: its account earns."""
        self._earn(self.prefills, span)

    def failed(self, preload: Preload) -> None:
        """No room now."""
        planner, decision = self.decisions[preload.session]
        planner.sleep(decision.candidate, self.worker.clock.now, decision.value.hold_s / 4)

    # -- within ----------------------------------------------------------------------------------------
    def _earn(self, planner: Planner, span: Span) -> None:
        by, account = self.accounts.get(span.session, (None, None))
        if by is planner:
            planner.budget.earn(account, span.count * self.worker.machine.block_tokens)

    def _spend(self, preload: Preload, blocks: int) -> None:
        planner, decision = self.decisions[preload.session]
        account = decision.candidate.kind, decision.candidate.tenant
        planner.budget.spend(account, blocks * self.worker.machine.block_tokens)
        self.accounts[preload.session] = planner, account

    def _next(self, planner: Planner) -> Preload | None:
        decision = planner.next(self.worker.clock.now)
        if decision is None:
            return None
        key = decision.candidate.session
        self.decisions[key] = planner, decision
        wanted = self.wanted[key]
        path = self.library[wanted.tenant, wanted.context]
        return self._preload(key, wanted.tenant, path, decision.value.hold_s, decision.job.outlook.index)

    def _load(self, candidate: Candidate, now: float) -> Job:
        here, there, _ = self._where(candidate)
        tokens = (there - here) * self.worker.machine.block_tokens
        return self._job(candidate, Action.LOAD, tokens, self.rates.load_s(max(tokens, 0)), now)

    def _prefill(self, candidate: Candidate, now: float) -> Job:
        here, there, blocks = self._where(candidate)
        if there > here:
            here = there  # the link brings these
        block = self.worker.machine.block_tokens
        seconds = self.rates.prefill_s(here * block, blocks * block)
        return self._job(candidate, Action.PREFILL, (blocks - here) * block, seconds, now)

    def _where(self, candidate: Candidate) -> tuple[int, int, int]:
        """Blocks of its text on the GPU, on the host, and in all."""
        wanted = self.wanted.get(candidate.session)
        path = self.library.get((wanted.tenant, wanted.context), ()) if wanted else ()
        blocks = sum(count for _, count in path)
        return self.worker.gpu.match(path), self.worker.host.match(path), blocks

    def _job(self, candidate: Candidate, action: Action, tokens: int, seconds: float | None, now: float) -> Job:
        wanted = self.wanted.get(candidate.session)
        if wanted is None or tokens <= 0:
            return NO_JOB
        share = self.trials.calibrated(candidate.kind, wanted.tenant, wanted.claimed, 0)
        hold, work = self._hold_s(wanted, now), seconds or 0.0
        soon = self.which.use_within(wanted.session, wanted.tenant, now, work)
        outlook = Outlook(wanted.claimed, wanted.claimed * soon, hold, hold, share / max(hold, 1e-9))
        return Job(action, tokens, work, work, share / wanted.claimed, outlook, enough=seconds is not None)

    def _hold_s(self, wanted: Wanted, now: float) -> float:
        """Until the session's next use has come with 90 % probability."""
        return min(self.which.gap_s(wanted.session, wanted.tenant, now)[2], HOLD_S)


def _key(session: str, context: str) -> str:
    return f"{session}|{context}"
