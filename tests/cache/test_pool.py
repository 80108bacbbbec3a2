import pytest
from tiny_pools import BLOCK, keep, keys_of, letters, live, opened, owner, resident, snapshot

from kvprefetch.cache.block import State
from kvprefetch.cache.pool import BlockPool
from kvprefetch.cache.sequence import PagedSequence
from kvprefetch.errors import PoolFull


def test_an_empty_pool_gives_every_page_once() -> None:
    pool = BlockPool(4)
    blocks = pool.reserve(4, live())
    assert sorted(block.page for block in blocks) == [0, 1, 2, 3]
    assert pool.free_pages == 0
    assert {block.state for block in blocks} == {State.IN_FLIGHT}


def test_reserve_is_all_or_nothing() -> None:
    """Two of the three pages wanted could be had; then none is taken, and what could go stays."""
    pool = BlockPool(4)
    holder = opened(pool, "aaaabbbb")
    holder.complete(8)
    keep(pool, "xxxx")
    before = snapshot(pool)
    with pytest.raises(PoolFull, match="3 pages wanted, 1 free"):
        pool.reserve(3, live())
    assert snapshot(pool) == before
    assert resident(pool, "xxxx") == "xxxx"


def test_reserve_takes_free_pages_before_it_evicts() -> None:
    pool = BlockPool(3)
    keep(pool, "aaaa")
    pool.reserve(2, live())
    assert resident(pool, "aaaa") == "aaaa"
    assert pool.evictions == 0


def test_a_block_is_found_only_once_it_is_published() -> None:
    pool = BlockPool(4)
    sequence = opened(pool, "aaaabbbb")
    assert resident(pool, "aaaabbbb") == ""
    sequence.complete(7)
    assert resident(pool, "aaaabbbb") == "aaaa"
    sequence.complete(8)
    assert resident(pool, "aaaabbbb") == "aaaabbbb"
    pool.check()


def test_a_block_is_not_found_behind_another_start() -> None:
    pool = BlockPool(4)
    keep(pool, "aaaabbbb")
    assert resident(pool, "xxxxbbbb") == ""
    assert resident(pool, "bbbb") == ""


def test_matching_takes_no_reference() -> None:
    pool = BlockPool(4)
    keep(pool, "aaaa", now=1.0)
    before = snapshot(pool)
    pool.match(keys_of("aaaa"))
    assert snapshot(pool) == before


def test_of_twins_the_first_published_stays_and_the_duplicate_page_is_freed() -> None:
    pool = BlockPool(4)
    first, second = pool.reserve(2, live())
    key = keys_of("aaaa")[0]
    kept = pool.publish(first, key, None)
    given_back = pool.publish(second, key, None)
    assert kept is first
    assert given_back is first
    assert first.refs == 2
    assert second.page in pool.free
    assert pool.free_pages == 3


def test_eviction_takes_leaves_first() -> None:
    """A parent older than its child still outlives it, for the child is worth nothing without it."""
    pool = BlockPool(3)
    keep(pool, "aaaabbbbcccc")
    pool.touch(pool.match(keys_of("aaaabbbbcccc"))[2:], now=9.0)
    pool.reserve(1, live(now=10.0))
    assert resident(pool, "aaaabbbbcccc") == "aaaabbbb"
    pool.reserve(1, live(now=10.0))
    assert resident(pool, "aaaabbbbcccc") == "aaaa"


def test_a_block_with_a_child_or_a_holder_cannot_be_evicted() -> None:
    pool = BlockPool(4)
    parent, leaf = keep(pool, "aaaabbbb")
    before = snapshot(pool)
    with pytest.raises(ValueError, match="not an unreferenced resident leaf"):
        pool.evict(parent, "test")
    pool.hold([parent, leaf])
    with pytest.raises(ValueError, match="not an unreferenced resident leaf"):
        pool.evict(leaf, "test")
    pool.release([leaf, parent])
    assert snapshot(pool) == before


def test_held_blocks_are_never_evicted() -> None:
    pool = BlockPool(4)
    holder = opened(pool, "aaaabbbb")
    holder.complete(8)
    keep(pool, "xxxx")
    pool.reserve(2, live(now=1e9))
    assert resident(pool, "aaaabbbb") == "aaaabbbb"
    with pytest.raises(PoolFull):
        pool.reserve(1, live(now=1e9))
    pool.clear()
    assert resident(pool, "aaaabbbb") == "aaaabbbb"


def test_released_blocks_stay_until_their_page_is_needed() -> None:
    pool = BlockPool(2)
    keep(pool, "aaaabbbb")
    assert resident(pool, "aaaabbbb") == "aaaabbbb"
    pool.reserve(2, live())
    assert resident(pool, "aaaabbbb") == ""


def test_a_quarantined_page_is_not_used_until_it_is_readmitted() -> None:
    pool = BlockPool(2)
    doubtful = opened(pool, "aaaabbbb").close(quarantine=True)
    pool.check()
    assert [block.state for block in doubtful] == [State.QUARANTINED] * 2
    with pytest.raises(PoolFull):
        pool.reserve(1, live())
    pool.readmit(doubtful[0])
    pool.check()
    assert [block.page for block in pool.reserve(1, live())] == [doubtful[0].page]
    with pytest.raises(PoolFull):
        pool.reserve(1, live())


def test_a_quarantined_page_that_is_still_referenced_is_not_readmitted() -> None:
    pool = BlockPool(2)
    (block,) = pool.reserve(1, live())
    pool.quarantine(block)
    with pytest.raises(ValueError, match="still referenced"):
        pool.readmit(block)
    assert pool.free_pages == 1


