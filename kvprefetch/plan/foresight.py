"""What a worker foresees: who comes back, what each preload is worth, which block is wanted least.

It is told what happens, and asked what to do next. Used by one thread alone. Nothing here blocks, and nothing is
raised. Times are of its caller's clock, in seconds. It rules the pool's evictions, unless an engine of its own does
(`rules` False): then the pool is what is believed of that engine's cache.
"""

import re
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from itertools import takewhile
from math import exp
from typing import Any, Generic

from kvprefetch.cache.block import Block
from kvprefetch.cache.evict import by_index
from kvprefetch.cache.guard import Guard, key_path
from kvprefetch.cache.keys import BlockKey
from kvprefetch.cache.orders import ByIndex
from kvprefetch.cache.pool import BlockPool
from kvprefetch.cache.shares import Shares
from kvprefetch.cache.spans import Span
from kvprefetch.errors import StateError
from kvprefetch.outcomes import Outcome
from kvprefetch.plan.budget import Budget
from kvprefetch.plan.library import Library
from kvprefetch.plan.meter import SpeculationMeters
from kvprefetch.plan.planner import Action, Candidate, Decision, Planner
from kvprefetch.plan.planner import Job as Work
from kvprefetch.plan.preload import P
from kvprefetch.plan.rates import Rates
from kvprefetch.plan.value import Load
from kvprefetch.predict.outlook import Outlook
from kvprefetch.predict.saved import dump, load
from kvprefetch.predict.sessions import Sessions
from kvprefetch.predict.trials import Trials
from kvprefetch.predict.which import Which
from kvprefetch.settings import SpeculationSettings

NEXT_TURN = "turn_finished"
"""The kind of evidence that a finished turn is."""
_UNMEASURED = 1e-3  # s per token, until the first forward was measured
_SOON_S = 10.0  # a context that is wanted at any moment is wanted in about so long
_ARRIVALS_S = 60.0  # over which live arrivals are counted
_LEFT = 1e-9  # index of a branch that its session has left
_GUARDED, _LONGEST_STRIDE = 1_024, 8  # blocks that the guard's shadows have at least, and what one stands for at most
_SESSIONS = 1_024  # whose latest prompt is remembered
_DOZE_S = 10.0  # prices and pools change faster than holds end
_AHEAD = 256  # tokens of a prefill that are weighed: those that come next
_PASSED, _NAMED = 0.5, 8  # what a newer signal leaves of an older one's claim, and how many are looked at
_CALL_CHARS, _NAME_CHARS = 8_000, 64  # of an answer's end, and of a tool's name
_NOTHING = Work(Action.NOTHING, 0, 0.0, 0.0, 0.0, Outlook(0.0, 0.0, 0.0, 0.0, 0.0))


