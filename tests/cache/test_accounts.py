"""Who pays for what: private and public pages, and those that a group uses together."""

from collections import Counter
from math import inf

import hypothesis.strategies as st
import pytest
from fair_pools import guaranteed, keys, serve, texts
from hypothesis import given

from kvprefetch.cache.accounts import AGE_S, PART, Accounts, parts
from kvprefetch.cache.block import Block, Charge, State
from kvprefetch.cache.evict import Demand
from kvprefetch.cache.pool import BlockPool
from kvprefetch.cache.rebuild import Kept, rebuild
from kvprefetch.cache.shares import OPERATOR


def charged(pool: BlockPool) -> dict[str, float]:
    """All pages by tenant."""
    pool.check()
    return {tenant: sum(kinds.values()) for tenant, kinds in pool.charges().items()}


def shared_block(pool: BlockPool, *uses: tuple[str, float]) -> Block:
    """A group's block that these have used, one after another."""
    for tenant, now in uses:
        assert serve(pool, tenant, "a", now, group="g")
    return pool.resident[keys("g", "a")[0]]


# -- as what ---------------------------------------------------------------------------------------------
def test_a_page_is_paid_for_in_every_state() -> None:
    pool = BlockPool(8)
    block, other = pool.reserve(2, Demand("ann", False, 0.0))
    assert pool.charges() == {"ann": {"in_flight": 2}}
    pool.quarantine(other)
    assert pool.charges() == {"ann": {"in_flight": 1, "quarantined": 1}}
    pool.publish(block, b"k", None, speculative_until=60.0)
    assert pool.charges() == {"ann": {"speculative": 1, "quarantined": 1}}
    pool.touch([block], 1.0, "s", "ann")
    assert pool.charges() == {"ann": {"used": 1, "quarantined": 1}}
    pool.release([block, other])
    pool.readmit(other)
    pool.evict(block, "test")
    assert pool.charges() == {}
    assert pool.accounts.charged == {}


def test_only_unused_speculation_does_not_count_as_used() -> None:
    accounts = Accounts()
    for pages, kind in enumerate(Charge, start=1):
        accounts.add("ann", kind, pages)
    assert accounts.used("ann") == 1 + 3 + 4
    assert accounts.of("ann", Charge.SPECULATIVE) == 2
    assert (accounts.used("bob"), accounts.of("bob", Charge.USED)) == (0, 0)


def test_public_pages_are_the_operators_whoever_uses_them() -> None:
    pool = BlockPool(4)
    serve(pool, OPERATOR, "ab", 1.0)
    pool.touch(pool.match(keys(OPERATOR, "ab")), 2.0, "s", "ann")
    assert charged(pool) == {OPERATOR: 2}


@pytest.mark.parametrize("name", ["a b\0c\n", "Ünïcode ☃", "x" * 10_000, "'; drop --", "%s{}"])
def test_a_tenant_may_have_any_name(name: str) -> None:
    pool = BlockPool(4)
    assert serve(pool, name, "aab", 1.0)
    assert serve(pool, "ann", "ab", 2.0)
    assert charged(pool) == {name: 2, "ann": 2}


# -- in groups -------------------------------------------------------------------------------------------
def test_those_who_use_a_block_pay_equal_parts() -> None:
    pool = BlockPool(4)
    shared_block(pool, ("ann", 1.0), ("bob", 2.0))
    assert charged(pool) == {"ann": 0.5, "bob": 0.5}
    shared_block(pool, ("cid", 3.0))
    assert charged(pool) == pytest.approx({"ann": 1 / 3, "bob": 1 / 3, "cid": 1 / 3}, abs=PART)
    assert sum(charged(pool).values()) == 1


@given(st.integers(1, 1000))
def test_parts_are_equal_and_add_up_to_a_page_exactly(payers: int) -> None:
    found = [part for _, part in parts(dict.fromkeys(map(str, range(payers)), 0.0))]
    assert sum(found) == 1
    assert max(found) - min(found) <= PART
    assert all(part / PART == int(part / PART) for part in found)


def test_one_touch_long_ago_does_not_pay_for_ever() -> None:
    pool = BlockPool(4)
    shared_block(pool, ("ann", 0.0), ("bob", 100.0))
    pool.line.age(AGE_S - 1)
    assert charged(pool) == {"ann": 0.5, "bob": 0.5}
    pool.line.age(AGE_S)
    assert charged(pool) == {"bob": 1}


