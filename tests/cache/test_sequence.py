import pytest
from tiny_pools import BLOCK, keep, keys_of, letters, live, opened, owner, preload, resident, snapshot

from kvprefetch.cache.pool import BlockPool
from kvprefetch.cache.sequence import PagedSequence
from kvprefetch.errors import PoolFull, PoolTooSmall


def test_a_cold_prompt_has_nothing_computed_and_pages_for_all_of_it() -> None:
    pool = BlockPool(4)
    sequence = opened(pool, "aaaabb", room=3)
    assert (sequence.computed, sequence.written) == (0, 0)
    assert len(sequence.pages) == 3


def test_a_fully_cached_prompt_runs_its_last_token_again_without_writing_it() -> None:
    pool = BlockPool(4)
    keep(pool, "aaaabbbb")
    sequence = opened(pool, "aaaabbbb", room=4)
    assert (sequence.computed, sequence.written) == (7, 8)
    assert sequence.complete(8) == []
    assert (sequence.computed, sequence.written) == (8, 8)
    pool.check()


def test_a_prompt_that_shares_a_prefix_goes_on_behind_it() -> None:
    pool = BlockPool(6)
    kept = keep(pool, "aaaabbbb")
    sequence = PagedSequence(pool, owner("ann"), letters("aaaaccccdd"), BLOCK)
    assert sequence.open(10, live()) == 4
    assert (sequence.computed, sequence.written) == (4, 4)
    assert sequence.blocks[0] is kept[0]
    assert kept[0].refs == 1


def test_no_more_is_held_than_there_was_asked_room_for() -> None:
    pool = BlockPool(4)
    kept = keep(pool, "aaaabbbbcccc")
    piece = PagedSequence(pool, owner("ann"), letters("aaaabbbbcccc"), BLOCK)
    assert piece.open(8, preload()) == 8
    assert piece.blocks == kept[:2]
    assert kept[2].refs == 0


def test_keys_already_known_are_taken_as_they_are() -> None:
    pool = BlockPool(4)
    sequence = PagedSequence(pool, owner("ann"), letters("aaaabbbbcc"), BLOCK, keys_of("aaaa"))
    assert sequence.keys == keys_of("aaaabbbb")


def test_a_waiting_sequence_cannot_lose_its_prefix() -> None:
    pool = BlockPool(3)
    keep(pool, "aaaabbbb")
    waiting = opened(pool, "aaaabbbb")
    opened(pool, "xxxx", now=100.0)
    with pytest.raises(PoolFull):
        opened(pool, "yyyy", now=200.0)
    assert waiting.blocks == pool.match(keys_of("aaaabbbb"))


def test_what_somebody_else_published_meanwhile_is_taken_over() -> None:
    pool = BlockPool(8)
    late, early = opened(pool, "aaaabbbbcccc"), opened(pool, "aaaabbbb")
    early.complete(8)
    assert late.adopt() == 8
    assert (late.computed, late.written) == (8, 8)
    assert late.pages[:2] == early.pages
    assert pool.free_pages == 5
    pool.check()


def test_a_block_that_is_partly_computed_is_finished_and_not_taken_over() -> None:
    pool = BlockPool(8)
    mine, other = opened(pool, "aaaabbbb"), opened(pool, "aaaabbbb")
    mine.complete(2)
    other.complete(8)
    assert mine.adopt() == 0
    assert mine.computed == 2
    mine.complete(4)
    assert mine.adopt() == 3, "the second block is taken over; its last token is run again"
    assert mine.pages == other.pages
    pool.check()


def test_there_is_nothing_to_take_over_from_another_tenant() -> None:
    pool = BlockPool(8)
    mine = opened(pool, "aaaa", "ann")
    opened(pool, "aaaa", "bob").complete(4)
    assert mine.adopt() == 0


def test_identical_sequences_computed_side_by_side_end_on_the_same_pages() -> None:
    pool = BlockPool(4)
    one, two = opened(pool, "aaaabbbb"), opened(pool, "aaaabbbb")
    assert set(one.pages).isdisjoint(two.pages)
    assert len(one.complete(8)) == 2
    assert two.complete(8) == []
    assert one.pages == two.pages
    assert [block.refs for block in one.blocks] == [2, 2]
    assert pool.free_pages == 2
    pool.check()


def test_the_last_sampled_token_has_no_kv() -> None:
    """Its block becomes resident only when a forward has run it."""
    pool = BlockPool(4)
    sequence = opened(pool, "aaab", room=4)
    sequence.complete(4)
    for token in letters("cdef"):
        sequence.complete(len(sequence.tokens))
        sequence.append(token)
        assert sequence.computed == len(sequence.tokens) - 1
    assert resident(pool, "aaabcdef") == "aaab"
    sequence.complete(8)
    assert resident(pool, "aaabcdef") == "aaabcdef"


def test_an_answer_is_found_by_the_next_turn() -> None:
    pool = BlockPool(6)
    sequence = opened(pool, "aaab", room=4)
    sequence.complete(4)
    for at, token in enumerate(letters("cdef"), start=5):
        sequence.append(token)
        sequence.complete(at)
    sequence.close()
    assert opened(pool, "aaabcdefgg").written == 8


def test_speculation_is_on_hold_until_its_time_and_live_work_is_not() -> None:
    pool = BlockPool(4)
    (speculative,) = keep(pool, "pppp", until=60.0)
    (used,) = keep(pool, "aaaa")
    assert (speculative.speculative, speculative.hold_until) == (True, 60.0)
    assert (used.speculative, used.hold_until) == (False, 0.0)


