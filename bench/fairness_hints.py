"""What a tenant gains that hints ten times as often, and falsely, on a planner that an honest one shares.

Each hint is for a second of work, done in chunks; of honest tenants' all is used, of the liar's nothing. What the liar
has of the idle time is compared with what an honest tenant has in its place.
"""

from collections import defaultdict
from dataclasses import dataclass, field

from kvprefetch.plan.budget import Budget
from kvprefetch.plan.planner import Action, Candidate, Job, Planner
from kvprefetch.predict.outlook import Outlook

CHUNK_S, JOB_S, TOKENS_PER_S, SECONDS = 0.1, 1.0, 1_000, 200


@dataclass
class _Idle:
    """An engine with nothing else to do, and who has had its time."""

    had: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))  # seconds by tenant
    left: dict[str, float] = field(default_factory=dict)  # by session

    def assess(self, candidate: Candidate, now: float) -> Job:
        """Everybody says that it is all but certain."""
        left = self.left[candidate.session]
        return Job(Action.PREFILL, round(left * TOKENS_PER_S), left, left, 1.0, Outlook(0.9, 0.0, 100.0, 100.0, 0.009))


def false_hint_gain() -> dict[str, float]:
    """The liar's seconds ÷ an honest tenant's in its place, and what the honest one beside it has lost (a share)."""
    equal, lying = _shared("equal", 1), _shared("liar", 10)
    lost = 1 - lying["honest"] / equal["honest"]
    return {"false_hint_gain": lying["liar"] / equal["equal"], "false_hint_cost": max(lost, 0.0)}


def _shared(neighbour: str, times: int) -> dict[str, float]:
    """Seconds by tenant: an honest one that hints once a second, and a neighbour that hints `times` as often."""
    idle, now = _Idle(), 0.0
    planner = Planner(idle.assess, Budget(start=50_000.0, trickle=0.0))
    for second in range(SECONDS):
        for tenant, hints in (("honest", 1), (neighbour, times)):
            for number in range(hints):
                session = f"{tenant} {second}.{number}"
                idle.left[session] = JOB_S
                planner.offer(session, tenant, "hint", now)
        for _ in range(round(1 / CHUNK_S)):
            now += CHUNK_S
            _work(planner, idle, now)
    return idle.had


def _work(planner: Planner, idle: _Idle, now: float) -> None:
    decision = planner.next(now)
    if decision is None:
        return
    candidate = decision.candidate
    account = candidate.kind, candidate.tenant
    planner.budget.spend(account, round(CHUNK_S * TOKENS_PER_S))
    planner.charge(candidate.tenant, CHUNK_S)
    idle.had[candidate.tenant] += CHUNK_S
    idle.left[candidate.session] -= CHUNK_S
    if idle.left[candidate.session] < CHUNK_S / 2:
        planner.withdraw(candidate.session)
        if candidate.tenant != "liar":
            planner.budget.earn(account, round(JOB_S * TOKENS_PER_S))
