"""An index made again from a file: any file."""

from hashlib import sha256

import hypothesis.strategies as st
import pytest
from hypothesis import given
from tiny_pools import keep, keys_of, live, preload

from kvprefetch.cache.block import State
from kvprefetch.cache.keys import BlockKey
from kvprefetch.cache.pool import BlockPool
from kvprefetch.cache.rebuild import Kept, rebuild


def kept(text: str, pages: list[int], tenant: str = "ann", until: float | None = None) -> list[Kept]:
    keys = keys_of(text)
    return [Kept(*found, tenant, until) for found in zip(pages, keys, [b"", *keys], strict=False)]


def test_sequences_are_there_again_whatever_the_order() -> None:
    pool = BlockPool(8)
    rebuild(pool, reversed(kept("aaaabbbbcccc", [6, 1, 4])), {}, now=5.0)
    pool.check()
    assert [block.page for block in pool.match(keys_of("aaaabbbbcccc"))] == [6, 1, 4]
    assert [block.depth for block in pool.match(keys_of("aaaabbbbcccc"))] == [0, 1, 2]
    assert sorted(pool.free) == [0, 2, 3, 5, 7]
    keep(pool, "aaaabbbbccccdddd")
    pool.check()


def test_a_sequence_whose_beginning_is_gone_begins_later() -> None:
    pool = BlockPool(8)
    rebuild(pool, kept("aaaabbbbcccc", [0, 1, 2])[1:], {}, now=5.0)
    pool.check()
    assert pool.resident[keys_of("aaaabbbb")[1]].parent is None
    assert pool.resident[keys_of("aaaabbbbcccc")[2]].depth == 1


def test_what_is_told_first_goes_first() -> None:
    pool = BlockPool(4)
    rebuild(pool, [*kept("xxxx", [3]), *kept("aaaa", [0]), *kept("cccc", [1])], {}, now=5.0)
    pool.reserve(3, live(now=6.0))
    assert set(pool.resident) == set(keys_of("cccc"))


def test_doubtful_pages_are_quarantined_and_charged() -> None:
    pool = BlockPool(4)
    (doubtful,) = rebuild(pool, kept("aaaa", [2]), {0: "bob"}, now=5.0)
    pool.check()
    assert (doubtful.page, doubtful.state) == (0, State.QUARANTINED)
    assert pool.charges() == {"ann": {"used": 1}, "bob": {"quarantined": 1}}
    pool.readmit(doubtful)
    pool.check()
    assert pool.free_pages == 3


def test_speculation_keeps_the_rest_of_its_time() -> None:
    pool = BlockPool(2)
    rebuild(pool, kept("aaaa", [0], until=60.0) + kept("bbbb", [1]), {}, now=5.0)
    assert pool.charges() == {"ann": {"used": 1, "speculative": 1}}
    assert pool.reserve(2, preload("bob", now=59.0), or_fewer=True) == []
    assert len(pool.reserve(1, preload("ann", now=61.0))) == 1
    assert not pool.match(keys_of("aaaa"))


def test_what_cannot_be_is_refused_and_nothing_is_changed() -> None:
    pool = BlockPool(4)
    for wrong in (
        kept("aaaa", [0]) + kept("bbbb", [0]),
        kept("aaaa", [0]) + kept("aaaa", [1]),
        kept("aaaa", [4]),
    ):
        with pytest.raises(ValueError, match="named twice"):
            rebuild(pool, wrong, {}, now=0.0)
        with pytest.raises(ValueError, match="named twice"):
            rebuild(pool, kept("aaaa", [0]), {0: "ann"}, now=0.0)
        pool.check()
        assert pool.free_pages == 4


keys = st.sampled_from([sha256(bytes([n])).digest() for n in range(8)])


@given(st.dictionaries(keys, keys, max_size=8))
def test_parents_in_a_circle_do_not_make_blocks_that_never_go(parents: dict[BlockKey, BlockKey]) -> None:
    pool = BlockPool(8)
    rebuild(pool, [Kept(page, key, parents[key], "ann") for page, key in enumerate(parents)], {}, now=0.0)
    pool.check()
    assert set(pool.resident) == set(parents)
    for key, block in pool.resident.items():
        assert block.parent is None or block.parent.key == parents[key]
        if parents[key] not in parents:
            assert block.parent is None
    pool.clear()
    assert pool.free_pages == 8
