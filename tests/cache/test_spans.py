"""Runs of blocks keep what single blocks keep: the replay's pool against the worker's."""

from hashlib import sha256
from itertools import product

import hypothesis.strategies as st
import pytest
from hypothesis import given
from tiny_pools import BLOCK, keys_of, letters, live, owner, preload

from kvprefetch.cache.evict import Demand, by_index, lru
from kvprefetch.cache.fair_spans import FairSpanPool
from kvprefetch.cache.pool import BlockPool
from kvprefetch.cache.sequence import PagedSequence
from kvprefetch.cache.shares import Share, Shares
from kvprefetch.cache.spans import Run, SpanPool
from kvprefetch.errors import PoolFull, PoolTooSmall
from kvprefetch.sim.trace import joined, runs_of

PAGES = 6
TREE = ["", "a", "b", "aa", "ab", "ba", "aaa", "aab", "abab", "aabb", "baab", "aaaaa", "bbbbbb"]
TENANTS = ["ann", "bob"]
NAMES = {"a": 100, "aa": 101, "aaa": 102, "aaaa": 103, "aaaaa": 104}  # one branch in one run, the others in pieces
NAMES |= {"anna": 90, "annaa": 91, "annaaa": 92}


def prompt(word: str) -> str:
    """A prompt of one block a letter."""
    return "".join(letter * BLOCK for letter in word)


def path(word: str, tenant: str = "") -> tuple[Run, ...]:
    """The same as runs of names; equal prefixes of one tenant have equal names."""
    heads = [tenant + word[: n + 1] for n in range(len(word))]
    return joined(runs_of(NAMES.get(h, int.from_bytes(sha256(h.encode()).digest()[:6])) for h in heads))


class Pair:
    """Both pools, told the same."""

    def __init__(self, shares: Shares) -> None:
        self.blocks, self.spans = BlockPool(PAGES, claim_s=4), FairSpanPool(PAGES, shares=shares, claim_s=4)
        self.blocks.shares = shares
        self.now = 0.0
        self.held: list[tuple[str, str, PagedSequence, bool]] = []

    def open(self, word: str, tenant: str, speculative: bool) -> None:
        self.now += 1
        demand = Demand(tenant, speculative, self.now)
        sequence = PagedSequence(self.blocks, owner(tenant), letters(prompt(word)), BLOCK)
        try:
            sequence.open(len(prompt(word)), demand)
            sequence.complete(len(prompt(word)), speculative_until=self.now + 3 if speculative else None)
        except (PoolFull, PoolTooSmall):
            sequence = None
        way = path(word, tenant)
        found = self.spans.match(way)
        self.spans.hold(way, found)
        try:
            self.spans.reserve(len(word) - found, demand)
        except PoolFull:
            self.spans.release(way, found)
            assert sequence is None
            return
        assert sequence is not None
        self.spans.unreserve(len(word) - found, tenant)
        until = self.now + 3 if speculative else None
        self.spans.insert(way, len(word), tenant, "s", self.now, until)
        self.spans.release(way, found)
        self.spans.hold(way, len(word))
        if not speculative:
            self.touch(word, tenant, sequence)
        self.held.append((word, tenant, sequence, speculative))

    def touch(self, word: str, tenant: str, sequence: PagedSequence) -> None:
        self.blocks.touch(sequence.blocks, self.now)
        self.spans.touch(path(word, tenant), len(word), tenant, "s", self.now)

    def close(self, at: int) -> None:
        if self.held:
            word, tenant, sequence, _ = self.held.pop(at % len(self.held))
            sequence.close()
            self.spans.release(path(word, tenant), len(word))

    def agree(self) -> None:
        self.spans.check()
        self.blocks.check()
        for word, tenant in product(TREE, TENANTS):
            there = len(self.blocks.match(keys_of(prompt(word), tenant)))
            assert self.spans.match(path(word, tenant)) == there, word


steps = st.lists(
    st.one_of(
        st.tuples(st.just("open"), st.sampled_from(TREE[1:]), st.sampled_from(TENANTS), st.booleans()),
        st.tuples(st.just("close"), st.integers(0, 5)),
    ),
    max_size=30,
)


@given(steps, st.sampled_from([0.0, 0.2, 0.5, 1.0]), st.sampled_from([1.0, 3.0]))
def test_both_pools_keep_the_same_blocks(told: list[tuple], guarantee: float, weight: float) -> None:
    pair = Pair(Shares({"ann": Share(weight, guarantee)}))
    for verb, *arguments in told:
        getattr(pair, verb)(*arguments)
        pair.agree()


def filled(pool: SpanPool, word: str, now: float, tenant: str = "ann", until: float | None = None) -> None:
    """`word` computed and let go of."""
    pool.make_room(len(word) - pool.match(path(word)), Demand(tenant, until is not None, now))
    pool.insert(path(word), len(word), tenant, word, now, until)
    if until is None:
        pool.touch(path(word), len(word), tenant, word, now)


def test_a_run_is_cut_from_its_end() -> None:
    pool = SpanPool(5, lru)
    filled(pool, "aaaa", 1)
    filled(pool, "bbb", 2)
    assert pool.match(path("aaaaa")) == 2
    assert len(list(pool.spans())) == 4  # what is left of one run, and three pieces


def test_the_first_use_of_speculation_is_told_once() -> None:
    pool, used = SpanPool(6, lru), []
    pool.on_first_use = lambda span: used.append(span.count)
    filled(pool, "aaaa", 1, until=9)
    filled(pool, "aa", 2)
    filled(pool, "aaaa", 3)
    filled(pool, "aaaa", 4)
    assert used == [2, 2]


def test_a_preload_displaces_only_what_is_worth_less() -> None:
    worth = {"aa": 1.0, "bb": 3.0}
    pool = SpanPool(4, by_index(lambda span, now: worth[span.session]))
    filled(pool, "aa", 1)
    filled(pool, "bb", 2)
    with pytest.raises(PoolFull):
        pool.make_room(3, Demand("ann", True, 3, worth=2.0))
    pool.make_room(2, Demand("ann", True, 3, worth=2.0))
    assert (pool.match(path("aa")), pool.match(path("bb"))) == (0, 2)


def test_a_preload_takes_nothing_from_another_tenant() -> None:
    pool = SpanPool(2, by_index(lambda span, now: 0.0))
    filled(pool, "bb", 1, tenant="bob")
    with pytest.raises(PoolFull):
        pool.make_room(1, preload("ann", 2))
    pool.make_room(1, live("ann", 2))


def test_what_is_held_cannot_be_cut() -> None:
    pool = SpanPool(4, lru)
    filled(pool, "aaa", 1)
    pool.hold(path("aa"), 2)
    pool.make_room(2, live(now=2))
    assert pool.match(path("aaa")) == 2
    with pytest.raises(PoolFull):
        pool.make_room(3, live(now=2))
    with pytest.raises(ValueError, match="unheld"):
        pool.cut(next(pool.spans()), 1)
