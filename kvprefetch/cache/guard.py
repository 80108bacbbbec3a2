"""The guard: eviction goes by the index only where that has kept more of what was asked for than LRU (DESIGN §7.4).

Three **shadows** of a pool, metadata only and of its capacity, see every live request: one evicts by LRU, one by the
index, and one by whichever of them the guard says, as the real pool does. Nothing is pinned in them, but what belongs
to a running request goes last; so like is compared with like, whatever preloads and pins do to the real pool.

Promises
- Starts with LRU. Goes over to the index when the index's shadow has had more hits than LRU's lately, and back when it
  has had fewer: a margin lies between the two, so that it does not flap.
- Lifetime account: falls back as soon as the hits of the shadow that follows the guard's word are `MOST_LOST` (½ %)
  behind LRU's. From any state of its pool, LRU misses at most `capacity` blocks more than from any other (a block that
  only the other pool had is missed once), so those hits are at least 0.995 × LRU's − one pool − one request, whatever
  the stream.
- Kept in all and per tenant. Where it fares worse in all, every demand is met by LRU; where a tenant with enough
  requests of its own fares worse, that tenant's demands are. `max_tenants` are kept, the longest silent forgotten.
- Pure, deterministic, raises nothing. A request costs O(spans of its path), and one ranking of a shadow's leaves for
  each 1/128 of its capacity that it takes in; memory is at most three spans per block of capacity. For paths of single
  blocks, `key_path` makes both as much smaller as one likes.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from kvprefetch.cache.evict import Demand, Evictable, Rank, lru
from kvprefetch.cache.keys import BlockKey
from kvprefetch.cache.spans import Path, Span, SpanPolicy, SpanPool
from kvprefetch.errors import PoolFull

WINDOW = 2000.0
"""Requests that the comparison looks back on. What an eviction costs shows when its session is back: a few hundred
requests later where a few dozen sessions take turns, so fewer would compare luck."""
ENOUGH = 200.0
"""Requests of its own after which a tenant's record counts."""
BETTER, WORSE = 1.0005, 0.9975
"""Index's hits ÷ LRU's hits above which it is followed, and below which no longer."""
MOST_LOST, AGAIN = 0.005, 0.0025
"""Shares of LRU's hits: a lifetime loss at which it falls back, and one at which the index may be tried again."""
AT_ONCE = 1 / 128
"""Of its capacity, what a shadow evicts beyond the need: ranking all leaves for every few blocks is what costs time."""

_IN_USE = 1 << 30  # a rank's group: after all others


@dataclass(slots=True)
class Record:
    """Hits of the shadows, in blocks: lately (faded over `WINDOW` requests) and ever."""

    requests: float = 0.0
    index: float = 0.0
    lru: float = 0.0
    lru_ever: float = 0.0
    followed_ever: float = 0.0
    follows_index: bool = False

    def note(self, by_lru: int, by_index: int, followed: int) -> bool:
        """A request's hits in each shadow; whether the index is followed no longer."""
        fade = 1 - 1 / WINDOW
        self.requests = self.requests * fade + 1
        self.lru = self.lru * fade + by_lru
        self.index = self.index * fade + by_index
        self.lru_ever += by_lru
        self.followed_ever += followed
        before, lost = self.follows_index, self.lru_ever - self.followed_ever
        if before:
            self.follows_index = self.index >= WORSE * self.lru and lost <= MOST_LOST * self.lru_ever
        else:
            self.follows_index = self.index > BETTER * self.lru and lost <= AGAIN * self.lru_ever
        return before and not self.follows_index