def test_the_memory_of_evicted_keys_is_bounded_and_says_so() -> None:
    pool = BlockPool(4, evicted_memory=2)
    for text in ("aaaa", "bbbb"):
        keep(pool, text)
    pool.clear()
    assert set(pool.evicted) == {*keys_of("aaaa"), *keys_of("bbbb")}
    assert not pool.forgot_evictions
    keep(pool, "cccc")
    pool.clear()
    assert set(pool.evicted) == {*keys_of("bbbb"), *keys_of("cccc")}
    assert pool.forgot_evictions


def test_a_block_that_is_back_is_no_longer_remembered_as_evicted() -> None:
    pool = BlockPool(4)
    keep(pool, "aaaa")
    pool.clear()
    assert dict(pool.evicted) == {keys_of("aaaa")[0]: "cleared"}
    keep(pool, "aaaa")
    assert not pool.evicted


def test_clear_evicts_all_that_nobody_holds() -> None:
    pool = BlockPool(8)
    holder = opened(pool, "aaaabbbb")
    holder.complete(4)
    keep(pool, "aaaaxxxxyyyy")
    keep(pool, "zzzz", "bob")
    pool.clear()
    pool.check()
    assert list(pool.resident) == keys_of("aaaa")
    assert pool.free_pages == 6
    holder.close()
    pool.clear()
    assert pool.free_pages == 8


def test_evictions_are_counted_and_told_children_first() -> None:
    pool = BlockPool(4)
    told: list[tuple[bytes, str]] = []
    pool.on_evict = lambda block, rule: told.append((block.key, rule))
    keep(pool, "aaaabbbb")
    pool.reserve(4, live())
    assert told == [(key, "lru") for key in reversed(keys_of("aaaabbbb"))]
    assert pool.evictions == 2


def test_the_first_touch_of_speculation_is_its_use() -> None:
    pool = BlockPool(4)
    blocks = keep(pool, "aaaabbbb", until=60.0)
    assert pool.touch(blocks[:1], now=1.0) == 1
    assert pool.touch(blocks, now=2.0) == 1
    assert pool.touch(blocks, now=3.0) == 0
    assert [block.last_used for block in blocks] == [3.0, 3.0]


def test_a_late_report_of_use_does_not_make_a_block_older() -> None:
    pool = BlockPool(4)
    (block,) = keep(pool, "aaaa")
    pool.touch([block], now=5.0)
    pool.touch([block], now=2.0)
    assert block.last_used == 5.0


def test_a_hold_is_extended_and_never_cut_short() -> None:
    pool = BlockPool(4)
    (block,) = keep(pool, "aaaa", until=60.0)
    pool.extend_hold([block], 90.0, "ann")
    pool.extend_hold([block], 30.0, "ann")
    assert block.hold_until == 90.0


def test_pages_are_charged_to_whom_they_are_for() -> None:
    pool = BlockPool(12)
    keep(pool, "aaaabbbb", "ann")
    keep(pool, "pppp", "ann", until=60.0)
    opened(pool, "cccc", "bob").complete(3)
    opened(pool, "dddddddd", "bob").close(quarantine=True)
    assert pool.charges() == {"ann": {"used": 2, "speculative": 1}, "bob": {"in_flight": 1, "quarantined": 2}}


def test_two_tenants_never_share_a_page() -> None:
    pool = BlockPool(4)
    keep(pool, "aaaa", "ann")
    other = PagedSequence(pool, owner("bob"), letters("aaaa"), BLOCK)
    assert other.open(4, live("bob")) == 0
    assert len(pool.blocks()) == 2


# -- moving ------------------------------------------------------------------------------------------------
def test_relocated_blocks_are_found_where_they_are_now_and_go_leaf_first_as_before() -> None:
    pool = BlockPool(8)
    keep(pool, "aaaabbbb")
    pages = [block.page for block in pool.match(keys_of("aaaabbbb"))]
    pool.relocate([(pages[0], 6), (pages[1], 7)])
    pool.check()
    assert [block.page for block in pool.match(keys_of("aaaabbbb"))] == [6, 7]
    assert sorted(pool.free) == [0, 1, 2, 3, 4, 5]
    pool.clear()
    pool.check()
    assert pool.free_pages == 8


def test_what_may_not_move_is_refused_and_nothing_is_changed() -> None:
    pool = BlockPool(10)
    unheld = keep(pool, "aaaabbbb")[0].page
    keep(pool, "cccc")
    shared, private = (block.page for block in opened(pool, "ccccdddd").blocks)
    before = snapshot(pool)
    for moves in (
        [(shared, 7)],
        [(private, 7)],
        [(7, 6)],
        [(unheld, private)],
        [(unheld, 7), (unheld, 7)],
        [(unheld, 6), (unheld, 7)],
    ):
        with pytest.raises(ValueError, match=r"no resident block that may move|is not free"):
            pool.relocate(moves)
        assert snapshot(pool) == before


def test_another_size_takes_free_pages_alone() -> None:
    pool = BlockPool(8)
    keep(pool, "aaaabbbb")
    pool.relocate([(0, 5)])
    before = snapshot(pool)
    with pytest.raises(ValueError, match="not all from 5 on are free"):
        pool.resize(5)
    assert snapshot(pool) == before
    for pages in (6, 9):
        pool.resize(pages)
        pool.check()
        assert pool.free_pages == pages - 2


def test_sequences_part_at_forks() -> None:
    pool = BlockPool(8)
    for text in ("aaaabbbbcccc", "aaaabbbbdddd", "eeee"):
        keep(pool, text)
    lengths = sorted(len(run) for run in pool.sequences())
    assert lengths == [1, 1, 1, 2]
    assert sum(lengths) == len(pool.resident)
