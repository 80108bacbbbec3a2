"""One replayed worker that several tenants share fairly: its memory, its engine, its link, and who is let in.

As the real worker does it, by the same line (`cache.line`), the same counters and the same order (`plan.order`).
"""

from collections import Counter, defaultdict
from math import inf

from kvprefetch.cache.evict import Demand
from kvprefetch.cache.fair_spans import FairSpanPool
from kvprefetch.cache.shares import Shares
from kvprefetch.cache.spans import SpanPool
from kvprefetch.plan.counters import Counters
from kvprefetch.plan.order import FairOrder
from kvprefetch.plan.patience import PATIENCE_S, is_patient
from kvprefetch.settings import FairnessSettings
from kvprefetch.sim.clock import VirtualClock
from kvprefetch.sim.machine import Machine
from kvprefetch.sim.worker import Live, Record, SimWorker, Strategy


class Turns:
    """A `Line` in fair order. `work`: seconds that are left of a request; a turn takes `most` of them."""

    def __init__(self, counters: Counters, machine: Machine, is_link: bool = False) -> None:
        self.counters, self.machine, self.is_link = counters, machine, is_link
        self._order: FairOrder[Live] = FairOrder(counters)

    def append(self, live: Live, /) -> None:
        """See `Line`."""
        self._order.add(live, live.request.tenant, self._work(live))

    def popleft(self) -> Live:
        """See `Line`. Its turn is charged to its tenant."""
        live = self._order.take()
        if live is None:
            raise IndexError("nobody waits for a turn")
        work = self._work(live)
        self._order.charge(live, work if self.is_link else min(work, self.machine.slice_s or inf))
        self._order.remove(live)
        return live

    def __len__(self) -> int:
        return len(self._order)

    def _work(self, live: Live) -> float:
        if self.is_link:
            return self.machine.load_s(live.host_blocks)
        return self.machine.prefill_s(live.computed, live.request.tokens)


class FairWorker(SimWorker):
    """See the module's docstring."""

    def __init__(
        self,
        machine: Machine,
        clock: VirtualClock,
        strategy: Strategy,
        record: Record,
        shares: Shares,
        settings: FairnessSettings | None = None,
    ) -> None:
        self.shares, self.settings = shares, settings or FairnessSettings()
        super().__init__(machine, clock, strategy, record)
        self.counters = Counters(shares.weight, credit=self.settings.credit_s)
        self.prefilling = Turns(self.counters, machine)
        self.loading = Turns(Counters(shares.weight, credit=self.settings.credit_s), machine, is_link=True)
        self.entering: FairOrder[Live] = FairOrder(self.counters)
        self.running: Counter[str] = Counter()  # requests by tenant
        self.starting: defaultdict[str, set[Live]] = defaultdict(set)  # of them, those without a first token
        self.awaited: Live | None = None

    def _gpu_pool(self, capacity: int) -> SpanPool:
        return FairSpanPool(capacity, shares=self.shares, claim_s=self.settings.claim_s)

    def _host_pool(self, capacity: int) -> SpanPool:
        return FairSpanPool(capacity, shares=self.shares, claim_s=self.settings.lower_claim_s)

    # -- who is let in ---------------------------------------------------------------------------------
    def _arrived(self, live: Live) -> None:
        tokens = min(self.gpu.match(live.request.path), live.blocks) * self.machine.block_tokens
        live.computed = min(tokens, live.request.tokens - 1)
        self.entering.add(live, live.request.tenant, self._left(live))

    def _left(self, live: Live) -> float:
        """Seconds of prefill."""
        return self.machine.prefill_s(live.computed, live.request.tokens)

    def _admit(self) -> None:
        passed = []
        while (live := self.entering.take()) is not None:
            if self._may_enter(live) and self._open(live):
                self.entering.remove(live)
                self.running[live.request.tenant] += 1
                self.starting[live.request.tenant].add(live)
                if self.awaited is live:
                    self.awaited = None
                self._begin(live)
            else:
                self.entering.set_aside(live.request.tenant)
                passed.append(live)
        for live in passed:
            self.entering.put_back(live)
        self.entering.resume()

    def _may_enter(self, live: Live) -> bool:
        """Whether it would be served now: until then it takes no memory. All wait for one that did not fit for long."""
        if self.awaited is not None and self.awaited is not live:
            return False
        tenant, left = live.request.tenant, self._left(live)
        return tenant in self.apart or all(left < self._left(other) for other in self.starting[tenant])

    def _is_full(self) -> bool:
        return bool(len(self.entering))

    def _demand(self, live: Live) -> Demand:
        """One that waits for others of its tenant takes nothing of those who have less."""
        tenant = live.request.tenant
        asked = live.blocks - self.gpu.match(live.request.path)
        patient = is_patient(self.running[tenant], asked, self.gpu.capacity)
        return Demand(tenant, speculative=False, now=self.clock.now, patient=patient)

    def _open(self, live: Live) -> bool:
        is_open = super()._open(live)
        if not is_open and not self.running[live.request.tenant]:
            waited = self.clock.now - live.request.at
            if self.awaited is None and waited > PATIENCE_S * max(live.blocks / self._part(live.request.tenant), 1.0):
                self.awaited = live
        return is_open

    def _part(self, tenant: str) -> float:
        """Blocks that are its part among those who have requests."""
        return self.shares.part(tenant, self.gpu.capacity, self.shares.claims({*self.running, tenant}))

    # -- what happens ----------------------------------------------------------------------------------
    def _first_token(self, live: Live) -> None:
        self.starting[live.request.tenant].discard(live)
        super()._first_token(live)
        self._admit()

    def _end(self, live: Live) -> None:
        tenant = live.request.tenant
        self.running[tenant] -= 1
        if not self.running[tenant]:
            del self.running[tenant]
            self.starting.pop(tenant, None)
        super()._end(live)