class Foresight(Generic[P]):
    """See the module's promises."""

    def __init__(
        self,
        pool: BlockPool,
        block_tokens: int,
        settings: SpeculationSettings,
        *,
        rules: bool = True,
        page_bytes: int = 0,
    ) -> None:
        self.pool, self.block_tokens, self.rules = pool, block_tokens, rules
        self.sessions, self.trials, self.rates = Sessions(), Trials(), Rates()
        budget = Budget(settings.per_useful, settings.budget_tokens, 10 * settings.budget_tokens)
        self.planner = Planner(self._assess, budget, max_candidates=2 * settings.max_pending, longest_doze_s=_DOZE_S)
        self.meters = SpeculationMeters(page_bytes)
        self.step_s = settings.step_s
        self.library: Library[P] = Library(settings.max_named)
        self.guard = self._new_guard()
        self.jobs: dict[str, P] = {}
        self.warm: list[tuple[P, Action]] = []  # found to have all their blocks resident: hold them, or not
        self._named: OrderedDict[str, deque[int]] = OrderedDict()  # tickets of each session's latest signals
        self._prompts: OrderedDict[str, list[BlockKey]] = OrderedDict()  # of each session's latest request
        self._turns: dict[str, P] = {}  # proposed next turns, by session
        self._watched: dict[BlockKey, list[str]] = {}  # proposed contexts, by their last block
        self._arrivals, self._arrived_at = 0.0, 0.0

    # -- what happens ----------------------------------------------------------------------------------
    def offer(self, job: P, now: float) -> None:
        """Its context is rendered: it may be worked on from now on."""
        self.jobs[job.name] = job
        self.library.add(job)
        ticket = job.ticket
        if job.is_signalled and ticket.session:
            self._named.setdefault(ticket.session, deque(maxlen=_NAMED)).append(ticket.number)
            self._named.move_to_end(ticket.session)
            if len(self._named) > _SESSIONS:
                self._named.popitem(last=False)
        self.planner.offer(job.name, ticket.tenant, ticket.because, now, order=ticket.number)

    def drop(self, job: P, outcome: Outcome) -> None:
        """It is resolved. What came of its claim is still learnt, unless it was withdrawn before any work was done."""
        self.jobs.pop(job.name, None)
        self.planner.withdraw(job.name)
        if outcome in (Outcome.CANCELLED, Outcome.FAILED) and not job.has_computed:
            self.trials.withdraw(job.name)

    def requested(
        self, session: str, tenant: str, keys: Sequence[BlockKey], now: float, borrowed: Sequence[BlockKey] = ()
    ) -> None:
        """A live request has been admitted. `keys` of its blocks; `borrowed`: others' that it begins with."""
        self._arrivals = self._arrivals * exp(-max(now - self._arrived_at, 0.0) / _ARRIVALS_S) + 1
        self._arrived_at = now
        if self.pool.pages != self._guarded_pages:  # it was given another size
            self.guard = self._new_guard()
        if self.rules:
            self.guard.requested(key_path(keys, self._stride), tenant, session, now)
        self._judge(session, keys, now, borrowed)
        if not session:
            return
        self.library.used(session, tenant, keys, now)
        before = self._prompts.pop(session, None)
        kept = _common(before, keys) / len(before) if before else None
        self._prompts[session] = list(keys)
        if len(self._prompts) > _SESSIONS:
            self._prompts.popitem(last=False)
        self.sessions.requested(session, tenant, now, kept)

    def turn_ended(
        self, session: str, tenant: str, kind: str, tokens: int, keys: Sequence[BlockKey], now: float
    ) -> None:
        """Its answer is complete; `kind` says what it ended with: see `turn_kind`. `keys` of all its blocks."""
        if self.rules:
            self.guard.ended(key_path(keys, self._stride), tenant, session, now)
        if session:
            self.sessions.turn_ended(session, tenant, now, kind, tokens)

    def signalled(self, session: str, tenant: str, kind: str, about: str, now: float) -> None:
        """Something was observed in the session; `about` the name of a context, where it names one."""
        self.sessions.signalled(session, tenant, now, kind)
        self.library.signalled(session, tenant, kind, about, now)

    def session_ended(self, session: str, now: float) -> None:
        """No request of it will come."""
        self.sessions.ended(session, now)
        self._prompts.pop(session, None)

    def computed(self, job: P, blocks: Sequence[Block], start: int, end: int, seconds: float) -> None:
        """A speculative forward over positions `start`…`end` has published `blocks`."""
        self.rates.computed(start, end, seconds)
        for block in blocks:
            block.preloaded_for(job.ticket.session, job.ticket.because)
        self.planner.budget.spend((job.ticket.because, job.ticket.tenant), len(blocks) * self.block_tokens)
        self.worked(job, seconds)

    def worked(self, job: P, seconds: float) -> None:
        """The engine was at it for so long; its tenant pays for that, whatever came of it."""
        self.meters.computed(job.ticket.tenant, seconds)
        self.planner.charge(job.ticket.tenant, seconds)

    def loaded(self, job: P, blocks: Sequence[Block], seconds: float = 0.0) -> None:
        """A speculative load has published `blocks`, in so long. What it cost, the loader has told the rates."""
        for block in blocks:
            block.preloaded_for(job.ticket.session, job.ticket.because)
        self.planner.budget.spend((job.ticket.because, job.ticket.tenant), len(blocks) * self.block_tokens)
        self.meters.moved(job.ticket.tenant, len(blocks), seconds)
        self.planner.charge(job.ticket.tenant, seconds)

    def occupied(self, now: float) -> None:
        """Unused speculation has lain in the pool since this was called last; it may be called at any time.

        Where memory has a price, that is part of what its tenants have had: for what is held for a second, the price
        of it times the seconds that it saves.
        """
        meters, price = self.meters, self.planner.load.price
        seconds = meters.since_looked(now)
        pages = {tenant: kinds["speculative"] for tenant, kinds in self.pool.charges().items()}
        meters.resident(pages, now)
        saved_s = self.prefill_s(0, self.block_tokens)
        for tenant, count in pages.items():
            self.planner.charge(tenant, price * float(count) * saved_s * seconds)

    def set_shares(self, shares: Shares) -> None:
        """By which weights idle time is shared from now on."""
        self.planner.weights = {tenant: share.weight for tenant, share in shares.named.items()}

    def used(self, blocks: Sequence[Block]) -> None:
        """A live request is about to use these for the first time: what was preloaded earns for its evidence."""
        for block in blocks:
            if block.unused is not None:
                self.planner.budget.earn((block.unused.kind, block.tenant), self.block_tokens)

    # -- what is kept from run to run ------------------------------------------------------------------
    def saved(self) -> bytes:
        """What was learnt, for `restore`. Raises StateError."""
        return dump([self.sessions, self.trials, self.library.which])

    def restore(self, data: bytes) -> None:
        """Go on with what another run has learnt; its open gaps and proposals are forgotten. Raises StateError."""
        state = load(data, list)
        if [type(part) for part in state] != [Sessions, Trials, Which]:
            raise StateError("this is the state of something else")
        self.sessions, self.trials, self.library.which = state
        self.sessions.resumed()
        self.trials.resumed()

    # -- what to do ------------------------------------------------------------------------------------
    def next(self, now: float) -> tuple[P, Decision] | None:
        """The preload to work on, and why; None: nothing is worth it now. Those that need no work are in `warm`."""
        arrivals = self._arrivals * exp(-max(now - self._arrived_at, 0.0) / _ARRIVALS_S) / _ARRIVALS_S
        self.planner.load = Load(arrivals, self.step_s, self._price(now))
        decision = self.planner.next(now)
        return (self.jobs[decision.candidate.session], decision) if decision else None

    def because(self, job: P) -> str:
        """The planner's latest word on it."""
        return self.planner.because(job.name)

    def stats(self, now: float) -> dict[str, Any]:
        """By kind of evidence: tokens that it may still speculate on, and its claims against what came true."""
        budget: dict[str, float] = {}
        for account in list(self.planner.budget.credit):
            kind = str(account[0]) if isinstance(account, tuple) else ""
            budget[kind] = budget.get(kind, 0.0) + self.planner.budget.left(account, now)
        return {
            kind: {
                "budget_tokens": left,
                "came_true_of_claimed": self.trials.ratio(kind),
                "outcomes": self.trials.outcomes(kind),
            }
            for kind, left in sorted(budget.items())
        }

    def prefill_s(self, start: int, end: int) -> float:
        """Seconds to compute positions `start`…`end`: measured, or as if a token took a millisecond."""
        measured = self.rates.prefill_s(start, end)
        return (end - start) * _UNMEASURED if measured is None else measured

    def index(self, block: Block | Span, now: float) -> float:
        """How well it pays to hold the block, per second."""
        if isinstance(block, Block) and block.unused is not None:
            return block.unused.fading * max(block.unused.hold_until - now, 0.0)
        if self.sessions.is_current(block.session, block.last_used):
            return self.sessions.index(block.session, now)
        if self.sessions.is_quiet(block.session):
            return _LEFT / (1 + max(now - block.last_used, 0.0))
        return self.sessions.unknown_index(now - block.last_used)

    # -- within ----------------------------------------------------------------------------------------
    def _judge(self, session: str, keys: Sequence[BlockKey], now: float, borrowed: Sequence[BlockKey]) -> None:
        """Which proposals has this request proved right?"""
        turn = self._turns.pop(session, None)
        if turn is not None:
            self.trials.used(turn.name, _common(turn.own_keys, keys) / len(turn.own_keys), now)
        for key in (*keys, *borrowed):
            for name in self._watched.pop(key, ()):
                self.trials.used(name, 1.0, now)
        if len(self._watched) > 2 * len(self.trials.open) + 64:  # what nobody used in time
            alive = {key: [n for n in names if n in self.trials.open] for key, names in self._watched.items()}
            self._watched = {key: names for key, names in alive.items() if names}
        if len(self._turns) > 2 * len(self.trials.open) + 64:
            self._turns = {name: job for name, job in self._turns.items() if job.name in self.trials.open}

    def _new_guard(self) -> Guard:
        pages = self._guarded_pages = self.pool.pages
        self._stride = min(max(pages // _GUARDED, 1), _LONGEST_STRIDE)
        guard = Guard(max(pages // self._stride, 1), by_index(self.index))
        if self.rules:
            self.pool.order = ByIndex(self.index, guard)
        return guard

    def _price(self, now: float) -> float:
        """The index of the marginal block: nothing while pages are free, else of the leaf longest unheld."""
        if self.pool.free_pages:
            return 0.0
        leaf = next(iter(self.pool.leaves.values()), None)
        return self.index(leaf, now) if leaf else 0.0

    def _assess(self, candidate: Candidate, now: float) -> Work:
        job = self.jobs.get(candidate.session)
        if job is None:
            return _NOTHING
        ready = len(self.pool.match(job.keys)) * self.block_tokens
        tokens = job.size - ready
        if tokens <= 0:
            outlook, claimed = self._outlook(job, now, 0.0)
            pays = claimed / max(outlook.hold_s, 1e-9) >= self.planner.load.price
            self.warm.append((job, Action.HOLD if pays else Action.RELEASE))
            return _NOTHING
        action, work = self._work(job, ready, job.size)
        # finished blocks count, so what matters is whether the next of them are ready in time
        outlook, claimed = self._outlook(job, now, work * min(_AHEAD / tokens, 1.0))
        share = self._calibrated(candidate, job, claimed, now)
        hold = max(outlook.hold_s, 1e-9)
        outlook = Outlook(outlook.within, outlook.before_ready, outlook.residency, hold, share / hold)
        return Work(action, tokens, work, work, share / max(outlook.within, 1e-9), outlook)

    def _work(self, job: P, ready: int, total: int) -> tuple[Action, float]:
        """What to do next for a context of which `ready` tokens are there, and the seconds that all of it takes.

        What the arena holds is loaded where that is faster than computing it; so a request would do, too.
        """
        held = min(job.elsewhere * self.block_tokens, total)
        if held > ready:
            load, compute = self.rates.load_s(held - ready), self.rates.prefill_s(ready, held)
            if load is None or compute is None or load <= compute:
                moving = (held - ready) * _UNMEASURED if load is None else load
                return Action.LOAD, moving + self.prefill_s(held, total)
        return Action.PREFILL, self.prefill_s(ready, total)

    def _outlook(self, job: P, now: float, work_s: float) -> tuple[Outlook, float]:
        """When the context is used, and the share of it that will probably be."""
        ticket = job.ticket
        if job.is_next_turn:
            outlook = self.sessions.outlook(ticket.session, now, work_s, ticket.hold_s)
            return outlook, outlook.within * self.sessions.kept(ticket.session, now)
        expected = max(ticket.expected_at - now, _SOON_S)
        early = min(work_s / (2 * expected), 1.0)
        hold = max(ticket.hold_s, 1e-9)
        claimed = ticket.probability * _PASSED ** self._newer(job)
        return Outlook(1.0, early, min(expected, hold), hold, 0.0), claimed

    def _newer(self, job: P) -> int:
        """How many contexts its session's signals have named since."""
        named = self._named.get(job.ticket.session, ())
        return sum(number > job.ticket.number for number in named) if job.is_signalled else 0

    def _calibrated(self, candidate: Candidate, job: P, claimed: float, now: float) -> float:
        if claimed <= 0:
            return 0.0
        ticket, idle = job.ticket, self.sessions.idle(job.ticket.session, now)
        if not candidate.proposed:
            candidate.proposed = True
            until = ticket.expires_at
            self.trials.propose(job.name, ticket.because, ticket.tenant, claimed, idle, now, until)
            if job.is_next_turn:
                self._turns[ticket.session] = job
            else:
                self._watched.setdefault(job.own_keys[-1], []).append(job.name)
        return self.trials.calibrated(ticket.because, ticket.tenant, claimed, idle)


def turn_kind(reason: str, text: str, tools: Sequence[Mapping[str, Any]]) -> str:
    """What an answer ended with: "tool NAME" where it calls one of the request's tools, else the finish reason.

    The templates in use write a call as JSON with the tool's name in it.
    """
    end = text[-_CALL_CHARS:]
    for tool in tools:
        function = tool.get("function", tool)
        name = function.get("name") if isinstance(function, Mapping) else None
        if isinstance(name, str) and name and re.search(rf'"name"\s*:\s*"{re.escape(name)}"', end):
            return f"tool {name[:_NAME_CHARS]}"
    return reason


def _common(one: Sequence[BlockKey], other: Sequence[BlockKey]) -> int:
    """Length of the common prefix."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
