"""Whose blocks go when tenants share a pool, as short stories: a letter a block, a key for each tenant's beginnings."""

from collections import Counter
from math import inf, nan

import pytest
from fair_pools import guaranteed, keys, serve, texts, used

from kvprefetch.cache.block import Block, State
from kvprefetch.cache.evict import Demand
from kvprefetch.cache.orders import ByAge, ByIndex
from kvprefetch.cache.pool import BlockPool
from kvprefetch.cache.shares import OPERATOR, Share, Shares
from kvprefetch.errors import PoolFull


def pool_of(pages: int, claim_s: float = inf, **promised: int) -> BlockPool:
    pool = BlockPool(pages, claim_s=claim_s)
    pool.shares = guaranteed(pages, **promised)
    return pool


def rules(pool: BlockPool) -> Counter[str]:
    return Counter(pool.evicted.values())


def unique(at: int, blocks: int = 1) -> str:
    """A text that begins like no other."""
    return chr(1000 + at) * blocks


# -- guarantees ------------------------------------------------------------------------------------------
def test_a_flood_takes_what_is_nobodys_and_no_more() -> None:
    pool = pool_of(10, ann=4)
    serve(pool, "ann", "abcd", 1.0)
    for at in range(20):
        assert serve(pool, "eve", unique(at, 3), 2.0 + at)
    assert texts(pool, "ann") == ["a", "ab", "abc", "abcd"]
    assert len(used(pool, "eve")) == 6
    assert not serve(pool, "eve", unique(30, 7), 30.0)


def test_one_alone_has_the_whole_pool_whatever_others_are_promised() -> None:
    pool = pool_of(8, ann=4, bob=4)
    for at in range(8):
        serve(pool, "eve", unique(at), float(at))
    assert (len(used(pool, "eve")), pool.evictions) == (8, 0)


def test_what_was_lent_comes_back_when_it_is_wanted() -> None:
    pool = pool_of(8, ann=4, bob=4)
    serve(pool, "eve", "abcdefgh", 1.0)
    serve(pool, "ann", "abcd", 2.0)
    serve(pool, "bob", "abcd", 3.0)
    assert (texts(pool, "ann")[-1], texts(pool, "bob")[-1], texts(pool, "eve")) == ("abcd", "abcd", [])
    assert rules(pool) == {"over_share": 8}


def test_within_a_guarantee_it_is_a_tenants_own_that_goes() -> None:
    pool = pool_of(4, ann=2, bob=2)
    serve(pool, "bob", "ab", 1.0)
    for at in range(5):
        serve(pool, "ann", unique(at), 2.0 + at)
    assert texts(pool, "bob") == ["a", "ab"]
    assert texts(pool, "ann") == [unique(3), unique(4)]
    assert set(pool.evicted.values()) == {"lru"}


def test_a_guarantee_that_is_lowered_drains_as_room_is_needed() -> None:
    pool = pool_of(8, ann=6)
    serve(pool, "ann", "abcdef", 1.0)
    pool.shares = guaranteed(8, ann=2, bob=6)
    assert (len(used(pool, "ann")), pool.evictions) == (6, 0)
    serve(pool, "bob", "abc", 2.0)
    assert (len(used(pool, "ann")), len(used(pool, "bob"))) == (5, 3)
    serve(pool, "bob", "abcdef", 3.0)
    assert (texts(pool, "ann"), len(used(pool, "bob"))) == (["a", "ab"], 6)


def test_shares_that_change_between_two_demands_count_for_the_second() -> None:
    pool = pool_of(4, ann=4)
    serve(pool, "ann", "abcd", 1.0)
    assert not serve(pool, "bob", "a", 2.0)
    pool.shares = Shares()
    assert serve(pool, "bob", "a", 3.0)
    assert texts(pool, "ann") == ["a", "ab", "abc"]