def test_a_preload_that_meets_a_used_twin_does_not_make_it_speculative() -> None:
    pool = BlockPool(4)
    ahead = PagedSequence(pool, owner("ann"), letters("aaaa"), BLOCK)
    ahead.open(4, preload())
    request = opened(pool, "aaaa")
    request.complete(4)
    assert ahead.complete(4, speculative_until=60.0) == []
    assert not request.blocks[0].speculative


def test_closing_again_changes_nothing() -> None:
    pool = BlockPool(4)
    one, two = opened(pool, "aaaabb"), opened(pool, "aaaabb")
    one.complete(6)
    two.complete(6)
    assert one.close() == []
    after = snapshot(pool)
    assert one.close() == []
    assert one.close(quarantine=True) == []
    assert snapshot(pool) == after
    assert two.blocks[0].refs == 1


def test_close_frees_what_was_not_published_and_leaves_the_rest_resident() -> None:
    pool = BlockPool(4)
    sequence = opened(pool, "aaaabb", room=6)
    sequence.complete(6)
    sequence.close()
    assert pool.free_pages == 3
    assert resident(pool, "aaaabb") == "aaaa"
    pool.check()


def test_close_in_doubt_quarantines_only_pages_that_may_still_be_written() -> None:
    pool = BlockPool(4)
    sequence = opened(pool, "aaaabbbb")
    sequence.complete(5)
    unpublished = sequence.pages[1]
    assert [block.page for block in sequence.close(quarantine=True)] == [unpublished]
    assert resident(pool, "aaaabbbb") == "aaaa"
    pool.check()


def test_what_an_empty_pool_could_not_give_is_too_small_and_nothing_is_held() -> None:
    pool = BlockPool(3)
    keep(pool, "aaaabbbb")
    before = snapshot(pool)
    with pytest.raises(PoolTooSmall, match="13 tokens need 4 pages of 4; the pool has 3"):
        opened(pool, "aaaabbbb", room=5)
    assert snapshot(pool) == before


def test_pages_in_quarantine_do_not_count_as_the_pools() -> None:
    pool = BlockPool(3)
    opened(pool, "xxxx").close(quarantine=True)
    with pytest.raises(PoolTooSmall):
        opened(pool, "aaaabbbbcccc")


def test_what_the_pool_cannot_give_now_leaves_nothing_held_and_works_later() -> None:
    pool = BlockPool(4)
    keep(pool, "aaaa")
    busy = opened(pool, "xxxxxxxx")
    request = PagedSequence(pool, owner("ann"), letters("aaaabbbbcccc"), BLOCK)
    before = snapshot(pool)
    with pytest.raises(PoolFull):
        request.open(12, live())
    assert snapshot(pool) == before
    busy.close()
    assert request.open(12, live()) == 4
    pool.check()


def test_keys_in_work_are_announced_until_they_are_published() -> None:
    pool = BlockPool(8)
    sequence = opened(pool, "aaaabbbbcc")
    assert dict(pool.announced) == dict.fromkeys(keys_of("aaaabbbb"), 1)
    sequence.complete(4)
    assert dict(pool.announced) == {keys_of("aaaabbbb")[1]: 1}
    sequence.complete(8)
    assert not pool.announced


@pytest.mark.parametrize("quarantine", [False, True])
def test_closing_withdraws_what_was_announced(quarantine: bool) -> None:
    pool = BlockPool(8)
    one, two = opened(pool, "aaaabbbb"), opened(pool, "aaaabbbb")
    assert set(pool.announced.values()) == {2}
    one.close(quarantine=quarantine)
    assert dict(pool.announced) == dict.fromkeys(keys_of("aaaabbbb"), 1)
    two.close(quarantine=quarantine)
    assert not pool.announced


def test_taking_over_withdraws_what_was_announced() -> None:
    pool = BlockPool(8)
    late, early = opened(pool, "aaaa"), opened(pool, "aaaa")
    early.complete(4)
    late.adopt()
    assert not pool.announced


def test_a_sampled_block_does_not_withdraw_what_others_announced() -> None:
    """An answer runs into the text that two prompts are computing: both still are."""
    pool = BlockPool(12)
    answering = opened(pool, "aaaa", room=4)
    answering.complete(4)
    prompts = [opened(pool, "aaaabbbb"), opened(pool, "aaaabbbb")]
    for at in range(5, 9):
        answering.append(ord("b"))
        answering.complete(at)
    assert dict(pool.announced) == {keys_of("aaaabbbb")[1]: 2}
    for prompt in prompts:
        prompt.adopt()
    assert not pool.announced


def test_only_what_pages_were_reserved_for_is_announced() -> None:
    """A preload takes a long context a piece at a time."""
    pool = BlockPool(8)
    sequence = PagedSequence(pool, owner("ann"), letters("aaaabbbbcccc"), BLOCK)
    sequence.open(4, preload())
    assert list(pool.announced) == keys_of("aaaa")
    sequence.complete(4, speculative_until=60.0)
    sequence.close()
    assert not pool.announced


def test_what_somebody_else_computed_is_loaded_and_the_last_token_is_left_to_run() -> None:
    pool = BlockPool(4)
    sequence = opened(pool, "aaaabbbb")
    sequence.loaded(1)
    assert (sequence.shared, sequence.computed) == (1, 4)
    sequence.loaded(1)
    assert (sequence.shared, sequence.computed) == (2, 7)
    assert [block.key for block in sequence.blocks] == keys_of("aaaabbbb")
    pool.check()
