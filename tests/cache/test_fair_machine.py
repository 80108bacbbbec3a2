"""Laws of fair eviction, on any interleaving of several tenants' requests."""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf

import hypothesis.strategies as st
from fair_pools import guaranteed, keys, serve, used
from hypothesis import given, settings

from kvprefetch.cache.block import Block
from kvprefetch.cache.line import CLAIM_S
from kvprefetch.cache.orders import ByIndex
from kvprefetch.cache.pool import BlockPool
from kvprefetch.cache.shares import Share, Shares

PAGES = 12
PROMISED = {"ann": 4, "bob": 3, "cid": 5}

many = settings(max_examples=200, deadline=None)
tenants = st.sampled_from(["ann", "bob", "cid", "dan"])  # nobody promised dan anything
prompts = st.text("ab", min_size=1, max_size=5)
waits = st.sampled_from([0.25, 1.0, 6.0])
claims = st.sampled_from([2.0, CLAIM_S])


@dataclass(frozen=True)
class Step:
    """A whole request, or preload, after a pause."""

    tenant: str
    text: str
    wait: float = 1.0
    preloads: bool = False


steps = st.lists(st.builds(Step, tenants, prompts, waits), min_size=20, max_size=40)


@many
@given(steps, claims, st.lists(st.tuples(st.integers(0, 39), prompts), max_size=10))
def test_each_tenant_keeps_what_a_private_pool_of_its_guarantee_would(
    asked: list[Step], claim_s: float, preloads: list[tuple[int, str]]
) -> None:
    """Of a request longer than the guarantee, the private pool keeps the beginning. Dan preloads, to no effect."""
    pool = BlockPool(PAGES, claim_s=claim_s)
    pool.shares = guaranteed(PAGES, **PROMISED)
    private = {tenant: BlockPool(pages) for tenant, pages in PROMISED.items()}
    now = 0.0
    for at, step in enumerate(asked):
        now += step.wait
        for text in (text for when, text in preloads if when == at):
            serve(pool, "dan", text, now - 0.125, until=now + 2)
        is_served = serve(pool, step.tenant, step.text, now)
        promised = PROMISED.get(step.tenant, 0)
        assert is_served or len(step.text) > promised
        if is_served and promised:
            assert serve(private[step.tenant], step.tenant, step.text[:promised], now)
        pool.check()
        for tenant, alone in private.items():
            assert alone.resident.keys() <= pool.resident.keys(), tenant


@many
@given(st.lists(st.builds(Step, tenants, prompts, waits, st.booleans()), min_size=20, max_size=40), claims)
def test_nothing_is_evicted_beyond_the_need_and_nobody_refused_what_could_be_had(
    asked: list[Step], claim_s: float
) -> None:
    pool = BlockPool(PAGES, claim_s=claim_s)
    pool.shares = guaranteed(PAGES, **PROMISED)
    now = 0.0
    for step in asked:
        now += step.wait
        found = len(pool.match(keys(step.tenant, step.text)))
        wanted, free, before = len(step.text) - found, pool.free_pages, pool.evictions
        own = [block for block in pool.resident.values() if block.tenant == step.tenant]
        may_go = len(own) - found
        if not step.preloads:
            speculative = sum(block.speculative and block.tenant != step.tenant for block in pool.resident.values())
            borrowed = sum(
                max(len(used(pool, t)) - PROMISED.get(t, 0), 0) for t in PROMISED | {"dan": 0} if t != step.tenant
            )
            may_go += speculative + borrowed
        is_served = serve(pool, step.tenant, step.text, now, until=now + 3 if step.preloads else None)
        assert is_served == (wanted <= free + may_go)
        assert pool.evictions - before == (max(wanted - free, 0) if is_served else 0)
        pool.check()


def lying(steps: list[Step], claim_s: float, shares: Shares, judge: Callable[[BlockPool, BlockPool], None]) -> None:
    """The same requests in two pools, in one of which cid preloads, too; compared after each."""
    with_them, without = BlockPool(PAGES, claim_s=claim_s), BlockPool(PAGES, claim_s=claim_s)
    with_them.shares = without.shares = shares
    now = 0.0
    for step in steps:
        now += step.wait
        if step.preloads:
            serve(with_them, "cid", step.text, now, until=now + 3)
        else:
            served = [serve(pool, step.tenant, step.text, now) for pool in (without, with_them)]
            assert served[0] <= served[1]
        judge(with_them, without)