class Guard:
    """See the module's promises. `index` ranks spans for demands, as the policy under guard does for the real pool."""

    def __init__(self, capacity: int, index: SpanPolicy, max_tenants: int = 1024) -> None:
        self.max_tenants = max_tenants
        self.all = Record()
        self.tenants: OrderedDict[str, Record] = OrderedDict()
        self.requests = 0
        self.requests_by_lru = 0  # of them, those that came while their tenant's demands were met by LRU
        self.fallbacks = 0  # times that the index was given up
        self._running: OrderedDict[str, float] = OrderedDict()  # session → since when
        self._choices = self._in_use_last(lru), self._in_use_last(index)
        self._shadows = [SpanPool(capacity, policy) for policy in (*self._choices, lru)]

    def prefers_lru(self, tenant: str) -> bool:
        """Whether this tenant's demands are to be met by LRU. Changes only when a request comes."""
        if not self.all.follows_index:
            return True
        own = self.tenants.get(tenant)
        return own is not None and own.requests >= ENOUGH and not own.follows_index

    @property
    def share(self) -> float:
        """The share of requests that came while LRU was preferred for them."""
        return self.requests_by_lru / self.requests if self.requests else 0.0

    def requested(self, path: Path, tenant: str, session: str, now: float) -> None:
        """A live request has come: count what each shadow has of it, and let each take it in."""
        self.requests += 1
        by_lru = self.prefers_lru(tenant)
        self.requests_by_lru += by_lru
        self._shadows[-1].policy = self._choices[not by_lru]
        self._running[session] = now
        self._running.move_to_end(session)
        if len(self._running) > _MOST_RUNNING:
            self._running.popitem(last=False)
        hits = [_take_in(shadow, path, tenant, session, now) for shadow in self._shadows]
        own = self.tenants.setdefault(tenant, Record())
        self.tenants.move_to_end(tenant)
        if len(self.tenants) > self.max_tenants:
            self.tenants.popitem(last=False)
        given_up, given_up_by_own = self.all.note(*hits), own.note(*hits)
        self.fallbacks += given_up or (given_up_by_own and own.requests >= ENOUGH)

    def ended(self, path: Path, tenant: str, session: str, now: float) -> None:
        """The request of `session` for this path has ended: its blocks were used until now."""
        self._running.pop(session, None)
        blocks = sum(count for _, count in path)
        for shadow in self._shadows:
            shadow.touch(path, blocks, tenant, session, now)  # as far as it still has them

    def _in_use_last(self, policy: SpanPolicy) -> SpanPolicy:
        def ranks(span: Span, demand: Demand) -> Rank | None:
            since = self._running.get(span.session)
            if since is not None and span.last_used >= since:
                return Rank(_IN_USE, span.last_used, "in_use")
            return policy(span, demand)

        return ranks


_MOST_RUNNING = 65_536  # sessions; for callers that do not say what has ended

E = TypeVar("E", bound=Evictable)


def guarded(
    index: Callable[[E, Demand], Rank | None],
    guard: Guard,
    otherwise: Callable[[E, Demand], Rank | None] = lru,
) -> Callable[[E, Demand], Rank | None]:
    """`index`, but a demand whose tenant the guard wants served by LRU is ranked by `otherwise` altogether."""

    def policy(block: E, demand: Demand) -> Rank | None:
        return (otherwise if guard.prefers_lru(demand.tenant) else index)(block, demand)

    return policy


def key_path(keys: Sequence[BlockKey], stride: int = 1) -> Path:
    """Block keys as a path of single names, one for each `stride` whole blocks: a key names all blocks before it.

    With a stride, a guard's capacity counts in strides, too: `pages // stride`.
    """
    return [(int.from_bytes(key[:8], "little"), 1) for key in keys[stride - 1 :: stride]]


def _take_in(pool: SpanPool, path: Path, tenant: str, session: str, now: float) -> int:
    """What the pool had of the path, which it now has as far as it fits."""
    found = pool.match(path)
    upto = min(sum(count for _, count in path), pool.capacity)
    missing = upto - found
    if missing > pool.free:
        pool.hold(path, found)
        try:
            room = min(missing + int(pool.capacity * AT_ONCE), pool.capacity - found)
            pool.make_room(room, Demand(tenant, speculative=False, now=now))
        except PoolFull:  # a policy that spares something
            upto = found
        pool.release(path, found)
    if upto > found:
        pool.insert(path, upto, tenant, session, now)
    pool.touch(path, upto, tenant, session, now)
    return found
