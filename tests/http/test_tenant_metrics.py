"""What tenants have of a worker's pool is in /metrics, for operators alone."""

import hashlib

from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from served import ASKED, Open, Served, served

from kvprefetch.cache.shares import OPERATOR, Share, Shares
from kvprefetch.http.tenant_metrics import MOST, OTHER, PUBLIC, tenant_families
from kvprefetch.settings import Credential, TenantSettings

ROLES = {"ann": "tenant", "bob": "tenant", "olga": "operator", "w1": "worker"}
KNOWN = tuple(Credential(name, role, hashlib.sha256(name.encode()).hexdigest()) for name, role in ROLES.items())
Samples = dict[tuple[str, str], float]


def samples(families: list[Metric]) -> Samples:
    """By the figure's name and the tenant."""
    found = [sample for family in families for sample in family.samples if "tenant" in sample.labels]
    return {(sample.name.split("_")[2], sample.labels["tenant"]): sample.value for sample in found}


def read(site: Served, token: str) -> Samples:
    headers = {"authorization": f"Bearer {token}"} if token else {}
    answer = site.http.get(site.url.removesuffix("/v1") + "/metrics", headers=headers)
    assert answer.status_code == 200
    assert "kvprefetch_pool_pages" in answer.text
    return samples(list(text_string_to_metric_families(answer.text)))


def test_an_operator_sees_what_each_tenant_has_and_nobody_else_does(open_tiny: Open) -> None:
    tenants = (TenantSettings("ann", guarantee=0.25), TenantSettings("bob", guarantee=0.5))
    with served(open_tiny(pages=64), token="ann", credentials=KNOWN, tenants=tenants) as site:
        site.post("chat/completions", **ASKED)
        seen, charges = read(site, "olga"), site.kv.stats()["pool"]["charges"]
        assert [read(site, token) for token in ("ann", "bob", "w1", "wrong", "")] == [{}] * 5
    assert seen["used", "ann"] == charges["ann"]["used"] > 0
    assert seen["speculative", "ann"] == charges["ann"].get("speculative", 0)
    assert (seen["guaranteed", "ann"], seen["guaranteed", "bob"]) == (16, 32)


def test_where_nobody_is_asked_who_they_are_everybody_sees_them(open_tiny: Open) -> None:
    with served(open_tiny()) as site:
        site.post("chat/completions", **ASKED)
        assert read(site, "")["used", "default"] > 0


def test_of_a_hundred_thousand_tenants_the_largest_are_told_apart() -> None:
    charges = {f"t{n}": {"used": n, "in_flight": 1, "speculative": 2} for n in range(100_000)}
    shares = Shares({"guaranteed": Share(guarantee=0.5)})
    seen = samples(list(tenant_families(charges, shares, 1_000)))
    for kind, total in (("used", sum(range(100_000)) + 100_000), ("speculative", 200_000), ("guaranteed", 500)):
        mine = {tenant: pages for (of, tenant), pages in seen.items() if of == kind}
        assert sum(mine.values()) == total
        assert len(mine) <= MOST + 1
    assert seen["used", "t99999"] == 100_000
    assert seen["guaranteed", OTHER] == 500


def test_parts_of_pages_public_pages_and_odd_names_are_counted_once() -> None:
    charges = {OPERATOR: {"used": 3}, PUBLIC: {"used": 1}, OTHER: {"used": 0.5}, 'a"\\\nb': {"speculative": 2}}
    seen = samples(list(tenant_families(charges, Shares(), 10)))
    assert seen["used", PUBLIC] == 4
    assert seen["used", OTHER] == 0.5
    assert seen["speculative", 'a"\\\nb'] == 2