def test_a_tenant_that_is_removed_keeps_its_blocks_until_somebody_wants_the_room() -> None:
    pool = pool_of(6, ann=3, bob=3)
    serve(pool, "ann", "abc", 1.0)
    serve(pool, "bob", "abc", 2.0)
    pool.shares = guaranteed(6, bob=3)
    pool.check()
    assert texts(pool, "ann")[-1] == "abc"
    serve(pool, "cid", "abc", 3.0)
    assert (texts(pool, "ann"), len(used(pool, "bob")), len(used(pool, "cid"))) == ([], 3, 3)
    assert "ann" not in pool.charges()


def test_what_is_pinned_counts_and_stays() -> None:
    """Eve holds all that she has: there is nothing to take, and what she asks for is refused."""
    pool = pool_of(6, ann=2)
    serve(pool, "ann", "ab", 1.0)
    held = pool.reserve(4, Demand("eve", False, 2.0))
    assert not serve(pool, "eve", "a", 3.0)
    assert texts(pool, "ann") == ["a", "ab"]
    assert pool.charges()["eve"] == {"in_flight": 4}
    pool.release(held)
    assert serve(pool, "eve", "a", 4.0)


def test_what_is_held_stays_though_what_followed_it_goes() -> None:
    pool = pool_of(3)
    serve(pool, "ann", "abc", 1.0)
    pool.hold(pool.match(keys("ann", "a")))
    assert not serve(pool, "bob", "xyz", 2.0)
    assert serve(pool, "bob", "xy", 3.0)
    assert texts(pool, "ann") == ["a"]


def test_who_asks_counts_all_that_it_asks_for_as_its_own() -> None:
    """With the three pages that are free eve comes to five, more than ann's four: her own go first."""
    pool = pool_of(10)
    serve(pool, "ann", "abcd", 1.0)
    serve(pool, "eve", "bc", 2.0)
    serve(pool, "eve", "d", 3.0)
    pool.reserve(4, Demand("eve", False, 4.0))
    assert (len(used(pool, "ann")), len(used(pool, "eve"))) == (4, 2)


# -- weights ---------------------------------------------------------------------------------------------
def test_what_is_nobodys_goes_by_weight() -> None:
    pool = BlockPool(12, claim_s=inf)
    pool.shares = Shares({"ann": Share(weight=2), "bob": Share(weight=1)})
    for at in range(40):
        serve(pool, "ann" if at % 4 else "bob", unique(at), float(at))
    assert (len(used(pool, "ann")), len(used(pool, "bob"))) == (8, 4)


def test_a_new_weight_counts_from_the_next_demand() -> None:
    pool = BlockPool(12, claim_s=inf)
    for at in range(40):
        serve(pool, "ann" if at % 2 else "bob", unique(at), float(at))
    assert len(used(pool, "ann")) == 6
    pool.shares = Shares({"ann": Share(weight=3)})
    for at in range(40, 80):
        serve(pool, "ann" if at % 2 else "bob", unique(at), float(at))
    assert (len(used(pool, "ann")), len(used(pool, "bob"))) == (9, 3)


def test_what_nobody_has_used_for_long_goes_first_the_oldest_of_all() -> None:
    """Bob has fewer than ann, but two that are old; ann's one that is old is older than the second of them."""
    pool = pool_of(7, claim_s=100.0)
    for tenant, text, now in (("bob", "o", 1.0), ("ann", "o", 2.0), ("bob", "p", 3.0)):
        serve(pool, tenant, text, now)
    serve(pool, "ann", "abcd", 150.0)
    gone: list[bytes] = []
    pool.on_evict = lambda block, rule: gone.append(block.key)
    serve(pool, "cid", "xyz", 160.0)
    assert gone == [b"bob:o", b"ann:o", b"bob:p"]
    assert set(pool.evicted.values()) == {"unclaimed"}
    serve(pool, "cid", "xyzw", 161.0)
    assert gone[3:] == [b"ann:abcd"]


