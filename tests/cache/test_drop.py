"""Blocks that must go though somebody uses them, and reservations whose writers vanish and come back."""

from itertools import pairwise

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from tiny_pools import keep, keys_of, live, opened, snapshot

from kvprefetch.cache.block import Block, Hold, State
from kvprefetch.cache.pool import BlockPool


def holding(pool: BlockPool, *blocks: Block) -> Hold:
    hold = Hold(list(blocks))
    pool.hold(blocks)
    pool.holders.add(hold)
    return hold


def let_go(pool: BlockPool, hold: Hold) -> None:
    pool.holders.discard(hold)
    pool.release(hold.blocks)


def test_a_dropped_block_is_found_no_more_and_its_page_is_free() -> None:
    pool = BlockPool(4)
    blocks = keep(pool, "aaaabbbb")
    pool.drop(blocks[1], "corrupt")
    pool.check()
    assert pool.match(keys_of("aaaabbbb")) == blocks[:1]
    assert pool.free_pages == 3
    assert dict(pool.evicted) == {blocks[1].key: "corrupt"}


def test_what_followed_a_dropped_block_begins_a_sequence() -> None:
    pool = BlockPool(8)
    blocks = keep(pool, "aaaabbbbccccdddd")
    pool.drop(blocks[1], "corrupt")
    pool.check()
    assert pool.match(keys_of("aaaabbbbccccdddd")) == blocks[:1]
    assert pool.match(keys_of("aaaabbbbccccdddd")[2:]) == blocks[2:]
    assert [block.depth for block in blocks[2:]] == [0, 1]
    keep(pool, "aaaabbbb")
    assert len(pool.match(keys_of("aaaabbbbccccdddd"))) == 4
    pool.clear()
    assert pool.free_pages == 8


@pytest.mark.parametrize("held", [1, 2, 3])
def test_the_page_of_a_dropped_block_is_not_given_while_somebody_may_read_it(held: int) -> None:
    """Who holds a block may be reading all that is before it, and holds nothing of that."""
    pool = BlockPool(8)
    blocks = keep(pool, "aaaabbbbccccdddd")
    hold = holding(pool, blocks[held])
    pool.drop(blocks[1], "corrupt")
    pool.check()
    assert pool.match(keys_of("aaaabbbb")) == blocks[:1]
    assert blocks[1].page not in pool.free
    assert pool.charges()["ann"]["quarantined"] == 1
    let_go(pool, hold)
    pool.check()
    assert blocks[1].page in pool.free
    assert blocks[1].state is State.GONE


@pytest.mark.parametrize("order", [[2, 1, 0], [0, 1, 2], [1, 2, 0]])
def test_what_is_before_a_dropped_block_is_kept_for_those_who_read_it(order: list[int]) -> None:
    pool = BlockPool(4)
    blocks = keep(pool, "aaaabbbbcccc")
    hold = holding(pool, blocks[2])
    pool.drop(blocks[order[0]], "corrupt")
    assert len(pool.free) == 1
    pool.clear()
    assert len(pool.free) == 1, "it is not evicted either"
    for at in order[1:]:
        pool.drop(blocks[at], "corrupt")
        pool.check()
        assert len(pool.free) == 1
    let_go(pool, hold)
    pool.check()
    assert len(pool.free) == 4


def test_who_holds_something_before_it_does_not_keep_a_dropped_page() -> None:
    pool = BlockPool(8)
    blocks = keep(pool, "aaaabbbb")
    hold = holding(pool, blocks[0])
    pool.drop(blocks[1], "corrupt")
    assert pool.free_pages == 7
    let_go(pool, hold)
    pool.check()


def test_only_a_resident_block_can_be_dropped() -> None:
    pool = BlockPool(4)
    sequence = opened(pool, "aaaa")
    with pytest.raises(ValueError, match="not resident"):
        pool.drop(sequence.blocks[0], "corrupt")
    (block,) = keep(pool, "bbbb")
    pool.drop(block, "corrupt")
    with pytest.raises(ValueError, match="not resident"):
        pool.drop(block, "corrupt")


def test_a_quarantined_writer_that_comes_back_goes_on() -> None:
    pool = BlockPool(4)
    (block,) = pool.reserve(1, live())
    hold = Hold([block])
    pool.holders.add(hold)
    pool.quarantine(block)
    assert pool.charges() == {"ann": {"quarantined": 1}}
    pool.resume(block)
    pool.check()
    assert pool.charges() == {"ann": {"in_flight": 1}}
    assert pool.publish(block, keys_of("aaaa")[0], None) is block
    let_go(pool, hold)
    pool.check()


def test_a_quarantined_page_without_a_holder_cannot_go_on() -> None:
    pool = BlockPool(4)
    (block,) = pool.reserve(1, live())
    pool.quarantine(block)
    pool.release([block])
    with pytest.raises(ValueError, match="no holder"):
        pool.resume(block)
    pool.readmit(block)
    pool.check()


def test_fewer_will_do_where_that_is_said() -> None:
    pool = BlockPool(4)
    holder = opened(pool, "aaaabbbb")
    holder.complete(8)
    keep(pool, "xxxx")
    assert len(pool.reserve(3, live(), or_fewer=True)) == 2
    before = snapshot_without_holders(pool)
    assert pool.reserve(1, live(), or_fewer=True) == []
    assert snapshot_without_holders(pool) == before


def snapshot_without_holders(pool: BlockPool) -> object:
    hold = Hold(list(pool.in_flight.values()))
    pool.holders.add(hold)
    found = snapshot(pool)
    pool.holders.discard(hold)
    return [part for part in found if not isinstance(part, set)]  # type: ignore[attr-defined]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["keep", "hold", "let go", "drop", "reserve"]),
            st.text("ab", min_size=1, max_size=4),
        ),
        max_size=30,
    )
)
@settings(max_examples=300, deadline=None)
def test_a_page_that_may_be_read_is_never_given_out(steps: list[tuple[str, str]]) -> None:
    """Who holds a tail reads all pages that it saw before it, whatever is dropped meanwhile."""
    pool = BlockPool(6)
    reading: dict[Hold, set[int]] = {}
    for what, words in steps:
        text = "".join(4 * letter for letter in words)
        blocks = pool.match(keys_of(text))
        if what == "keep" and len(blocks) < len(words):
            room = len(words) - len(blocks)
            if len(pool.free) >= room:
                keep(pool, text)
        elif what == "hold" and blocks and all(a is b.parent for a, b in pairwise(blocks)):
            reading[holding(pool, blocks[-1])] = {block.page for block in blocks}
        elif what == "let go" and reading:
            hold = next(iter(reading))
            del reading[hold]
            let_go(pool, hold)
        elif what == "drop" and blocks:
            pool.drop(blocks[-1], "test")
        elif what == "reserve":
            taken = pool.reserve(len(words), live(), or_fewer=True)
            pages = {block.page for block in taken}
            assert not any(pages & read for read in reading.values())
            pool.release(taken)
        assert not any(set(pool.free) & read for read in reading.values())
        pool.check()
    for hold in reading:
        let_go(pool, hold)
    pool.clear()
    assert pool.free_pages == 6
