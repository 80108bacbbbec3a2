"""What each tenant would have found in a pool of its own, of the size of its guarantee: what fairness is held to.

Private pools see what the worker saw, when it saw it: a request looks up and takes its blocks when it is admitted,
publishes at its first token, and is over when it ends. They are plain LRU, in which a request that runs uses its blocks
all the time: they are there before any other's, as far as the pool goes. Of a prompt longer than the pool the beginning
is kept.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from kvprefetch.cache.evict import Demand
from kvprefetch.sim.lru_pool import LruPool
from kvprefetch.sim.worker import Live

_SPEAKS, _ENDS, _COMES = range(3)  # what happens first at one moment


@dataclass(slots=True, eq=False)
class _Guest:
    """A request in the pool of its tenant."""

    live: Live
    found: int = 0
    taken: int = 0  # blocks promised to it


class PrivatePool:
    """One tenant's, of `capacity` blocks, least recently used out first."""

    def __init__(self, capacity: int) -> None:
        self.pool = LruPool(capacity)
        self.waiting: dict[_Guest, None] = {}  # for their first token
        self.running: dict[_Guest, None] = {}

    def comes(self, guest: _Guest, now: float) -> None:
        """It looks up, and takes its blocks as far as there is room."""
        self._renew(now)
        _, guest.found = self._use(guest, now)
        self.waiting[guest] = None
        self._take(guest, now)

    def speaks(self, guest: _Guest, now: float) -> None:
        """Its blocks are there for others."""
        del self.waiting[guest]
        self.pool.unreserve(guest.taken, guest.live.request.tenant)
        self.running[guest] = None
        self._keep(guest, now)

    def ends(self, guest: _Guest, now: float) -> None:
        """This was the latest use of its blocks."""
        self._renew(now)
        del self.running[guest]

    def _renew(self, now: float) -> None:
        """Whoever runs has what it uses, and whoever waits what it was promised."""
        for guest in self.running:
            self._keep(guest, now)
        for guest in self.waiting:
            self._take(guest, now)

    def _keep(self, guest: _Guest, now: float) -> None:
        request = guest.live.request
        most, here = self._use(guest, now)
        upto = here + self._room(guest, most - here, now)
        self.pool.insert(request.path, upto, request.tenant, request.session, now)
        self.pool.touch(request.path, upto, request.tenant, request.session, now)

    def _take(self, guest: _Guest, now: float) -> None:
        most, here = self._use(guest, now)
        more = self._room(guest, most - here - guest.taken, now)
        guest.taken += more
        self.pool.reserved += more

    def _use(self, guest: _Guest, now: float) -> tuple[int, int]:
        """How many blocks of it may be here, and how many are."""
        request = guest.live.request
        most = min(request.blocks, self.pool.capacity)
        here = min(self.pool.match(request.path), most)
        self.pool.touch(request.path, here, request.tenant, request.session, now)
        return most, here

    def _room(self, guest: _Guest, wanted: int, now: float) -> int:
        """Make it, as far as what others were promised allows; the blocks of the request itself stay."""
        request, pool = guest.live.request, self.pool
        here = min(pool.match(request.path), pool.capacity)
        wanted = max(min(wanted, pool.capacity - pool.reserved - here), 0)
        pool.hold(request.path, here)
        pool.make_room(wanted, Demand(request.tenant, speculative=False, now=now))
        pool.release(request.path, here)
        return wanted


def private_hits(lives: Iterable[Live], guaranteed: Callable[[str], int]) -> dict[Live, int]:
    """The blocks that each request would have found, where its tenant had `guaranteed` blocks for itself alone."""
    guests = [_Guest(live) for live in lives]
    events = []
    for number, guest in enumerate(guests):
        live = guest.live
        spoke_at = min(live.request.at + live.ttft_s, live.ends_at)  # rounded, it may be just past the end
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
