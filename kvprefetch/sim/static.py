"""What each tenant would find in a private, static share of the GPU's pool: the fair baseline."""

from collections import defaultdict

from kvprefetch.cache.evict import Demand, lru
from kvprefetch.cache.spans import SpanPool
from kvprefetch.errors import PoolFull
from kvprefetch.sim.trace import Trace


def static_hits(trace: Trace, capacity: int, reusable: dict[tuple[str, float, int], int]) -> dict[str, float]:
    """Per tenant, the share of reusable blocks that an LRU pool of an equal share of `capacity` blocks holds.

    Requests take no time here, so nothing is pinned.
    """
    tenants = sorted({session[0].tenant for session in trace.sessions})
    pools = {tenant: SpanPool(capacity // len(tenants), lru) for tenant in tenants}
    hits: dict[str, int] = defaultdict(int)
    total: dict[str, int] = defaultdict(int)
    for request in trace.requests():
        pool = pools[request.tenant]
        known = reusable[request.identity]
        found = pool.match(request.path)
        hits[request.tenant] += min(found, known)
        total[request.tenant] += known
        upto = min(request.blocks, pool.capacity)
        pool.hold(request.path, found)
        try:
            pool.make_room(upto - min(found, upto), Demand(request.tenant, speculative=False, now=request.at))
        except PoolFull:
            upto = found
        pool.insert(request.path, upto, request.tenant, request.session, request.at)
        pool.release(request.path, found)
        pool.touch(request.path, upto, request.tenant, request.session, request.at)
    return {tenant: hits[tenant] / max(total[tenant], 1) for tenant in tenants}
