"""kvprefetch's own policy of a navigation replay: the worker's predictor, planner and budget on the virtual clock."""

from dataclasses import dataclass, field
from zlib import crc32

from kvprefetch.cache.spans import Path, Span
from kvprefetch.plan.budget import Budget
from kvprefetch.plan.planner import Action, Candidate, Decision, Job, Planner
from kvprefetch.plan.rates import Rates
from kvprefetch.predict.outlook import Outlook
from kvprefetch.predict.trials import Trials
from kvprefetch.predict.which import Which
from kvprefetch.sim.navigators import HOLD_S, Navigator, key_of
from kvprefetch.sim.ours import NO_JOB
from kvprefetch.sim.visits import Opening, Visit
from kvprefetch.sim.worker import Preload, SimWorker

_OPENED, _NEXT = "opened", "next"
_APART = 1e-6 / 2**32  # no two candidates are worth exactly the same: the planner would never decide between them


@dataclass(slots=True)
class Wanted:
    """A file that may be asked about until `until`."""

    session: str
    tenant: str
    context: str
    kind: str  # the evidence
    claimed: float  # probability
    until: float
    key: str
    again: int = 3  # times that it is made ready anew when it was displaced; more would only displace each other


@dataclass
class Desk:
    """One way to make a file ready, and who pays for it."""

    planner: Planner
    decided: dict[str, Decision] = field(default_factory=dict)  # latest, by key
    payers: dict[str, tuple[str, str]] = field(default_factory=dict)  # account that paid for each key's latest work

    def spend(self, key: str, tokens: int) -> None:
        """The evidence that it was done on pays."""
        candidate = self.decided[key].candidate
        account = self.payers[key] = candidate.kind, candidate.tenant
        self.planner.budget.spend(account, tokens)

    def earn(self, key: str, tokens: int) -> None:
        """And earns, where it was used."""
        account = self.payers.get(key)
        if account:
            self.planner.budget.earn(account, tokens)


