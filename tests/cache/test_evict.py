"""The rules for one pool that serves all alike, and the order in which `BlockPool` has them."""

import pytest
from tiny_pools import keep, keys_of, live, opened, preload, resident

from kvprefetch.cache.block import Block, State, Unused
from kvprefetch.cache.evict import Demand, Rank, choose_victims, lru
from kvprefetch.cache.pool import BlockPool
from kvprefetch.errors import PoolFull


def block(tenant: str, last_used: float = 0.0, hold_until: float | None = None) -> Block:
    """A resident block: used, or unused speculation if a hold is given."""
    found = Block(0, tenant, State.RESIDENT, last_used)
    if hold_until is not None:
        found.unused = Unused(hold_until)
    return found


USED = {"last_used": 3.0}
ON_HOLD = {"last_used": 4.0, "hold_until": 60.0}
EXPIRED = {"last_used": 5.0, "hold_until": 10.0}


@pytest.mark.parametrize(
    ("tenant", "kind", "rank"),
    [
        ("ann", EXPIRED, Rank(0, 5.0, "hold_expired")),
        ("bob", EXPIRED, Rank(0, 5.0, "hold_expired")),
        ("bob", ON_HOLD, Rank(1, 4.0, "speculative_of_other_tenant")),
        ("ann", ON_HOLD, Rank(2, 4.0, "lru")),
        ("ann", USED, Rank(2, 3.0, "lru")),
        ("bob", USED, Rank(2, 3.0, "lru")),
    ],
)
def test_a_live_request_takes(tenant: str, kind: dict[str, float], rank: Rank) -> None:
    assert lru(block(tenant, **kind), live("ann", now=10.0)) == rank


@pytest.mark.parametrize(
    ("tenant", "kind", "rank"),
    [
        ("ann", EXPIRED, Rank(0, 5.0, "hold_expired")),
        ("ann", ON_HOLD, Rank(1, 4.0, "newer_preload")),
        ("ann", USED, Rank(2, 3.0, "lru")),
        ("bob", EXPIRED, None),
        ("bob", ON_HOLD, None),
        ("bob", USED, None),
    ],
)
def test_a_preload_takes(tenant: str, kind: dict[str, float], rank: Rank | None) -> None:
    assert lru(block(tenant, **kind), preload("ann", now=10.0)) == rank


def texts_by_eviction(pool: BlockPool, texts: dict[str, str], demand: Demand) -> list[str]:
    """Single-block texts (text → tenant) in the order in which `demand` takes them; stops when it is refused."""
    names = {keys_of(text, tenant)[0]: text for text, tenant in texts.items()}
    gone: list[str] = []
    pool.on_evict = lambda victim, rule: gone.append(names[victim.key])
    for _ in texts:
        try:
            pool.reserve(1, demand)
        except PoolFull:
            break
    return gone


def mixed_pool() -> tuple[BlockPool, dict[str, str]]:
    """Full; at time 50, "old?" holds have expired. Ages count against the order that the rules give."""
    pool = BlockPool(6)
    texts = {}
    for text, tenant, now, until in (
        ("usea", "ann", 1.0, None),
        ("useb", "bob", 2.0, None),
        ("hola", "ann", 3.0, 99.0),
        ("holb", "bob", 4.0, 99.0),
        ("olda", "ann", 5.0, 50.0),
        ("oldb", "bob", 6.0, 50.0),
    ):
        keep(pool, text, tenant, now=now, until=until)
        texts[text] = tenant
    return pool, texts


def test_for_a_live_request_expired_speculation_goes_first_then_that_of_others_then_of_who_has_the_most() -> None:
    """That is ann, the more so with each page: her oldest, whether used or not, before the one of bob."""
    pool, texts = mixed_pool()
    assert texts_by_eviction(pool, texts, live("ann", now=50.0)) == ["olda", "oldb", "holb", "usea", "hola", "useb"]
    assert [pool.evicted[keys_of(text, texts[text])[0]] for text in texts] == [
        "lru",
        "over_share",
        "lru",
        "speculative_of_other_tenant",
        "hold_expired",
        "hold_expired",
    ]


