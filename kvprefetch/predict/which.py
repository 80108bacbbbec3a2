"""Which context comes next in a session: experts, a mixture learnt online, and claims calibrated by what came true.

Promises
- Pure and online: no training step; every use is first predicted, then learnt from. An event costs O(opinions).
- What is learnt about contexts, users and sessions stays with their tenant (`predict/memory.py`). Tenants share what
  experts are worth and how far claims can be believed: numbers, never names.
- Bounded: `max_tenants` tenants, the longest quiet forgotten first, each as bounded as `Tenant` says; and 3 MB of what
  is shared. Asking changes nothing.
- Events may be late or come twice; times that are not numbers count as the latest known, and so do earlier ones, up to
  an hour: beyond that the clock was set back, and its time holds. Raises nothing.
- A context whose name has more than 512 characters is neither remembered nor predicted; its use still counts as one.
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from math import inf

from kvprefetch.predict import experts
from kvprefetch.predict.gaps import Cell, GapModel, bin_of
from kvprefetch.predict.memory import Session, Tenant
from kvprefetch.predict.mixture import Mixture, Opinions, softmax
from kvprefetch.predict.names import LONGEST, short
from kvprefetch.predict.rates import Shares

_STEPS = 6  # stretches of claimed probability that are calibrated apart
_LISTED = 5  # of each prediction that are held against what came
_SET_BACK_S = 3600.0  # an event that is older by more tells that the clock was set back
_LEAST = 1e-6  # claims below this teach nothing


@dataclass(slots=True)
class Prediction:
    """A context that may be the session's next."""

    context: str
    probability: float  # that the next use in the session is of this one
    gap_s: tuple[float, float, float]  # p10, p50, p90 of the time until that use; inf: perhaps never
    outcomes: float  # how many outcomes of such claims stand behind it
    _opinions: Opinions = field(default_factory=list, repr=False, compare=False)
    _weights: Sequence[float] = field(default=(), repr=False, compare=False)

    @property
    def because(self) -> str:
        """The three opinions that weighed most. Made when asked for: this takes longer than all the rest."""
        terms: dict[str, float] = {}
        for which, strength in self._opinions:
            name = experts.NAMES[which]
            terms[name] = terms.get(name, 0.0) + self._weights[which] * strength
        return ", ".join(
            f"{name} {terms[name]:+.1f}" for name in sorted(terms, key=terms.__getitem__, reverse=True)[:3]
        )


@dataclass(slots=True)
class _Guess:
    """Predicted for one moment of a session."""

    contexts: list[str]
    opinions: list[Opinions]  # of each context, and last of none of them
    shares: list[float]
    top: list[int]  # the likeliest first
    weights: list[float]
    gates: tuple[Hashable, ...]


