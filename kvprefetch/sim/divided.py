"""Hard partitions: every tenant has an equal part of the GPU and of the host for itself, used or not. A baseline."""

from collections import Counter, deque
from collections.abc import Callable, Collection

from kvprefetch.cache.evict import Demand
from kvprefetch.cache.spans import Path
from kvprefetch.errors import PoolFull
from kvprefetch.sim.baselines import Reactive
from kvprefetch.sim.clock import VirtualClock
from kvprefetch.sim.lru_pool import LruPool
from kvprefetch.sim.machine import Machine
from kvprefetch.sim.trace import Request
from kvprefetch.sim.worker import Live, SimWorker


class DividedPool(LruPool):
    """`capacity` blocks in equal parts, one for each of `tenants`, each least recently used out first.

    Blocks are private to tenants: a block is of the part of whoever inserted it. Nothing here is speculative.
    """

    def __init__(self, capacity: int, tenants: Collection[str]) -> None:
        super().__init__(capacity)
        self.part = capacity // max(len(tenants), 1)
        self.taken: Counter[str] = Counter()  # by tenant: blocks resident or promised

    def make_room(self, count: int, demand: Demand) -> None:
        """Evict the tenant's own blocks until `count` of its part are free; or PoolFull, having changed nothing."""
        missing = count - (self.part - self.taken[demand.tenant])
        if missing <= 0:
            return
        victims = self._choose(missing, demand)
        if victims is None:
            raise PoolFull(f"{count} blocks wanted, of the tenant's part too few may be evicted")
        for span, cut in victims:
            self.taken[span.tenant] -= cut
            self.cut(span, cut)

    def reserve(self, count: int, demand: Demand) -> None:
        """See `SpanPool`."""
        super().reserve(count, demand)
        self.taken[demand.tenant] += count

    def unreserve(self, count: int, tenant: str) -> None:
        """See `SpanPool`."""
        super().unreserve(count, tenant)
        self.taken[tenant] -= count

    def insert(
        self,
        path: Path,
        upto: int,
        tenant: str,
        session: str,
        now: float,
        speculative_until: float | None = None,
    ) -> int:
        """See `SpanPool`."""
        fresh = super().insert(path, upto, tenant, session, now, speculative_until)
        self.taken[tenant] += fresh
        return fresh

    def _open_to(self, demand: Demand) -> list[str]:
        return [demand.tenant]


class DividedWorker(SimWorker):
    """A worker whose tenants each have a part, and wait for that alone: nobody stands in another's way."""

    gpu: DividedPool

    def __init__(
        self, machine: Machine, clock: VirtualClock, tenants: Collection[str], record: Callable[[Live], None]
    ) -> None:
        self.tenants = tenants
        self.lines: dict[str, deque[Live]] = {tenant: deque() for tenant in tenants}
        super().__init__(machine, clock, Reactive(), record)

    def _gpu_pool(self, capacity: int) -> DividedPool:
        return DividedPool(capacity, self.tenants)

    def _host_pool(self, capacity: int) -> DividedPool:
        return DividedPool(capacity, self.tenants)

    def arrive(self, request: Request) -> None:
        """Of a prompt that is longer than its part, the beginning is kept."""
        self.active += 1
        self.lines[request.tenant].append(Live(request, min(request.blocks, self.gpu.part)))
        self._admit()

    def _admit(self) -> None:
        for line in self.lines.values():
            self.waiting = line
            super()._admit()

    def _keep_on_host(self, live: Live) -> None:
        blocks, live.blocks = live.blocks, min(live.request.blocks, self.host.part)  # type: ignore[attr-defined]
        super()._keep_on_host(live)
        live.blocks = blocks