def test_what_is_old_is_safe_within_a_guarantee() -> None:
    pool = pool_of(4, claim_s=100.0, ann=2)
    serve(pool, "ann", "ab", 1.0)
    serve(pool, "eve", "ab", 1e6)
    serve(pool, "bob", "a", 1e6 + 1)
    assert (texts(pool, "ann"), texts(pool, "eve")) == (["a", "ab"], ["a"])


# -- speculation -----------------------------------------------------------------------------------------
def test_speculation_counts_towards_no_guarantee() -> None:
    pool = pool_of(4, ann=4)
    serve(pool, "ann", "abcd", 1.0, until=1e9)
    assert serve(pool, "eve", "ab", 2.0)
    assert texts(pool, "ann") == ["a", "ab"]
    assert rules(pool) == {"speculative_of_other_tenant": 2}


def test_speculation_goes_first_of_the_tenant_that_has_the_most_by_weight() -> None:
    pool = pool_of(8)
    pool.shares = Shares({"bob": Share(weight=4)})
    serve(pool, "cid", "ab", 1.0)
    serve(pool, "ann", "ab", 2.0, until=1e9)
    serve(pool, "bob", "abcd", 3.0, until=1e9)
    serve(pool, "eve", "a", 4.0)
    assert [len(texts(pool, tenant)) for tenant in ("ann", "bob", "cid")] == [1, 4, 2]
    serve(pool, "eve", "abcd", 5.0)
    assert [len(texts(pool, tenant)) for tenant in ("ann", "bob", "cid")] == [0, 2, 2]


def test_before_anothers_used_block_goes_ones_own_speculation_does() -> None:
    pool = pool_of(8, eve=4)
    serve(pool, "ann", "abcdef", 1.0)
    serve(pool, "eve", "xy", 2.0, until=1e9)
    serve(pool, "eve", "abc", 3.0)
    assert (len(texts(pool, "ann")), texts(pool, "eve")) == (5, ["a", "ab", "abc"])
    assert rules(pool) == {"own_speculation": 2, "over_share": 1}


def test_a_hold_that_was_prolonged_keeps_its_place() -> None:
    """Else it had gone as expired; so it is younger than what ann used before."""
    pool = pool_of(2)
    serve(pool, "ann", "o", 1.0)
    serve(pool, "ann", "p", 2.0, until=10.0)
    pool.extend_hold(pool.match(keys("ann", "p")), 100.0, "ann")
    pool.reserve(1, Demand("ann", False, 50.0))
    assert texts(pool, "ann") == ["p"]


def test_what_one_preloads_counts_as_used_with_the_request_that_finds_it() -> None:
    """Cid asks for two pages beside the one that waits for him, which with another makes four: more than bob has."""
    pool = BlockPool(6, claim_s=inf)
    serve(pool, "bob", "abc", 1.0)
    serve(pool, "cid", "x", 2.0)
    serve(pool, "cid", "a", 3.0, until=1e9)
    serve(pool, "cid", "abc", 4.0)
    assert (texts(pool, "bob"), texts(pool, "cid")) == (["a", "ab", "abc"], ["a", "ab", "abc"])


@pytest.mark.parametrize("tenant", ["ann", "bob"])
def test_a_preload_takes_nothing_of_anothers(tenant: str) -> None:
    pool = pool_of(6, bob=1)
    serve(pool, "cid", "abcd", 1.0)
    serve(pool, "dan", "ab", 2.0, until=3.0)
    assert not serve(pool, tenant, "a", 10.0, until=20.0)
    assert (len(texts(pool, "cid")), len(texts(pool, "dan"))) == (4, 2)


def test_a_preload_takes_no_groups_block_that_another_uses() -> None:
    pool = pool_of(3)
    for tenant in ("bob", "ann"):
        serve(pool, tenant, "ab", 1.0, group="g")
    serve(pool, "ann", "x", 0.5)
    assert not serve(pool, "ann", "abc", 10.0, until=20.0)
    assert serve(pool, "ann", "y", 11.0, until=20.0)
    assert (texts(pool, "g"), texts(pool, "ann")) == (["a", "ab"], ["y"])