@dataclass
class Which:
    """See the module's promises."""

    max_tenants: int = 256
    max_contexts: int = 20_000  # per tenant
    mixture: Mixture = field(default_factory=lambda: Mixture(experts.START))
    truth: Shares = field(default_factory=lambda: Shares(start=1.0, prior=8.0))  # of what came true to what was claimed
    gaps: GapModel = field(default_factory=GapModel)
    tenants: OrderedDict[str, Tenant] = field(default_factory=OrderedDict)
    now: float = 0.0
    _latest: "tuple[tuple[str, str, str], Session, _Guess] | None" = None  # asked for last; good until an event

    def signalled(self, session: str, tenant: str, user: str, kind: str, about: str, now: float) -> None:
        """Something was observed in the session: a tool call, a message, a document opened; `about` what."""
        memory = self._tenant(short(tenant))
        memory.observed(memory.session(short(session), short(user)), short(kind), about, self._time(now))
        self._latest = None

    def used(self, session: str, tenant: str, user: str, context: str, kind: str, now: float) -> None:
        """The session uses `context`: hold it against what was to be expected, and remember it."""
        session, tenant, user, kind, now = short(session), short(tenant), short(user), short(kind), self._time(now)
        known, guess = self._guess(session, tenant, user)
        outcome = guess.contexts.index(context) if context in guess.contexts else len(guess.contexts)
        self.mixture.learn(guess.opinions, guess.shares, outcome, guess.gates)
        for i in guess.top[:_LISTED]:
            claimed = max(guess.shares[i], _LEAST)
            self.truth.learn(_levels(claimed, known.kind, tenant), (i == outcome) / claimed, claimed)
        memory = self._tenant(tenant)
        known = memory.session(session, user)
        if known.at:
            self._gap_ended(known, max(now - known.at, 0.0))
        memory.used(known, context if len(context) <= LONGEST else "", kind, now)
        self._latest = None

    def predictions(self, session: str, tenant: str, user: str, now: float, limit: int = _LISTED) -> list[Prediction]:
        """The most likely next contexts, the likeliest first; a new session has its user's and tenant's habits."""
        session, tenant, user = short(session), short(tenant), short(user)
        known, guess = self._guess(session, tenant, user)
        return self._say(tenant, known, guess, limit, self._sound(now))

    def gap_s(self, session: str, tenant: str, now: float) -> tuple[float, float, float]:
        """p10, p50, p90 of the time until the session's next use; inf: perhaps never."""
        known = self._known(session, tenant)
        return self._quantiles(known, max(self._sound(now) - known.at, 0.0)) if known else (inf, inf, inf)

    def use_within(self, session: str, tenant: str, now: float, seconds: float) -> float:
        """P(the session's next use comes within so many seconds); 0 for an unknown session."""
        known = self._known(session, tenant)
        if known is None:
            return 0.0
        seconds = max(0.0, seconds)  # also for NaN
        return self._gaps(known).within(max(self._sound(now) - known.at, 0.0), seconds)

    def kind_of(self, session: str, tenant: str) -> str:
        """The kind of the session's latest event; "" for an unknown one."""
        known = self._known(session, tenant)
        return known.kind if known else ""

    # -- within ----------------------------------------------------------------------------------------
    def _guess(self, session: str, tenant: str, user: str) -> tuple[Session, _Guess]:
        asked = session, tenant, user
        if self._latest is not None and self._latest[0] == asked:
            return self._latest[1:]
        memory = self.tenants.get(tenant) or Tenant()
        known = memory.sessions.get(session) or Session(user)
        found, none = experts.opinions_on(memory, known)
        stage = min(len(known.burst), 3) if known.trail else -1
        gates = (("act", known.kind, stage), ("tenant", tenant), ("session", tenant, session))
        opinions = [*found.values(), none]
        weights = self.mixture.weights(gates)
        shares = softmax(opinions, weights)
        top = sorted(range(len(found)), key=shares.__getitem__, reverse=True)
        guess = _Guess(list(found), opinions, shares, top, weights, gates)
        self._latest = asked, known, guess
        return known, guess

    def _say(self, tenant: str, session: Session, guess: _Guess, limit: int, now: float) -> list[Prediction]:
        said, left = [], 1.0
        gap = self._quantiles(session, max(now - session.at, 0.0))
        for i in guess.top[:limit]:
            levels = _levels(guess.shares[i], session.kind, tenant)
            outcomes = self.truth.outcomes(levels[1])
            sure = (outcomes + 1) / (outcomes + 2)  # nothing is surer than the record is long (Laplace)
            probability = min(guess.shares[i] * self.truth.mean(levels), sure, left)
            left -= probability
            said.append(
                Prediction(
                    context=guess.contexts[i],
                    probability=probability,
                    gap_s=gap,
                    outcomes=outcomes,
                    _opinions=guess.opinions[i],
                    _weights=guess.weights,
                )
            )
        return said

    def _quantiles(self, session: Session, age: float) -> tuple[float, float, float]:
        cell = self._gaps(session)
        low, middle, high = (cell.quantile(age, share) for share in (0.1, 0.5, 0.9))
        return low, middle, high

    def _gap_ended(self, session: Session, gap: float) -> None:
        cell = self._gaps(session)
        for k in range(bin_of(gap)):
            self.gaps.outlived(cell, k)
        self.gaps.ended(cell, gap)

    def _gaps(self, session: Session) -> Cell:
        return self.gaps.cell(("use", ("use", session.kind)))

    def _known(self, session: str, tenant: str) -> Session | None:
        memory = self.tenants.get(short(tenant))
        return memory.sessions.get(short(session)) if memory else None

    def _tenant(self, name: str) -> Tenant:
        tenant = self.tenants.get(name)
        if tenant is None:
            tenant = self.tenants[name] = Tenant(self.max_contexts)
            if len(self.tenants) > self.max_tenants:
                self.tenants.popitem(last=False)
        self.tenants.move_to_end(name)
        return tenant

    def _time(self, now: float) -> float:
        self.now = now if now < self.now - _SET_BACK_S and now > -inf else self._sound(now)
        return self.now

    def _sound(self, now: float) -> float:
        return now if self.now < now < inf else self.now


def _levels(claimed: float, kind: str, tenant: str) -> tuple[Hashable, ...]:
    step = min(int(claimed * _STEPS), _STEPS - 1)
    return ("claim", step), ("claim", step, kind), ("claim", step, kind, tenant)
