"""Who may be given pages and a row: no tenant pins more than its part of them while another waits.

What a request holds cannot be evicted, so fairness begins where pages are handed out. While some other tenant has a
request that waits, a tenant is not given more than its guarantee and its weighted part of all that nobody is
guaranteed, among those who have requests; but always one request. While nobody else waits, it may take all.

A request for which there was no room for long is waited for: nobody else is let in until it fits. How long grows with
how much larger than its tenant's part it is.

Used by the loop's thread alone. Nothing here blocks or raises.
"""

from collections import Counter

from kvprefetch.cache.block import Block
from kvprefetch.cache.pool import BlockPool
from kvprefetch.cache.shares import Claims, Shares
from kvprefetch.plan.patience import PATIENCE_S, is_patient
from kvprefetch.worker.request import LiveRequest


class Admission:
    """See the module's promises."""

    def __init__(self, pool: BlockPool, rows: int, shares: Shares) -> None:
        self.pool, self.rows = pool, rows
        self._shares = shares
        self._waiting: Counter[str] = Counter()  # requests by tenant
        self._running: Counter[str] = Counter()
        self._pinned: dict[str, Counter[Block]] = {}  # by tenant: how many of its requests hold each block
        self._held: dict[LiveRequest, list[Block]] = {}
        self._claims: Claims | None = None  # of those who have requests
        self._awaited: LiveRequest | None = None

    @property
    def shares(self) -> Shares:
        """What each tenant may count on."""
        return self._shares

    @shares.setter
    def shares(self, shares: Shares) -> None:
        self._shares, self._claims = shares, None

    def pinned(self, tenant: str) -> int:
        """Pages that its requests hold, each counted once."""
        return len(self._pinned.get(tenant, ()))

    def part(self, tenant: str, total: int) -> float:
        """Of `total` pages or rows, what one that has requests may have while others wait."""
        if self._claims is None:
            self._claims = self._shares.claims(self._waiting.keys() | self._running.keys())
        return self._shares.part(tenant, total, self._claims)

    def may_open(self, request: LiveRequest) -> bool:
        """Whether it may be let in now, if there is room."""
        if self._awaited is not None and self._awaited is not request:
            return False
        tenant, running = request.tenant, self._running[request.tenant]
        has_rivals = len(self._waiting) > (tenant in self._waiting)
        if not running or not has_rivals:
            return True
        if running + 1 > self.part(tenant, self.rows):
            return False
        part, pinned = self.part(tenant, self.pool.pages), self.pinned(tenant)
        return pinned + request.pages <= part or (pinned < part and pinned + self._fresh(request) <= part)

    def is_patient(self, request: LiveRequest) -> bool:
        """Whether it waits for its tenant's others rather than take pages of those who have less."""
        running = self._running[request.tenant]
        if not running:
            return False
        asked = request.pages - len(self.pool.match(request.sequence.keys[: request.pages]))
        return is_patient(running, asked, self.pool.pages)

    def refused(self, request: LiveRequest, now: float) -> None:
        """There was no room for it."""
        if self.is_patient(request):
            return
        since = request.refused_at
        request.refused_at = now if since is None else min(since, now)
        larger = request.pages / max(self.part(request.tenant, self.pool.pages), 1.0)
        if self._awaited is None and now - request.refused_at > PATIENCE_S * max(larger, 1.0):
            self._awaited = request

    @property
    def has_row(self) -> bool:
        """Whether a row is free."""
        return len(self._held) < self.rows

    @property
    def has_running(self) -> bool:
        """Whether any request is in."""
        return bool(self._held)

    @property
    def awaited(self) -> LiveRequest | None:
        """The request that everybody waits for."""
        return self._awaited

    # -- what happens ----------------------------------------------------------------------------------
    def came(self, request: LiveRequest) -> None:
        """It waits."""
        self._change(self._waiting, request.tenant, 1)

    def opened(self, request: LiveRequest) -> None:
        """It holds its pages."""
        held = self._held[request] = list(request.sequence.blocks)
        self._pinned.setdefault(request.tenant, Counter()).update(held)
        self._change(self._running, request.tenant, 1)
        self.gave_up(request)

    def gave_up(self, request: LiveRequest) -> None:
        """It does not wait any more."""
        self._change(self._waiting, request.tenant, -1)
        if self._awaited is request:
            self._awaited = None

    def closed(self, request: LiveRequest) -> None:
        """It holds nothing any more."""
        tenant = request.tenant
        pinned = self._pinned[tenant]
        for block in self._held.pop(request):
            pinned[block] -= 1
            if not pinned[block]:
                del pinned[block]
        if not pinned:
            del self._pinned[tenant]
        self._change(self._running, tenant, -1)

    # -- within ----------------------------------------------------------------------------------------
    def _fresh(self, request: LiveRequest) -> int:
        """Pages that it would pin beyond those that its tenant pins already."""
        pinned = self._pinned.get(request.tenant, Counter())
        found = self.pool.match(request.sequence.keys)[: request.pages]
        return request.pages - sum(block in pinned for block in found)

    def _change(self, counts: Counter[str], tenant: str, by: int) -> None:
        before = counts[tenant]
        counts[tenant] = before + by
        if not counts[tenant]:
            del counts[tenant]
        if not before or before + by == 0:
            self._claims = None
