"""What tenants have of a worker's pool, for /metrics. For operators: each could see by it how busy the others are.

The `MOST` tenants with the most pages have gauges of their own, all others one together; what is charged to the
operator is told as "(public)". A tenant that is called like one of these is counted there. Pure.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from heapq import nlargest

from prometheus_client.core import GaugeMetricFamily, Metric

from kvprefetch.cache.shares import OPERATOR, Shares

MOST = 100
OTHER, PUBLIC = "other", "(public)"
_SPECULATIVE = "speculative"


def tenant_families(charges: Mapping[str, Mapping[str, float]], shares: Shares, pages: int) -> Iterator[Metric]:
    """Gauges of a pool of `pages`: `charges` by tenant and kind, as `BlockPool.charges` tells them."""
    guaranteed = {tenant: shares.guaranteed(tenant, pages) for tenant, share in shares.named.items() if share.guarantee}
    taken = {tenant: sum(kinds.values()) for tenant, kinds in charges.items()}
    size = {tenant: (taken.get(tenant, 0), guaranteed.get(tenant, 0)) for tenant in {*taken, *guaranteed}}
    shown = frozenset(nlargest(MOST, size, key=lambda tenant: (*size[tenant], tenant)))
    speculative = {tenant: kinds.get(_SPECULATIVE, 0) for tenant, kinds in charges.items()}
    used = {tenant: taken[tenant] - speculative[tenant] for tenant in taken}
    yield _family("used", "Pages charged, but for unused speculation.", used, shown)
    yield _family("speculative", "Pages of unused speculation charged.", speculative, shown)
    yield _family("guaranteed", "Pages that it may have whenever it wants them.", guaranteed, shown)


def _family(kind: str, text: str, pages: Mapping[str, float], shown: frozenset[str]) -> Metric:
    totals: Counter[str] = Counter()
    for tenant, count in pages.items():
        totals[_name(tenant) if tenant in shown else OTHER] += count  # type: ignore[assignment]  # parts of pages
    family = GaugeMetricFamily(f"kvprefetch_tenant_{kind}_pages", text, labels=["tenant"])
    for name, count in sorted(totals.items()):
        family.add_metric([name], count)
    return family


def _name(tenant: str) -> str:
    return PUBLIC if tenant == OPERATOR else tenant