# -- groups ----------------------------------------------------------------------------------------------
def test_a_groups_block_stays_for_who_is_within_its_guarantee_though_another_is_over() -> None:
    pool = pool_of(6, ann=2, bob=2)
    serve(pool, "ann", "ab", 1.0, group="g")
    serve(pool, "eve", "ab", 2.0, group="g")
    serve(pool, "eve", "xyzw", 3.0)
    serve(pool, "bob", "ab", 4.0)
    assert (texts(pool, "g"), texts(pool, "eve")) == (["a", "ab"], ["x", "xy"])


def test_a_groups_block_goes_where_all_who_pay_are_over() -> None:
    pool = pool_of(6, bob=2)
    serve(pool, "ann", "ab", 1.0, group="g")
    serve(pool, "eve", "ab", 2.0, group="g")
    serve(pool, "eve", "xyzw", 3.0)
    serve(pool, "bob", "ab", 4.0)
    assert (texts(pool, "g"), len(texts(pool, "eve"))) == ([], 4)


def test_a_third_tenants_guarantee_is_met_though_a_group_holds_all() -> None:
    """Ann pays for three of six, which are guaranteed to her; eve for three, and has to stop."""
    pool = pool_of(6, ann=3, bob=3)
    serve(pool, "ann", "abcdef", 1.0, group="g")
    serve(pool, "eve", "abcdef", 2.0, group="g")
    assert pool.charges() == {"ann": {"used": 3}, "eve": {"used": 3}}
    assert serve(pool, "bob", "xyz", 3.0)
    pool.check()
    assert texts(pool, "g") == ["a", "ab", "abc"]
    assert len(texts(pool, "bob")) == 3
    assert pool.accounts.used("ann") + pool.accounts.used("eve") == 3
    assert pool.accounts.used("ann") > 2


def test_where_even_that_does_not_help_all_pay_as_before() -> None:
    pool = pool_of(6, ann=3, bob=3)
    for now, tenant in ((1.0, "ann"), (2.0, "eve")):
        serve(pool, tenant, "abcdef", now, group="g")
    pool.hold(pool.match(keys("g", "abcdef")))
    assert not serve(pool, "bob", "xyz", 3.0)
    assert pool.charges() == {"ann": {"used": 3}, "eve": {"used": 3}}
    assert all(list(block.payers or ()) == ["ann", "eve"] for block in pool.resident.values())
    pool.release(pool.match(keys("g", "abcdef")))
    pool.check()
    assert serve(pool, "bob", "xyz", 4.0)


def test_it_is_met_too_where_one_is_over_only_by_what_others_gave_up() -> None:
    """Eve and fay give up all eight, and then ann some: only then does bob pay for more than is guaranteed to him."""
    pool = pool_of(8, ann=2, bob=4, cid=1)
    for now, tenant in enumerate(("ann", "bob", "eve", "fay")):
        serve(pool, tenant, "abcdefgh", float(now), group="g")
    assert serve(pool, "cid", "x", 4.0)
    pool.check()
    assert texts(pool, "g")[-1] == "abcdefg"


def test_who_can_wait_takes_nothing_of_who_has_less() -> None:
    """Nor does anybody stop paying for his sake, or answer for what another did."""
    pool = pool_of(6, ann=2)
    for now, tenant in ((1.0, "ann"), (2.0, "eve")):
        serve(pool, tenant, "a", now, group="g")
    serve(pool, "eve", "x", 3.0)
    held = pool.reserve(4, Demand("cid", False, 4.0))
    with pytest.raises(PoolFull):
        pool.reserve(1, Demand("cid", False, 5.0, patient=True))
    pool.release(held)
    pool.check()
    assert pool.charges() == {"ann": {"used": 0.5}, "eve": {"used": 1.5}}
    assert pool.match(keys("g", "a"))[0].tenant == "eve"