class Foresighted(Navigator):
    """Opened files and predicted ones, each as far as the record of its kind and its value bear it.

    A prediction holds until the session's next question, an opening until that question has come with 90 %
    probability. What is edited meanwhile is made ready anew.
    """

    CLAIM_OF_OPENED = 0.5  # before there is a record
    LEAST = 0.1  # probability of a prediction; below it hardly any would be affordable
    START = 100_000.0  # tokens that each kind of evidence may compute before there is a record

    def __init__(self, per_useful: float) -> None:
        super().__init__()
        self.which, self.trials, self.rates = Which(), Trials(), Rates()
        self.loads = Desk(Planner(self._load, Budget(per_useful)))
        self.prefills = Desk(Planner(self._prefill, Budget(per_useful, start=self.START)))
        self.wanted: dict[str, Wanted] = {}
        self.by_file: dict[tuple[str, str], set[str]] = {}  # keys of what is wanted
        self.predicted: dict[str, list[str]] = {}  # keys, by session

    def attach(self, worker: SimWorker) -> None:
        """Hear of evictions."""
        super().attach(worker)
        worker.gpu.on_evict = self._displaced

    def opened(self, opening: Opening) -> None:
        """It will probably be asked about."""
        o, now = opening, self.worker.clock.now
        self.which.signalled(o.session, o.tenant, o.user, _OPENED, o.context, now)
        self._want(o.session, o.tenant, o.context, _OPENED, self.CLAIM_OF_OPENED)
        self.worker.wake()

    def asked(self, visit: Visit) -> None:
        """Learn from it, and foresee the next one."""
        now, request, session = self.worker.clock.now, visit.request, visit.request.session
        self.which.used(session, request.tenant, visit.user, visit.context, visit.kind, now)
        key = key_of(session, visit.context)
        for kind in (_OPENED, _NEXT):
            self.trials.used(_trial(kind, key), 1.0, now)
        for old in (key, *self.predicted.pop(session, ())):
            if old == key or (old in self.wanted and self.wanted[old].kind == _NEXT):
                self._forget(old)
        self._edited(visit)
        for said in self.which.predictions(session, request.tenant, visit.user, now):
            if said.probability >= self.LEAST:
                self.predicted.setdefault(session, []).append(key_of(session, said.context))
                self._want(session, request.tenant, said.context, _NEXT, said.probability)
        self.worker.wake()

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
        self.loads.spend(preload.session, blocks * self.worker.machine.block_tokens)

    def prefilled(self, preload: Preload, blocks: int) -> None:
        """Its account pays."""
        self.prefills.spend(preload.session, blocks * self.worker.machine.block_tokens)

    def used(self, span: Span) -> None:
        """What was loaded was used: its account earns."""
        self.loads.earn(span.session, span.count * self.worker.machine.block_tokens)

    def computed_used(self, span: Span) -> None:
        """What was computed was used: its account earns."""
        self.prefills.earn(span.session, span.count * self.worker.machine.block_tokens)

    def failed(self, preload: Preload) -> None:
        """No room now."""
        now = self.worker.clock.now
        for desk in (self.loads, self.prefills):
            decision = desk.decided.get(preload.session)
            if decision is not None:
                desk.planner.sleep(decision.candidate, now, decision.value.hold_s / 4)

    # -- within ----------------------------------------------------------------------------------------
    def _want(self, session: str, tenant: str, context: str, kind: str, claimed: float) -> None:
        now, key = self.worker.clock.now, key_of(session, context)
        hold = min(self.which.gap_s(session, tenant, now)[2], HOLD_S)
        self.trials.propose(_trial(kind, key), kind, tenant, claimed, 0, now, now + hold)
        before = self.wanted.get(key)
        if before is not None and before.kind == _OPENED and kind == _NEXT and before.until > now:
            return  # that says more
        wanted = self.wanted[key] = Wanted(session, tenant, context, kind, claimed, now + hold, key)
        self.by_file.setdefault((tenant, context), set()).add(key)
        self._offer(key, wanted)

    def _offer(self, key: str, wanted: Wanted) -> None:
        here, there, blocks = self._where(wanted)
        for desk, missing in ((self.loads, there - here), (self.prefills, blocks - max(here, there))):
            if missing > 0:
                desk.planner.offer(key, wanted.tenant, wanted.kind, self.worker.clock.now)

    def _forget(self, key: str) -> None:
        wanted = self.wanted.pop(key, None)
        for desk in (self.loads, self.prefills):
            desk.planner.withdraw(key)
            desk.decided.pop(key, None)
        if wanted is not None:
            file = wanted.tenant, wanted.context
            self.by_file[file].discard(key)
            if not self.by_file[file]:
                del self.by_file[file]

    def _edited(self, visit: Visit) -> None:
        """Whoever else has the file open will ask about its new text."""
        if visit.after != visit.request.path:
            for key in sorted(self.by_file.get((visit.request.tenant, visit.context), ())):
                self._offer(key, self.wanted[key])

    def _displaced(self, span: Span, count: int) -> None:
        wanted = self.wanted.get(span.session) if span.speculative else None
        if wanted is not None and wanted.again > 0:
            wanted.again -= 1
            for desk in (self.loads, self.prefills):  # it is not gone yet: nothing would seem to be missing
                desk.planner.offer(span.session, wanted.tenant, wanted.kind, self.worker.clock.now)

    def _next(self, desk: Desk) -> Preload | None:
        decision = desk.planner.next(self.worker.clock.now)
        if decision is None:
            return None
        key = decision.candidate.session
        desk.decided[key] = decision
        wanted = self.wanted[key]
        path = self.library[wanted.tenant, wanted.context]
        return self._preload(key, wanted.tenant, path, decision.value.hold_s, decision.job.outlook.index)

    def _load(self, candidate: Candidate, now: float) -> Job:
        wanted = self._current(candidate, now)
        if wanted is None:
            return NO_JOB
        here, there, _ = self._where(wanted)
        tokens = max(there - here, 0) * self.worker.machine.block_tokens
        return self._job(wanted, Action.LOAD, tokens, self.rates.load_s(tokens), now)

    def _prefill(self, candidate: Candidate, now: float) -> Job:
        wanted = self._current(candidate, now)
        if wanted is None:
            return NO_JOB
        here, there, blocks = self._where(wanted)
        here = max(here, there)  # the link brings these
        block = self.worker.machine.block_tokens
        seconds = self.rates.prefill_s(here * block, blocks * block)
        return self._job(wanted, Action.PREFILL, (blocks - here) * block, seconds, now)

    def _current(self, candidate: Candidate, now: float) -> Wanted | None:
        """What the candidate stands for, unless nobody is to be expected to want it any more."""
        wanted = self.wanted.get(candidate.session)
        if wanted is not None and wanted.until <= now:
            self._forget(candidate.session)
            return None
        return wanted

    def _where(self, wanted: Wanted) -> tuple[int, int, int]:
        """Blocks of its text on the GPU, on the host, and in all."""
        path: Path = self.library.get((wanted.tenant, wanted.context), ())
        return self.worker.gpu.match(path), self.worker.host.match(path), sum(count for _, count in path)

    def _job(self, wanted: Wanted, action: Action, tokens: int, seconds: float | None, now: float) -> Job:
        if tokens <= 0:
            return NO_JOB
        share = self.trials.calibrated(wanted.kind, wanted.tenant, wanted.claimed, 0)
        hold, work = wanted.until - now, seconds or 0.0
        soon = self.which.use_within(wanted.session, wanted.tenant, now, work)
        outlook = Outlook(wanted.claimed, wanted.claimed * soon, hold, hold, share / max(hold, 1e-9))
        saved = work * (1 - _APART * crc32(wanted.key.encode()))
        return Job(action, tokens, work, saved, share / wanted.claimed, outlook, enough=seconds is not None)


def _trial(kind: str, key: str) -> str:
    """An opening and a prediction of the same file are judged apart."""
    return f"{kind}|{key}"
