"""Whose blocks go where blocks are only counted: weighted max-min by the counters alone. Pure."""

from collections import Counter
from collections.abc import Mapping
from heapq import heapify, heappop, heapreplace

from kvprefetch.cache.shares import Shares


def whose_blocks_go(charged: Mapping[str, int], shares: Shares, total: int, wanted: int) -> dict[str, int]:
    """How many blocks of which tenants go for `wanted`: one by one, of who is furthest over its guarantee by weight.

    Of equal ones the first by name. `charged`: blocks by tenant, in a place for `total`. No guarantee is touched:
    fewer than wanted may go, but never where more than `total` is charged by so many. O(tenants + wanted · log).
    """
    line = [
        (-over / shares.weight(tenant), tenant, over)
        for tenant, blocks in charged.items()
        if (over := blocks - shares.guaranteed(tenant, total)) > 0
    ]
    heapify(line)
    going: Counter[str] = Counter()
    for _ in range(wanted):
        if not line:
            break
        _, tenant, over = line[0]
        going[tenant] += 1
        if over > 1:
            heapreplace(line, (-(over - 1) / shares.weight(tenant), tenant, over - 1))
        else:
            heappop(line)
    return dict(going)