def test_a_large_group_that_is_over_is_no_burden() -> None:
    pool = pool_of(3000, bob=1000, ann=1000)
    for tenant in ("ann", "eve"):
        serve(pool, tenant, "x" * 2000, 1.0, group="g")
        serve(pool, tenant, "y" * 500, 2.0)
    assert serve(pool, "bob", "z" * 1000, 3.0)
    pool.check()


def test_a_page_of_another_tenants_opens_in_the_midst_of_a_demand() -> None:
    """A private block behind a public one: both are to go, and the public one only when nothing follows it."""
    pool = pool_of(3)
    serve(pool, OPERATOR, "a", 1.0)
    (public,) = pool.match(keys(OPERATOR, "a"))
    (block,) = pool.reserve(1, Demand("ann", False, 2.0))
    pool.publish(block, b"ann", public)
    pool.release([block])
    assert serve(pool, "bob", "xyz", 3.0)
    pool.check()
    assert len(texts(pool, "bob")) == 3


# -- the value order -------------------------------------------------------------------------------------
def indexed(values: dict[str, float], pages: int, **promised: int) -> BlockPool:
    """A pool that goes by these values, which may be changed, of single blocks."""
    pool = BlockPool(pages, ByIndex(lambda block, now: values[block.key.decode()]), claim_s=inf)
    pool.shares = guaranteed(pages, **promised)
    return pool


def test_of_one_tenant_the_least_worth_goes_first() -> None:
    values = {"ann:a": 3.0, "ann:b": 1.0, "ann:c": 2.0, "bob:a": 0.5}
    pool = indexed(values, 4, bob=1)
    serve(pool, "bob", "a", 0.0)
    for now, text in enumerate("abc"):
        serve(pool, "ann", text, float(now))
    pool.reserve(2, Demand("ann", False, 10.0))
    assert (texts(pool, "ann"), texts(pool, "bob")) == (["a"], ["a"])
    assert set(pool.evicted.values()) == {"index"}


def test_what_becomes_worth_less_is_seen_in_time() -> None:
    """Both have been looked at; a second later the last has become the least."""
    values = {"ann:a": 1.0, "ann:b": 2.0, "ann:c": 3.0}
    pool = indexed(values, 3)
    for now, text in enumerate("abc"):
        serve(pool, "ann", text, float(now))
    pool.reserve(1, Demand("ann", False, 10.0))
    assert texts(pool, "ann") == ["b", "c"]
    values["ann:c"] = 0.0
    pool.reserve(1, Demand("ann", False, 11.5))
    assert texts(pool, "ann") == ["b"]


def test_it_is_seen_too_where_the_clock_has_gone_back() -> None:
    values = {"ann:a": 1.0, "ann:b": 2.0, "ann:c": 3.0}
    pool = indexed(values, 3)
    for now, text in enumerate("abc"):
        serve(pool, "ann", text, float(now))
    pool.reserve(1, Demand("ann", False, 1e6))
    values["ann:c"] = 0.0
    pool.reserve(1, Demand("ann", False, 10.0))
    assert texts(pool, "ann") == ["b"]


def test_it_is_seen_within_a_guarantee_too() -> None:
    """Nobody is over: what ann lacks is her own, and eve's is held."""
    values = {"ann:a": 1.0, "ann:b": 2.0, "ann:c": 3.0}
    pool = indexed(values, 6, ann=4)
    for now, text in enumerate("abc"):
        serve(pool, "ann", text, float(now))
    pool.reserve(3, Demand("eve", False, 5.0))
    assert serve(pool, "ann", "b", 6.0)
    pool.release(pool.reserve(1, Demand("ann", False, 7.0)))
    assert texts(pool, "ann") == ["b", "c"]
    serve(pool, "ann", "a", 7.1)
    values["ann:b"], values["ann:c"] = 9.0, 0.0
    pool.reserve(1, Demand("ann", False, 9.0))
    assert texts(pool, "ann") == ["a", "b"]


