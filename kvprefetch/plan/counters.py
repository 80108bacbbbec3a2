"""How much service each tenant has had, by weight: virtual-time counters.

After the virtual token counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024): whoever has
the least is served next; who comes back from idleness starts from the least counter among those who want service, less
a bounded `credit`. Without one nothing is banked, as in the paper; with one, whoever asks seldom has the whole engine
for so long though others keep it busy, and delays them by no more than that. While nobody wants service, all have
their credit back, those who were served last, too: they delayed nobody, and a newcomer has no claim before them.

Promises
- Pure, without a clock: time passes by what is charged. Used by one thread alone. Raises nothing: an amount that is
  none (negative, NaN, infinite) counts as 0, and so does a weight that is none as 1.
- All is O(log n), amortised. Idle tenants are remembered only while they are above the floor, and at most `max_idle`
  of them: those nearest to the floor, who gain least by it, are forgotten first.
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from math import inf

Weight = Callable[[str], float]


@dataclass(slots=True)
class _Account:
    """One tenant's. Levels never fall."""

    level: float
    wants: int = 0  # things of its that wait for service or are being served
    passed: float = 0.0  # `Counters.total` when it was last served, or began to want service


class Counters:
    """See the module's promises. `weight` of a tenant may be replaced at any time: it holds for later charges."""

    def __init__(self, weight: Weight = lambda tenant: 1.0, max_idle: int = 65_536, credit: float = 0.0) -> None:
        self.weight, self.max_idle, self.credit = weight, max_idle, credit
        self.total = 0.0  # service of all, unweighted
        self._accounts: dict[str, _Account] = {}
        self._wanting: list[tuple[float, str]] = []  # heap by level; one that has risen meanwhile is put right later
        self._idle: list[tuple[float, str]] = []  # likewise, of those who want nothing
        self._floor = 0.0
        self._active = 0

    def __len__(self) -> int:
        """Tenants that are remembered."""
        return len(self._accounts)

    @property
    def floor(self) -> float:
        """Where those start who come from idleness: the least level of those who want service. It never falls."""
        while self._wanting:
            level, tenant = self._wanting[0]
            account = self._accounts.get(tenant)
            if account is None or not account.wants:
                heapq.heappop(self._wanting)
            elif account.level > level:
                heapq.heapreplace(self._wanting, (account.level, tenant))
            else:
                self._floor = max(self._floor, level)
                break
        return self._floor

    def level(self, tenant: str) -> float:
        """Service that it has had ÷ its weight, counted from a common beginning."""
        account = self._accounts.get(tenant)
        if account is not None and account.wants:
            return account.level
        start = self._start(tenant)
        return max(account.level, start) if account is not None else start

    def passed(self, tenant: str) -> float:
        """`total` when it was last served or began to want service: what it has been passed over since is the rest."""
        account = self._accounts.get(tenant)
        return account.passed if account is not None and account.wants else self.total

    def enter(self, tenant: str) -> None:
        """One more thing of its wants service. Coming from idleness, it is lifted to the floor, less its credit."""
        level = self.level(tenant)
        account = self._accounts.setdefault(tenant, _Account(level))
        if not account.wants:
            account.level, account.passed = level, self.total
            self._active += 1
            heapq.heappush(self._wanting, (level, tenant))
            self._sweep()
        account.wants += 1

    def leave(self, tenant: str) -> None:
        """One thing less; of a tenant that wants nothing, nothing happens."""
        account = self._accounts.get(tenant)
        if account is None or not account.wants:
            return
        floor = self.floor
        account.wants -= 1
        if account.wants:
            return
        self._active -= 1
        if not self._active:  # the last one: who comes next has no credit against it
            self._floor = max(floor, account.level + self._credit(tenant))
        self._rest(tenant, account)

    def charge(self, tenant: str, amount: float) -> None:
        """It has had so much service, whether or not it wants any now."""
        if not 0 < amount < inf:
            return
        weight = self.weight(tenant)
        level = self.level(tenant) + amount / (weight if 0 < weight < inf else 1.0)
        account = self._accounts.setdefault(tenant, _Account(level))
        self.total += amount
        account.level, account.passed = level, self.total
        if not account.wants:
            self._rest(tenant, account)

    # -- within ----------------------------------------------------------------------------------------
    def _start(self, tenant: str) -> float:
        """Where it begins, coming from idleness."""
        return self.floor - self._credit(tenant)

    def _credit(self, tenant: str) -> float:
        if not self.credit:
            return 0.0
        weight = self.weight(tenant)
        return self.credit / (weight if 0 < weight < inf else 1.0)

    def _rest(self, tenant: str, account: _Account) -> None:
        """It is idle: remember it as long as that makes a difference."""
        heapq.heappush(self._idle, (account.level, tenant))
        while self._idle:
            level, other = self._idle[0]
            if level > self._start(other) and len(self._accounts) - self._active <= self.max_idle:
                break
            level, other = heapq.heappop(self._idle)
            rested = self._accounts.get(other)
            if rested is not None and not rested.wants and rested.level <= level:
                del self._accounts[other]
        self._sweep()

    def _sweep(self) -> None:
        """Entries that say nothing any more must not pile up."""
        if len(self._wanting) > 2 * self._active + 64:
            self._wanting = [(a.level, tenant) for tenant, a in self._accounts.items() if a.wants]
            heapq.heapify(self._wanting)
        if len(self._idle) > 2 * (len(self._accounts) - self._active) + 64:
            self._idle = [(a.level, tenant) for tenant, a in self._accounts.items() if not a.wants]
            heapq.heapify(self._idle)