def test_a_preload_displaces_its_own_speculation_then_its_own_blocks_and_nobody_elses() -> None:
    pool, texts = mixed_pool()
    assert texts_by_eviction(pool, texts, preload("ann", now=50.0)) == ["olda", "hola", "usea"]
    assert [resident(pool, text, "bob") for text in ("useb", "holb", "oldb")] == ["useb", "holb", "oldb"]
    assert [pool.evicted[keys_of(text)[0]] for text in ("olda", "hola", "usea")] == [
        "hold_expired",
        "newer_preload",
        "lru",
    ]


def test_a_hold_has_run_out_at_its_end_and_not_before() -> None:
    speculation = block("ann", hold_until=50.0)
    before, at = lru(speculation, live(now=49.9)), lru(speculation, live(now=50.0))
    assert (before, at) == (Rank(2, 0.0, "lru"), Rank(0, 0.0, "hold_expired"))


def test_speculation_that_was_used_is_no_longer_speculation() -> None:
    pool = BlockPool(2)
    used = keep(pool, "pppp", "ann", until=60.0)
    keep(pool, "aaaa", "ann", now=1.0)
    pool.touch(used, now=2.0)
    pool.reserve(1, live("bob", now=70.0))
    assert resident(pool, "pppp") == "pppp"


def test_the_least_recently_used_goes_first() -> None:
    pool = BlockPool(3)
    for now, text in enumerate(("aaaa", "bbbb", "cccc")):
        keep(pool, text, now=float(now))
    pool.touch(pool.match(keys_of("aaaa")), now=9.0)
    assert texts_by_eviction(pool, dict.fromkeys(("aaaa", "bbbb", "cccc"), "ann"), live(now=10.0)) == [
        "bbbb",
        "cccc",
        "aaaa",
    ]


def test_victims_are_children_before_parents() -> None:
    pool = BlockPool(8)
    trunk, _left = keep(pool, "aaaabbbb", now=1.0)
    keep(pool, "aaaaccccdddd", now=2.0)
    victims = choose_victims(pool.leaves.values(), 4, lru, live(now=3.0))
    order = [victim for victim, _ in victims]
    assert [victim.key for victim in order[:1]] == [keys_of("aaaabbbb")[1]]
    assert order[-1] is trunk
    for victim in order:
        assert all(order.index(child) < order.index(victim) for child in victim.children)


def test_a_parent_stays_while_one_of_its_children_does() -> None:
    pool = BlockPool(8)
    keep(pool, "aaaabbbb", now=1.0)
    keep(pool, "aaaacccc", now=1.0)
    keep(pool, "zzzz", now=50.0)
    pool.touch(pool.match(keys_of("aaaacccc"))[1:], now=60.0)
    victims = choose_victims(pool.leaves.values(), 2, lru, live(now=70.0))
    assert [victim.key for victim, _ in victims] == [keys_of("aaaabbbb")[1], keys_of("zzzz")[0]]


def test_a_parent_that_is_held_is_no_victim() -> None:
    pool = BlockPool(4)
    holder = opened(pool, "aaaa")
    holder.complete(4)
    keep(pool, "aaaabbbb")
    assert len(choose_victims(pool.leaves.values(), 2, lru, live())) == 1


def test_too_few_victims_are_all_that_may_go_and_choosing_changes_nothing() -> None:
    pool = BlockPool(4)
    keep(pool, "aaaabbbb", "ann")
    keep(pool, "xxxx", "bob")
    assert len(choose_victims(pool.leaves.values(), 4, lru, live())) == 3
    assert len(choose_victims(pool.leaves.values(), 3, lru, preload("ann"))) == 2
    assert choose_victims(pool.leaves.values(), 0, lru, live()) == []
    assert resident(pool, "aaaabbbb") == "aaaabbbb"
    assert resident(pool, "xxxx", "bob") == "xxxx"
    pool.check()