@pytest.mark.parametrize("value", [0.0, -inf, inf, nan])
def test_whatever_everything_is_worth_a_live_request_is_served(value: float) -> None:
    pool = BlockPool(4, ByIndex(lambda block, now: value), claim_s=10.0)
    serve(pool, "ann", "ab", 1.0)
    serve(pool, "eve", "ab", 2.0)
    assert serve(pool, "bob", "abcd", 100.0)
    pool.check()


def test_a_preload_takes_only_what_is_worth_less() -> None:
    pool = indexed({"ann:a": 1.0, "ann:b": 2.0}, 2)
    serve(pool, "ann", "a", 1.0)
    serve(pool, "ann", "b", 2.0)
    with pytest.raises(PoolFull):
        pool.reserve(1, Demand("ann", True, 3.0, worth=1.0))
    pool.reserve(1, Demand("ann", True, 3.0, worth=1.5))
    assert texts(pool, "ann") == ["b"]


def test_another_order_holds_from_the_next_demand() -> None:
    values = {"ann:a": 2.0, "ann:b": 1.0, "ann:c": 1.5}
    pool = BlockPool(3)
    for now, text in enumerate("abc"):
        serve(pool, "ann", text, float(now))
    pool.order = ByIndex(lambda block, now: values[block.key.decode()])
    pool.reserve(1, Demand("ann", False, 10.0))
    assert texts(pool, "ann") == ["a", "c"]
    pool.order = ByAge()
    pool.reserve(1, Demand("ann", False, 11.0))
    assert texts(pool, "ann") == ["c"]


# -- size ------------------------------------------------------------------------------------------------
def test_a_smaller_pool_is_shared_by_the_same_fractions() -> None:
    pool = pool_of(8, ann=4, bob=4)
    serve(pool, "ann", "abcd", 1.0)
    serve(pool, "bob", "abcd", 2.0)
    pool.vacate(4, 3.0)
    assert (len(used(pool, "ann")), len(used(pool, "bob")), pool.free_pages) == (2, 2, 4)


def test_a_pool_becomes_smaller_at_nobodys_demand() -> None:
    """What is no longer there counts as nobody's, not as the operator's, who has less than eve."""
    pool = pool_of(8)
    serve(pool, OPERATOR, "ab", 1.0)
    serve(pool, "eve", "abcdef", 2.0)
    pool.vacate(4, 3.0)
    assert (len(used(pool, OPERATOR)), len(used(pool, "eve"))) == (2, 2)


def test_where_a_pool_cannot_be_so_small_guarantees_are_as_before() -> None:
    pool = pool_of(8, ann=4)
    serve(pool, "ann", "abcd", 1.0)
    pool.reserve(4, Demand("eve", False, 2.0))
    with pytest.raises(PoolFull):
        pool.vacate(5, 3.0)
    assert not serve(pool, "eve", "ab", 4.0)
    assert len(used(pool, "ann")) == 4


class Counting(ByAge):
    """Counts how often it is asked."""

    asked = 0

    def key(self, leaf: Block, now: float) -> float:  # type: ignore[override]
        self.asked += 1
        return super().key(leaf, now)


def test_of_a_hundred_thousand_tenants_a_demand_looks_at_few() -> None:
    order = Counting()
    pool = BlockPool(100_000, order)
    pool.take_in([Block(at, str(at), State.RESIDENT, at / 1000, key=b"%d" % at) for at in range(100_000)])
    taken = pool.reserve(64, Demand("eve", False, 101.0))  # all are new to it
    order.asked = 0
    for at in range(20):
        taken += pool.reserve(64, Demand("eve", False, 102.0 + at))
    assert order.asked < 20 * 64 * 5
    assert pool.evictions == 21 * 64
    assert set(pool.evicted.values()) == {"over_share"}
    pool.release(taken)
    pool.check()
