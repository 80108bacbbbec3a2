"""kvprefetch's own policies, replayed: the worker's predictor, planner and eviction index on the virtual clock."""

from collections import OrderedDict
from math import inf

from kvprefetch.cache.evict import by_index
from kvprefetch.cache.guard import Guard, guarded
from kvprefetch.cache.spans import Span, SpanPolicy
from kvprefetch.plan.budget import Budget
from kvprefetch.plan.planner import Action, Candidate, Decision, Job, Planner
from kvprefetch.plan.rates import Rates
from kvprefetch.predict.outlook import Outlook
from kvprefetch.predict.sessions import Sessions
from kvprefetch.predict.trials import Trials
from kvprefetch.sim.baselines import Reactive
from kvprefetch.sim.trace import Request, shared_blocks
from kvprefetch.sim.worker import Live, Preload, SimWorker


class ByIndex(Reactive):
    """Reactive, with the GPU's victims chosen by the index (DESIGN §7.3), under guard (§7.4)."""

    guard: Guard

    def __init__(self) -> None:
        self.sessions = Sessions()
        self.latest: OrderedDict[str, Request] = OrderedDict()  # of each session that the predictor may know
        self._worth: dict[str, tuple[float, float]] = {}  # by session: since when, its index; holds for one moment
        self._worth_at = 0.0

    def attach(self, worker: SimWorker) -> None:
        """Know the pool."""
        super().attach(worker)
        index: SpanPolicy = by_index(self._index)
        self.guard = Guard(worker.gpu.capacity, index)
        worker.gpu.policy = guarded(index, self.guard)

    def arrived(self, live: Live) -> None:
        """Its gap has ended."""
        request, before = live.request, self.latest.get(live.request.session)
        self.guard.requested(request.path, request.tenant, request.session, self.worker.clock.now)
        kept = shared_blocks(before.path, request.path) / max(before.blocks, 1) if before else None
        self.sessions.requested(request.session, request.tenant, self.worker.clock.now, kept)
        self._worth.clear()
        self.latest[request.session] = request
        self.latest.move_to_end(request.session)
        if len(self.latest) > self.sessions.max_sessions:
            self.forget(self.latest.popitem(last=False)[0])

    def forget(self, session: str) -> None:
        """It has been silent for longer than all others that there is room for."""

    def ended(self, live: Live) -> None:
        """Its next gap begins."""
        request = live.request
        self.guard.ended(request.path, request.tenant, request.session, self.worker.clock.now)
        self.sessions.turn_ended(request.session, request.tenant, self.worker.clock.now, request.stop, request.tokens)
        self._worth.clear()

    def _index(self, span: Span, now: float) -> float:
        """What is not its session's latest turn goes first, by age. Pools ask at the same moment about the same."""
        if now != self._worth_at:
            self._worth.clear()
            self._worth_at = now
        worth = self._worth.get(span.session)
        if worth is None:
            quiet = self.sessions.known.get(span.session)
            if quiet is None or quiet.turn is None:
                worth = inf, 0.0
            else:
                worth = quiet.turn_at, self.sessions.index(span.session, now)
            self._worth[span.session] = worth
        return worth[1] if span.last_used >= worth[0] else 1e-9 / (1 + now - span.last_used)