def test_the_last_to_have_used_it_goes_on_to_pay() -> None:
    pool = BlockPool(4)
    block = shared_block(pool, ("ann", 0.0), ("bob", 100.0))
    pool.line.age(1e6)
    assert charged(pool) == {"bob": 1}
    assert block.tenant == "bob"
    shared_block(pool, ("ann", 1e6))
    assert charged(pool) == {"ann": 1}


def test_who_uses_it_again_goes_on_to_pay_its_part() -> None:
    pool = BlockPool(4)
    shared_block(pool, ("ann", 0.0), ("bob", 100.0), ("ann", 200.0))
    pool.line.age(AGE_S + 50)
    assert charged(pool) == {"ann": 0.5, "bob": 0.5}
    pool.line.age(AGE_S + 100)
    assert charged(pool) == {"ann": 1}


def test_who_only_preloaded_it_pays_until_somebody_uses_it() -> None:
    pool = BlockPool(4)
    assert serve(pool, "ann", "a", 0.0, group="g", until=60.0)
    assert pool.charges() == {"ann": {"speculative": 1}}
    shared_block(pool, ("bob", 1.0))
    assert pool.charges() == {"bob": {"used": 1}}
    shared_block(pool, ("ann", 2.0))
    assert charged(pool) == {"ann": 0.5, "bob": 0.5}


def test_whoever_answers_for_a_block_stands_in_line_with_it() -> None:
    """Ann has used it last, but does not pay any more: bob does, and it goes for him."""
    pool = BlockPool(2)
    shared_block(pool, ("ann", 0.0), ("bob", 10.0), ("ann", 20.0))
    for now, text in ((25.0, "x"), (30.0, "y")):
        serve(pool, "bob", text, now)  # looks at all that are bob's
    pool.line.age(AGE_S + 1)
    assert charged(pool) == {"bob": 2}
    assert serve(pool, "bob", "zz", AGE_S + 2)


def test_who_uses_what_nobody_holds_stands_in_line_with_it() -> None:
    pool = BlockPool(1)
    block = shared_block(pool, ("ann", 0.0))
    pool.touch([block], 1.0, "s", "bob")
    assert (charged(pool), block.tenant) == ({"ann": 0.5, "bob": 0.5}, "bob")


def test_a_demand_sees_who_does_not_pay_any_more() -> None:
    pool = BlockPool(2, claim_s=inf)
    shared_block(pool, ("ann", 0.0), ("bob", 100.0))
    serve(pool, "cid", "x", AGE_S)
    serve(pool, "cid", "y", AGE_S + 1)
    assert charged(pool) == {"bob": 1, "cid": 1}


def test_what_is_gone_is_paid_by_nobody_however_old_it_gets() -> None:
    pool = BlockPool(4)
    block = shared_block(pool, ("ann", 0.0), ("bob", 1.0))
    serve(pool, "ann", "c", 2.0)
    pool.evict(block, "test")
    pool.line.age(1e6)
    assert charged(pool) == {"ann": 1}


def test_what_is_dropped_is_paid_by_the_group_until_its_page_is_free() -> None:
    pool = BlockPool(4)
    block = shared_block(pool, ("ann", 0.0), ("bob", 100.0))
    pool.hold([block])
    pool.drop(block, "damaged")
    assert pool.charges() == {"ann": {"quarantined": 0.5}, "bob": {"quarantined": 0.5}}
    pool.line.age(AGE_S + 1)
    assert pool.charges() == {"bob": {"quarantined": 1}}
    pool.release([block])
    assert charged(pool) == {}


def test_uses_that_follow_each_other_are_kept_as_one() -> None:
    pool = BlockPool(4)
    shared_block(pool, *(("ann", float(now)) for now in range(60)))
    assert len(pool.accounts._uses) == 1


def test_uses_are_forgotten_where_a_pool_is_never_full() -> None:
    pool = BlockPool(4)
    shared_block(pool, *(("ann", 100.0 * at) for at in range(1000)))
    assert len(pool.accounts._uses) <= AGE_S / 100 + 1


def test_a_clock_that_goes_back_stands_still() -> None:
    pool = BlockPool(4)
    shared_block(pool, ("ann", 1000.0), ("bob", 10.0))
    assert charged(pool) == {"ann": 0.5, "bob": 0.5}
    pool.line.age(20.0)
    assert charged(pool) == {"ann": 0.5, "bob": 0.5}
    pool.line.age(1000.0 + AGE_S)
    assert charged(pool) == {"bob": 1}


