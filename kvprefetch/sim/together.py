"""Several tenants on one replayed worker: what they find, with a flood beside them and without.

Hits are tokens found ÷ tokens that an endless cache would have found. Pure of policies: whoever calls brings a maker
of workers.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import inf

from kvprefetch.sim.clock import VirtualClock
from kvprefetch.sim.future import reusable_blocks
from kvprefetch.sim.machine import Machine
from kvprefetch.sim.private import private_hits
from kvprefetch.sim.report import quantile
from kvprefetch.sim.tenants import working_set
from kvprefetch.sim.trace import Request, Trace
from kvprefetch.sim.worker import Live, SimWorker

Maker = Callable[[Machine, VirtualClock, Callable[[Live], None]], SimWorker]
WINDOW_S = 60.0


@dataclass(frozen=True, slots=True)
class Found:
    """What one request of a tenant found, in blocks."""

    live: Live
    reusable: int
    gpu: int
    host: int

    @property
    def at(self) -> float:
        """When it came."""
        return self.live.request.at

    @property
    def tenant(self) -> str:
        """Whose it is."""
        return self.live.request.tenant


class Together:
    """One trace of several tenants, replayed as often as one likes."""

    def __init__(self, trace: Trace, machine: Machine) -> None:
        self.trace, self.machine = trace, replace(machine, block_tokens=trace.block_tokens)
        self.reusable = reusable_blocks(trace)
        self.pressure = working_set(trace) / machine.gpu_tokens  # working set ÷ pool
        self.tenants = sorted({session[0].tenant for session in trace.sessions})

    def serve(self, make: Maker, flood: Sequence[Request] = (), *, apart: bool = False) -> list[Found]:
        """What the requests of the trace found, by arrival. `apart`: a flood has an engine of its own."""
        clock, lives = VirtualClock(), list[Live]()
        worker = make(self.machine, clock, lives.append)
        if apart:
            worker.apart = frozenset(request.tenant for request in flood)
        flooding = {request.tenant for request in flood}
        for request in sorted([*self.trace.requests(), *flood], key=lambda request: request.at):
            clock.at(request.at, _arrival(worker, request))
        clock.run()
        worker.gpu.check()
        worker.host.check()
        found = [self._found(live) for live in lives if live.request.tenant not in flooding]
        return sorted(found, key=lambda each: each.at)

    def _found(self, live: Live) -> Found:
        known = self.reusable[live.request.identity]
        gpu = min(live.gpu_blocks, known)
        return Found(live, known, gpu, min(live.host_blocks, known - gpu))


def between(found: Iterable[Found], start: float, end: float) -> list[Found]:
    """Those that came from `start` until `end`."""
    return [each for each in found if start <= each.at < end]


def gpu_hit(found: Iterable[Found]) -> float:
    """Share of the reusable tokens that were on the GPU."""
    kept = list(found)
    return sum(each.gpu for each in kept) / max(sum(each.reusable for each in kept), 1)


def hit(found: Iterable[Found]) -> float:
    """Share of the reusable tokens that were on the GPU or the host."""
    kept = list(found)
    return sum(each.gpu + each.host for each in kept) / max(sum(each.reusable for each in kept), 1)


def ttft_p99(found: Iterable[Found]) -> float:
    """Seconds to the first token."""
    return quantile(sorted(each.live.ttft_s for each in found), 0.99)


def jain(found: Iterable[Found]) -> float:
    """Jain's index of the tenants' GPU hits: 1 where all have the same, 1 ÷ n where one has all."""
    by_tenant: dict[str, list[Found]] = defaultdict(list)
    for each in found:
        by_tenant[each.tenant].append(each)
    hits = [gpu_hit(own) for own in by_tenant.values() if any(each.reusable for each in own)]
    squares = sum(value * value for value in hits)
    return sum(hits) ** 2 / (len(hits) * squares) if squares else 1.0


@dataclass(frozen=True)
class Worst:
    """Tenants' hits less those of private pools, in every window in which they could have had any."""

    points: float = inf  # percentage points of the worst window; inf: there was none
    windows: int = 0
    below: int = 0  # windows more than half a point below


def worst_window(found: Sequence[Found], guaranteed: Callable[[str], int], *, with_host: bool = False) -> Worst:
    """See `Worst`. `guaranteed` says how many blocks a tenant's private pool has; with the host, of the host.

    A request counts in the window in which it looked up.
    """
    alone = private_hits([each.live for each in found], guaranteed)
    reusable, gained = Counter[tuple[str, int]](), Counter[tuple[str, int]]()
    for each in found:
        window = each.tenant, int(each.live.admitted_at // WINDOW_S)
        reusable[window] += each.reusable
        had = each.gpu + each.host if with_host else each.gpu
        gained[window] += had - min(alone[each.live], each.reusable)
    points = [100 * gained[window] / known for window, known in reusable.items() if known]
    return Worst(min(points, default=inf), len(points), sum(value < -0.5 for value in points))


def _arrival(worker: SimWorker, request: Request) -> Callable[[], None]:
    return lambda: worker.arrive(request)