class Planned(ByIndex):
    """And contexts are brought back where the planner finds that it pays."""

    def __init__(self, per_useful: float, infers: bool) -> None:
        super().__init__()
        self.infers = infers  # acts without explicit signals, too
        self.rates = Rates()
        self.trials = Trials()
        self.planner = Planner(self._assess, Budget(per_useful))
        self.accounts: dict[str, tuple[str, str]] = {}  # of each session's latest preload
        self.decision: Decision | None = None
        self.brought: set[str] = set()

    def attach(self, worker: SimWorker) -> None:
        """Hear of evictions and first uses."""
        super().attach(worker)
        worker.gpu.on_evict = self._displaced

    def arrived(self, live: Live) -> None:
        """Nothing to plan for a session that is here."""
        request, before = live.request, self.latest.get(live.request.session)
        if before is not None:
            kept = shared_blocks(before.path, request.path)
            if request.session in self.brought:
                kept = min(kept, live.gpu_blocks)
            self.trials.used(request.session, kept / max(before.blocks, 1), self.worker.clock.now)
            self.brought.discard(request.session)
        super().arrived(live)
        self.planner.withdraw(request.session)

    def forget(self, session: str) -> None:
        """Nothing of it is kept."""
        self.planner.withdraw(session)
        self.accounts.pop(session, None)
        self.brought.discard(session)

    def signalled(self, request: Request) -> None:
        """The predictor learns of it, the planner weighs it."""
        now = self.worker.clock.now
        self.sessions.signalled(request.session, request.tenant, now, "signal")
        self._worth.clear()
        self.planner.offer(request.session, request.tenant, "signal", now)
        self.worker.serve_link()

    def loaded(self, tokens: int, seconds: float) -> None:
        """Learn how fast the link is."""
        self.rates.loaded(tokens, seconds)

    def computed(self, start: int, end: int, seconds: float) -> None:
        """Learn how fast the GPU is."""
        self.rates.computed(start, end, seconds)

    def used(self, span: Span) -> None:
        """Speculation was used: its account earns."""
        tokens = span.count * self.worker.machine.block_tokens
        account = self.accounts.get(span.session)
        if account:
            self.planner.budget.earn(account, tokens)

    def next_preload(self) -> Preload | None:
        """The planner's choice."""
        now = self.worker.clock.now
        self.decision = decision = self.planner.next(now)
        if decision is None:
            return None
        candidate, request = decision.candidate, self.latest[decision.candidate.session]
        until = now + decision.value.hold_s
        return Preload(
            candidate.session, candidate.tenant, request.path, request.blocks, until, decision.job.outlook.index
        )

    def moved(self, preload: Preload, blocks: int) -> None:
        """Its account pays."""
        assert self.decision is not None
        account = (self.decision.candidate.kind, self.decision.candidate.tenant)
        self.accounts[preload.session] = account
        self.brought.add(preload.session)
        self.planner.budget.spend(account, blocks * self.worker.machine.block_tokens)

    def failed(self, preload: Preload) -> None:
        """No room among what is worth less."""
        assert self.decision is not None
        self.planner.sleep(self.decision.candidate, self.worker.clock.now, self.decision.value.hold_s / 4)

    def _displaced(self, span: Span, count: int) -> None:
        now = self.worker.clock.now
        if not self.sessions.is_current(span.session, span.last_used):
            return
        if self.infers or self.planner.knows(span.session):
            self.planner.offer(span.session, span.tenant, "return", now)

    def _assess(self, candidate: Candidate, now: float) -> Job:
        worker, request = self.worker, self.latest.get(candidate.session)
        if request is None or not self.sessions.is_quiet(candidate.session):
            return NO_JOB
        block = worker.machine.block_tokens
        here, there = worker.gpu.match(request.path), worker.host.match(request.path)
        tokens = (there - here) * block
        work = self.rates.load_s(tokens)
        if work is None:
            work = worker.machine.load_s(max(there - here, 0))
        kept = self.sessions.kept(candidate.session, now)
        outlook = self.sessions.outlook(candidate.session, now, work)
        if tokens > 0:
            claimed, idle = outlook.within * kept, self.sessions.idle(candidate.session, now)
            if not candidate.proposed:
                candidate.proposed = True
                until = now + outlook.hold_s
                self.trials.propose(candidate.session, candidate.kind, candidate.tenant, claimed, idle, now, until)
            kept = self.trials.calibrated(candidate.kind, candidate.tenant, claimed, idle) / max(outlook.within, 1e-9)
        return Job(
            action=Action.LOAD,
            tokens=tokens,
            work_s=work,
            saved_s=work,
            kept=kept,
            outlook=outlook,
            enough=candidate.kind != "return" or self.sessions.outcomes(candidate.session) >= 3,
        )


NO_JOB = Job(Action.NOTHING, 0, 0.0, 0.0, 0.0, Outlook(0.0, 0.0, 0.0, 0.0, 0.0))