def test_a_groups_block_is_one_again_after_a_restart() -> None:
    pool = BlockPool(4)
    rebuild(pool, [Kept(2, keys("g", "a")[0], b"", "ann", shared=True)], {}, 5.0)
    assert charged(pool) == {"ann": 1}
    shared_block(pool, ("bob", 6.0))
    assert charged(pool) == {"ann": 0.5, "bob": 0.5}
    pool.line.age(AGE_S + 5)
    assert charged(pool) == {"bob": 1}


# -- attacks ---------------------------------------------------------------------------------------------
def test_who_never_touches_has_nothing_of_it() -> None:
    """Looking takes no reference and keeps nothing: the block goes when those who use it would lose it."""
    pool = BlockPool(2)
    serve(pool, "ann", "a", 1.0, group="g")
    serve(pool, "ann", "b", 2.0, group="g")
    for _ in range(5):
        pool.match(keys("g", "a"))
    assert charged(pool) == {"ann": 2}
    serve(pool, "ann", "c", 3.0, group="g")
    assert texts(pool, "g") == ["b", "c"]


def test_a_second_identity_pays_for_itself() -> None:
    """Of a block that two use, eve under two names pays two parts, and no less than under one."""
    pool = BlockPool(4)
    shared_block(pool, ("ann", 1.0), ("eve", 2.0))
    assert charged(pool) == {"ann": 0.5, "eve": 0.5}
    shared_block(pool, ("eve2", 3.0))
    assert sum(pages for tenant, pages in charged(pool).items() if tenant != "ann") == pytest.approx(2 / 3, abs=PART)


def test_who_touches_just_before_it_would_go_pays_as_long_as_others() -> None:
    pool = BlockPool(2)
    serve(pool, "ann", "a", 1.0, group="g")
    serve(pool, "ann", "b", 2.0)
    shared_block(pool, ("eve", 3.0))  # else it went next
    assert serve(pool, "ann", "c", 4.0)
    assert texts(pool, "g") == ["a"]
    assert charged(pool) == {"ann": 1.5, "eve": 0.5}
    pool.line.age(AGE_S + 1)
    assert charged(pool) == {"ann": 1, "eve": 1}


def test_who_lets_others_preload_pays_from_the_first_use() -> None:
    pool = BlockPool(4)
    serve(pool, "ann", "ab", 1.0, group="g", until=60.0)
    serve(pool, "eve", "ab", 2.0, group="g")
    assert charged(pool) == {"eve": 2}


def test_who_is_over_its_guarantee_is_not_kept_by_those_who_are_not() -> None:
    """Ann is within her guarantee, so what she shares with eve stays; what is eve's alone goes, every page of it."""
    pool = BlockPool(6)
    pool.shares = guaranteed(6, ann=2, bob=4)
    for tenant in ("eve", "ann"):
        serve(pool, tenant, "aa", 1.0, group="g")
    serve(pool, "eve", "bbbb", 2.0)
    assert serve(pool, "bob", "cccc", 3.0)
    assert (texts(pool, "g"), texts(pool, "eve")) == (["a", "aa"], [])


uses = st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from([1.0, 50.0, 90.0, 300.0, 601.0, -40.0])), min_size=1)


@given(uses)
def test_who_has_used_a_block_lately_pays_and_who_has_not_does_not(uses: list[tuple[str, float]]) -> None:
    """Uses within an eighth of the time count as the first of them."""
    accounts, latest, now = Accounts(), dict[str, float](), 0.0
    block = Block(0, "a", State.RESIDENT, 0.0)
    accounts.share(block, now)
    latest["a"] = now
    time, last = now, "a"
    for tenant, wait in uses:
        time += wait
        now, last = max(now, time), tenant
        accounts.use(block, tenant, time)
        accounts.age(time)
        latest[tenant] = now
        payers = block.payers or {}
        assert all(now - latest[payer] < AGE_S for payer in payers.keys() - {last})
        assert {who for who, at in latest.items() if now - at < AGE_S * 7 / 8} <= payers.keys()
        assert block.tenant == last
        owed = Counter({(payer, Charge.USED): part for payer, part in parts(payers)})
        assert {(t, kind): n for t, kinds in accounts.charged.items() for kind, n in kinds.items()} == owed