two = st.builds(Step, st.sampled_from(["ann", "cid"]), prompts, waits, st.booleans())


@many
@given(
    st.lists(two, min_size=20, max_size=40), claims, st.sampled_from([{}, {"ann": 3}, {"cid": 3}, {"ann": 2, "cid": 4}])
)
def test_preloads_true_or_false_take_nothing_of_the_other(
    asked: list[Step], claim_s: float, promised: dict[str, int]
) -> None:
    """Of what ann uses she keeps all that she would have kept had cid not preloaded."""

    def judge(with_them: BlockPool, without: BlockPool) -> None:
        assert used(without, "ann") <= used(with_them, "ann")

    lying(asked, claim_s, guaranteed(PAGES, **promised), judge)


@many
@given(st.lists(st.builds(Step, tenants, prompts, waits, st.booleans()), min_size=20, max_size=40), claims)
def test_preloads_true_or_false_take_nothing_of_the_others_together(asked: list[Step], claim_s: float) -> None:
    """What cid gives up for his preloads may go to one, and what he takes back come from another who has more."""

    def judge(with_them: BlockPool, without: BlockPool) -> None:
        before, after = ([len(used(pool, t)) for t in ("ann", "bob", "dan")] for pool in (without, with_them))
        assert sum(before) <= sum(after)

    lying(asked, claim_s, guaranteed(PAGES, ann=3, cid=3), judge)


sizes = st.integers(1, 4)
weights = st.sampled_from([0.5, 1.0, 2.0, 3.0])


@many
@given(
    st.lists(st.tuples(st.sampled_from(["ann", "ann", "ann", "bob", "cid", "dan"]), sizes), min_size=20, max_size=80),
    st.lists(weights, min_size=3, max_size=3),
    st.sampled_from([{}, {"ann": 0.25}, {"ann": 0.25, "bob": 1 / 3}]),
)
def test_who_always_wants_more_borrows_by_weight(
    stream: list[tuple[str, int]], weights: list[float], promised: dict[str, float]
) -> None:
    """At whatever rates. Who has lost a block since wants more; what two such borrow differs by one request's size."""
    pool = BlockPool(PAGES, claim_s=inf)
    named = dict(zip(("ann", "bob", "cid"), weights, strict=True))
    pool.shares = Shares({tenant: Share(weight, promised.get(tenant, 0)) for tenant, weight in named.items()})
    wanting: set[str] = set()
    pool.on_evict = lambda block, rule: wanting.add(block.tenant)
    for at, (tenant, size) in enumerate(stream):
        assert serve(pool, tenant, chr(1000 + at) * size, float(at))
        if wanting:
            assert pool.free_pages == 0
        borrowed = {
            tenant: max(len(used(pool, tenant)) - pool.shares.guaranteed(tenant, PAGES), 0) / pool.shares.weight(tenant)
            for tenant in ("ann", "bob", "cid", "dan")
        }
        for tenant in wanting:
            assert borrowed[tenant] >= max(borrowed.values()) - 4 / min(*weights, 1.0)


@many
@given(
    st.lists(st.builds(Step, tenants, prompts, waits, st.booleans()), min_size=20, max_size=40),
    claims,
    st.dictionaries(st.tuples(prompts, st.integers(0, 20)), st.integers(0, 3), max_size=30),
)
def test_whatever_index_rules_and_however_it_changes_guarantees_hold(
    asked: list[Step], claim_s: float, values: dict[tuple[str, int], int]
) -> None:
    """By count, that is: which blocks of its own a tenant keeps is for the index to say."""

    def index(block: Block, now: float) -> float:
        return float(values.get((block.key.decode().partition(":")[2], int(now)), 1))

    pool = BlockPool(PAGES, ByIndex(index), claim_s=claim_s)
    pool.shares = guaranteed(PAGES, **PROMISED)
    now = 0.0
    for step in asked:
        now += step.wait
        before = {tenant: len(used(pool, tenant)) for tenant in PROMISED}
        is_served = serve(pool, step.tenant, step.text, now, until=now + 3 if step.preloads else None)
        assert is_served or step.preloads or len(step.text) > PROMISED.get(step.tenant, 0)
        for tenant, pages in PROMISED.items():
            if tenant != step.tenant:
                assert len(used(pool, tenant)) >= min(before[tenant], pages)
        pool.check()
