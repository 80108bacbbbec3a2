"""How memory and engine are shared, by name: the baselines of `fairness.py`, and ours."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from kvprefetch.cache.evict import by_index
from kvprefetch.cache.fair_spans import FairSpanPool
from kvprefetch.cache.guard import Guard
from kvprefetch.cache.orders import ByIndex as IndexOrder
from kvprefetch.cache.shares import Share, Shares
from kvprefetch.cache.spans import SpanPool
from kvprefetch.errors import InvalidRequest
from kvprefetch.settings import FairnessSettings
from kvprefetch.sim.baselines import Reactive
from kvprefetch.sim.clock import VirtualClock
from kvprefetch.sim.divided import DividedWorker
from kvprefetch.sim.fair import FairWorker
from kvprefetch.sim.lru_pool import LruPool
from kvprefetch.sim.machine import Machine
from kvprefetch.sim.maxmin import MaxMinPool
from kvprefetch.sim.ours import ByIndex
from kvprefetch.sim.worker import Live, SimWorker

Record = Callable[[Live], None]


@dataclass(frozen=True)
class Sharing:
    """Who shares, and what each is guaranteed: a fraction of an equal share."""

    tenants: tuple[str, ...]  # a flood's among them
    guarantee: float = FairnessSettings().guarantee

    @property
    def shares(self) -> Shares:
        """Equal ones."""
        each = self.guarantee / len(self.tenants)
        return Shares({tenant: Share(guarantee=each) for tenant in self.tenants})


class LruWorker(SimWorker):
    """One memory for all, least recently used out first."""

    def _gpu_pool(self, capacity: int) -> SpanPool:
        return LruPool(capacity, self.strategy.merges)


class MaxMinWorker(SimWorker):
    """One memory for all, of which whoever keeps most gives way."""

    def _gpu_pool(self, capacity: int) -> SpanPool:
        return MaxMinPool(capacity, grain=16)

    def _host_pool(self, capacity: int) -> SpanPool:
        return MaxMinPool(capacity, grain=16)


class FairByIndex(ByIndex):
    """The index orders each tenant's own blocks; the guard's shadow is of the same pool."""

    def attach(self, worker: SimWorker) -> None:
        """Know the pool."""
        Reactive.attach(self, worker)
        self.guard = Guard(worker.gpu.capacity, by_index(self._index))
        assert isinstance(worker.gpu, FairSpanPool)
        worker.gpu.line.order = IndexOrder(self._index, self.guard)


def _lru(machine: Machine, clock: VirtualClock, record: Record, sharing: Sharing) -> SimWorker:
    return LruWorker(machine, clock, Reactive(), record)


def _fifo(machine: Machine, clock: VirtualClock, record: Record, sharing: Sharing) -> SimWorker:
    return LruWorker(replace(machine, slice_s=None), clock, Reactive(), record)


def _by_index(machine: Machine, clock: VirtualClock, record: Record, sharing: Sharing) -> SimWorker:
    return SimWorker(machine, clock, ByIndex(), record)


def _maxmin(machine: Machine, clock: VirtualClock, record: Record, sharing: Sharing) -> SimWorker:
    return MaxMinWorker(machine, clock, Reactive(), record)


def _static(machine: Machine, clock: VirtualClock, record: Record, sharing: Sharing) -> SimWorker:
    return DividedWorker(machine, clock, sharing.tenants, record)


def _fair(machine: Machine, clock: VirtualClock, record: Record, sharing: Sharing) -> SimWorker:
    return FairWorker(machine, clock, Reactive(), record, sharing.shares)


def _fair_by_index(machine: Machine, clock: VirtualClock, record: Record, sharing: Sharing) -> SimWorker:
    return FairWorker(machine, clock, FairByIndex(), record, sharing.shares)


Maker = Callable[[Machine, VirtualClock, Record, Sharing], SimWorker]
FIFO, LRU, BY_INDEX, BASELINES = "fifo", "reactive", "by-index", ("maxmin", "static")
OURS, OURS_BY_INDEX = "fair", "fair-by-index"
POLICIES: dict[str, Maker] = {
    FIFO: _fifo,
    LRU: _lru,
    BY_INDEX: _by_index,
    "maxmin": _maxmin,
    "static": _static,
    OURS: _fair,
    OURS_BY_INDEX: _fair_by_index,
}
"""`reactive` is global LRU with prefill in turns, `fifo` the same with whole prompts, first come, first served."""


def maker_of(
    policy: str, tenants: Sequence[str]
) -> tuple[Sharing, Callable[[Machine, VirtualClock, Record], SimWorker]]:
    """Who shares what under this policy, and a maker of its workers; `:F` after its name guarantees everyone F of an
    equal share. Raises InvalidRequest for an unknown name.
    """
    word, _, guarantee = policy.partition(":")
    if word not in POLICIES:
        raise InvalidRequest(f"no policy {policy!r}; there are {', '.join(POLICIES)}")
    sharing = Sharing(tuple(tenants), float(guarantee)) if guarantee else Sharing(tuple(tenants))
    return sharing, lambda machine, clock, record: POLICIES[word](machine, clock, record, sharing)
