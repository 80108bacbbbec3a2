"""What each tenant would have found in a pool of its own, of the size of its guarantee: what fairness is held to.

Private pools see what the worker saw, when it saw it: a request looks up and takes its blocks when it is admitted,
publishes at its first token, and lets go when it ends. What does not fit beside the tenant's running requests is not
kept.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from kvprefetch.cache.evict import Demand
from kvprefetch.errors import PoolFull
from kvprefetch.sim.lru_pool import LruPool
from kvprefetch.sim.worker import Live

_SPEAKS, _ENDS, _COMES = range(3)  # what happens first at one moment


@dataclass(slots=True)
class _Guest:
    """A request in the pool of its tenant."""

    live: Live
    found: int = 0
    upto: int = 0


@dataclass
class PrivatePool:
    """One tenant's, of `capacity` blocks, least recently used out first."""

    capacity: int
    pool: LruPool = field(init=False)

    def __post_init__(self) -> None:
        self.pool = LruPool(self.capacity)

    def comes(self, guest: _Guest, now: float) -> None:
        """It looks up, and takes its blocks."""
        request = guest.live.request
        most = min(request.blocks, self.capacity)
        guest.found = guest.upto = min(self.pool.match(request.path), most)
        self.pool.hold(request.path, guest.found)
        try:
            self.pool.reserve(most - guest.found, Demand(request.tenant, speculative=False, now=now))
            guest.upto = most
        except PoolFull:
            pass  # what is there is held, and the rest is computed for this once

    def speaks(self, guest: _Guest, now: float) -> None:
        """Its blocks are there for others."""
        request = guest.live.request
        self.pool.unreserve(guest.upto - guest.found, request.tenant)
        self.pool.insert(request.path, guest.upto, request.tenant, request.session, now)
        self.pool.release(request.path, guest.found)
        self.pool.hold(request.path, guest.upto)
        self.pool.touch(request.path, guest.upto, request.tenant, request.session, now)

    def ends(self, guest: _Guest, now: float) -> None:
        """It holds nothing any more."""
        request = guest.live.request
        self.pool.touch(request.path, guest.upto, request.tenant, request.session, now)
        self.pool.release(request.path, guest.upto)


def private_hits(lives: Iterable[Live], guaranteed: Callable[[str], int]) -> dict[Live, int]:
    """The blocks that each request would have found, where its tenant had `guaranteed` blocks for itself alone."""
    guests = [_Guest(live) for live in lives]
    events = []
    for number, guest in enumerate(guests):
        live = guest.live
        spoke_at = live.request.at + live.ttft_s
        events += [(live.admitted_at, _COMES, number), (spoke_at, _SPEAKS, number), (live.ends_at, _ENDS, number)]
    pools: dict[str, PrivatePool] = {}
    for now, what, number in sorted(events):
        guest = guests[number]
        tenant = guest.live.request.tenant
        pool = pools.get(tenant)
        if pool is None:
            pool = pools[tenant] = PrivatePool(guaranteed(tenant))
        (pool.speaks, pool.ends, pool.comes)[what](guest, now)
    return {guest.live: guest.found for guest in guests}
