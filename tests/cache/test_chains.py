"""Look-up by the tail: always what reading block by block would say."""

import gc
from hashlib import sha256

import hypothesis.strategies as st
from hypothesis import given, settings
from tiny_pools import keep, keys_of, live, opened

from kvprefetch.cache.block import Block
from kvprefetch.cache.chains import Chains
from kvprefetch.cache.keys import BlockKey
from kvprefetch.cache.pool import BlockPool


def packed(text: str) -> bytes:
    return b"".join(keys_of(text))


def test_the_longest_resident_part_is_found_with_its_pages() -> None:
    pool = BlockPool(8)
    blocks = keep(pool, "aaaabbbbcccc")
    chains = Chains(pool)
    for text, count in (("aaaabbbbccccdddd", 3), ("aaaabbbb", 2), ("aaaaxxxxcccc", 1), ("xxxx", 0), ("", 0)):
        run = chains.longest(packed(text))
        assert run.count == count
        assert run.numbers() == [block.page for block in blocks[:count]]
        assert run.tails == blocks[count - 1 : count] if count else not run.tails


def test_holding_the_tail_keeps_the_whole_sequence() -> None:
    pool = BlockPool(4)
    keep(pool, "aaaabbbbcccc")
    run = Chains(pool).longest(packed("aaaabbbbcccc"))
    pool.hold(run.tails)
    assert len(pool.reserve(4, live(now=9.0), or_fewer=True)) == 1
    assert Chains(pool).longest(packed("aaaabbbbcccc")).count == 3


def test_a_use_of_the_tail_keeps_the_whole_sequence_fresh() -> None:
    pool = BlockPool(6)
    keep(pool, "aaaabbbbcccc", now=1.0)
    keep(pool, "xxxxyyyyzzzz", now=2.0)
    chains = Chains(pool)
    chains.use(chains.longest(packed("aaaabbbbcccc")), now=3.0)
    pool.reserve(3, live(now=4.0))
    assert chains.longest(packed("aaaabbbbcccc")).count == 3
    assert chains.longest(packed("xxxxyyyyzzzz")).count == 0


def test_sequences_that_are_gone_are_not_kept_in_memory() -> None:
    """Each is looked up while it is there."""
    pool = BlockPool(4)
    chains = Chains(pool)
    gc.collect()
    before = sum(isinstance(each, Block) for each in gc.get_objects())
    for number in range(400):
        text = f"{number:04d}aaaa"
        keep(pool, text, now=float(number))
        assert chains.longest(packed(text)).count == 2
    gc.collect()
    assert sum(isinstance(each, Block) for each in gc.get_objects()) - before < 200


def test_the_freshness_of_a_tail_is_inherited_when_it_goes_first() -> None:
    pool = BlockPool(4)
    keep(pool, "aaaabbbb", now=1.0)
    keep(pool, "xxxxyyyy", now=2.0)
    chains = Chains(pool)
    chains.use(chains.longest(packed("aaaabbbb")), now=3.0)
    tail = pool.resident[keys_of("aaaabbbb")[1]]
    pool.evict(tail, "test")
    pool.reserve(3, live(now=4.0))
    assert chains.longest(packed("aaaa")).count == 1, "it was used after x and y"


def test_speculation_that_nobody_used_refreshes_nothing() -> None:
    pool = BlockPool(4)
    keep(pool, "aaaa", now=1.0)
    keep(pool, "xxxx", now=2.0)
    keep(pool, "aaaabbbb", now=3.0, until=5.0)
    pool.reserve(3, live(now=9.0))
    assert not Chains(pool).longest(packed("aaaa")).count
    assert Chains(pool).longest(packed("xxxx")).count == 1


def test_a_use_of_the_tail_is_one_of_the_speculation_before_it() -> None:
    pool = BlockPool(6)
    keep(pool, "aaaabbbbcccc", until=60.0)
    chains = Chains(pool)
    assert chains.use(chains.longest(packed("aaaabbbbcccc")), now=1.0) == 3
    assert chains.use(chains.longest(packed("aaaabbbbcccc")), now=2.0) == 0
    assert not any(block.speculative for block in pool.resident.values())


def test_a_gap_makes_two_parts_of_a_sequence() -> None:
    pool = BlockPool(8)
    blocks = keep(pool, "aaaabbbbccccdddd")
    chains = Chains(pool)
    chains.longest(packed("aaaabbbbccccdddd"))
    pool.drop(blocks[1], "corrupt")
    assert chains.longest(packed("aaaabbbbccccdddd")).count == 1
    keep(pool, "aaaabbbb")
    run = chains.longest(packed("aaaabbbbccccdddd"))
    assert run.count == 4
    assert run.tails == [pool.resident[keys_of("aaaabbbb")[1]], blocks[3]], "both must be held"
    assert run.numbers() == [block.page for block in pool.match(keys_of("aaaabbbbccccdddd"))]


def test_pages_that_moved_are_told_as_they_are_now() -> None:
    pool = BlockPool(8)
    keep(pool, "aaaabbbb")
    chains = Chains(pool)
    pages = chains.longest(packed("aaaabbbb")).numbers()
    pool.relocate([(pages[0], 7)])
    assert chains.longest(packed("aaaabbbb")).numbers() == [7, pages[1]]


def test_notes_take_no_more_memory_than_allowed() -> None:
    pool = BlockPool(64)
    chains = Chains(pool, max_bytes=400)
    for first in "abcdefgh":
        keep(pool, first * 16)
        assert chains.longest(packed(first * 16)).count == 4
        assert chains._noted <= 400
    assert chains._noted == sum(len(note.keys) + len(note.pages) for note in chains._notes.values())


def test_a_held_sequence_is_found_while_it_grows() -> None:
    pool = BlockPool(8)
    sequence = opened(pool, "aaaabbbb", room=8)
    sequence.complete(8)
    chains = Chains(pool)
    assert chains.longest(packed("aaaabbbbcccc")).count == 2
    for letter in "cccc":
        sequence.append(ord(letter))
    sequence.complete(12)
    assert chains.longest(packed("aaaabbbbcccc")).count == 3


few = st.sampled_from([sha256(bytes([n])).digest() for n in range(6)])


@given(
    stored=st.lists(st.tuples(few, st.one_of(st.none(), few)), max_size=12),
    dropped=st.lists(few, max_size=2),
    asked=st.lists(st.lists(few, max_size=7), max_size=6),
)
@settings(max_examples=300, deadline=None)
def test_it_says_what_reading_one_by_one_would_say(
    stored: list[tuple[BlockKey, BlockKey | None]], dropped: list[BlockKey], asked: list[list[BlockKey]]
) -> None:
    """Whatever keys follow each other, in the pool or in the question; asked before and after something changes."""
    pool = BlockPool(16)
    chains = Chains(pool)

    def compare() -> None:
        for keys in asked:
            run = chains.longest(b"".join(keys))
            found = pool.match(keys)
            assert run.count == len(found)
            assert run.numbers() == [block.page for block in found]
            assert {id(block) for block in found} <= {id(block) for tail in run.tails for block in upwards(tail)}

    for key, parent in stored:
        if key not in pool.resident and key != parent:
            (block,) = pool.reserve(1, live())
            pool.publish(block, key, pool.resident.get(parent) if parent else None)
            pool.release([block])
        compare()
    for key in dropped:
        if key in pool.resident:
            pool.drop(pool.resident[key], "test")
        compare()
    pool.check()


def upwards(block: Block | None) -> list[Block]:
    found = []
    while block is not None:
        found.append(block)
        block = block.parent
    return found
