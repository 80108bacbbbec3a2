"""The guard on streams where the index is right, wrong, or each in turn."""

import random
from collections.abc import Callable, Iterator

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from kvprefetch.cache.evict import Demand, by_index, lru
from kvprefetch.cache.guard import ENOUGH, WINDOW, Guard, Record, guarded, key_path
from kvprefetch.cache.keys import block_keys
from kvprefetch.cache.spans import Path, Span, SpanPool

PAGES = 12
newest_first = by_index(lambda span, now: -span.last_used)
"""An index that inverts recency: the best for going round and round, the worst for coming back soon."""
Ask = tuple[str, Path]


class Story:
    """A guard, with a pool that asks it and one that goes by LRU; neither is a shadow of the guard's."""

    def __init__(self, index: Callable = newest_first, pages: int = PAGES) -> None:
        self.guard = Guard(pages, index)
        self.pools = SpanPool(pages, guarded(index, self.guard)), SpanPool(pages, lru)
        self.now, self.hits, self.lru_hits = 0.0, 0, 0
        self.told: list[bool] = []

    def ask(self, session: str, path: Path, tenant: str = "ann") -> None:
        """A request, served at once."""
        self.now += 1
        found = [take(pool, path, tenant, session, self.now) for pool in self.pools]
        self.hits, self.lru_hits = self.hits + found[0], self.lru_hits + found[1]
        self.guard.requested(path, tenant, session, self.now)
        self.guard.ended(path, tenant, session, self.now)
        self.told.append(self.guard.prefers_lru(tenant))

    def tell(self, asks: Iterator[Ask], count: int, tenant: str = "ann") -> None:
        """The first `count` of them."""
        for _ in range(count):
            self.ask(*next(asks), tenant)


def take(pool: SpanPool, path: Path, tenant: str, session: str, now: float) -> int:
    """Serve a request; what the pool had of it."""
    blocks, found = sum(count for _, count in path), pool.match(path)
    pool.hold(path, found)
    pool.make_room(blocks - found, Demand(tenant, False, now))
    pool.release(path, found)
    pool.insert(path, blocks, tenant, session, now)
    pool.touch(path, blocks, tenant, session, now)
    return found


def one(n: int) -> Ask:
    """A session of two blocks."""
    return f"s{n}", ((100 * n, 2),)


def round_and_round(sessions: int = 10) -> Iterator[Ask]:
    """Each in its turn: when it comes again, LRU has just let it go."""
    while True:
        yield from map(one, range(sessions))


def coming_back(seed: int = 0, sessions: int = 40) -> Iterator[Ask]:
    """New ones now and then, and mostly those of a moment ago."""
    draw, recent = random.Random(seed), [0]
    while True:
        n = draw.choice(recent[-5:]) if draw.random() < 0.9 else draw.randrange(1, sessions)
        recent = [*(m for m in recent[-8:] if m != n), n]
        yield one(n)


def test_without_evictions_there_is_nothing_to_choose() -> None:
    story = Story()
    story.tell(round_and_round(PAGES // 2), 100)
    assert all(story.told)
    assert story.guard.fallbacks == 0


def test_an_index_that_is_wrong_is_never_followed() -> None:
    story = Story()
    story.tell(coming_back(), 3000)
    assert all(story.told)
    assert story.hits == story.lru_hits > 3000


def test_an_index_that_is_right_is_followed_and_kept() -> None:
    story, alone = Story(), Story(newest_first)
    alone.pools = SpanPool(PAGES, newest_first), alone.pools[1]
    for told in (story, alone):
        told.tell(round_and_round(), 3000)
    assert story.lru_hits == 0
    assert story.hits > 0.98 * alone.hits > 2000
    assert story.guard.fallbacks == 0
    assert story.guard.share < 0.02


def test_an_index_that_goes_wrong_is_given_up_and_then_taken_up_again() -> None:
    story, scan = Story(), round_and_round(7)
    story.tell(scan, 1000)
    assert not story.told[-1]
    before = story.hits, story.lru_hits
    story.tell(coming_back(), 4000)
    assert story.told[-1]
    assert story.guard.fallbacks == 1
    assert story.hits >= story.lru_hits
    lost = (story.lru_hits - before[1]) - (story.hits - before[0])
    assert lost <= before[0] - before[1] + PAGES  # no more than the index had gained
    story.tell(scan, 4 * int(WINDOW))
    assert not story.told[-1]


def test_it_does_not_flap_where_both_are_much_the_same() -> None:
    def undecided(span: Span, now: float) -> float:
        return span.last_used + (span.first // 100 % 3)

    story = Story(by_index(undecided))
    story.tell(coming_back(), 10_000)
    assert sum(a != b for a, b in zip(story.told, story.told[1:], strict=False)) <= 6
    assert story.hits >= 0.99 * story.lru_hits - PAGES


def test_even_one_who_knows_what_it_prefers_cannot_make_it_lose() -> None:
    """The index is right until it is followed, and then wrong."""
    story, right, wrong = Story(), round_and_round(7), coming_back()
    story.tell(coming_back(1), 500)
    for _ in range(20_000):
        lately = story.guard.all
        story.ask(*next(wrong if lately.index > lately.lru else right))
        assert story.hits >= 0.99 * story.lru_hits - PAGES - 2
    assert story.guard.fallbacks > 1


def test_what_was_lost_ever_counts_whatever_was_gained_lately() -> None:
    """An index that gained while nobody followed it has earned nothing yet."""
    record = Record()
    for _ in range(1000):
        record.note(10, 20, 10)
    assert record.follows_index
    given_up = [record.note(10, 0, 0) for _ in range(6)]
    assert given_up == [False] * 5 + [True]  # of 10,060 hits, ½ % are 50
    assert record.index > record.lru
    for _ in range(900):
        record.note(10, 10, 10)
    assert not record.follows_index
    for _ in range(500):
        record.note(10, 10, 10)
    assert record.follows_index  # 60 are less than ¼ % by now


def test_small_differences_change_nothing() -> None:
    record = Record()
    record.note(1000, 1010, 1000)
    assert record.follows_index
    assert not any(record.note(1000, 1000 + by, 1000) for by in (-10, -1, 1, -2, 2) * 20)


def test_a_tenant_for_whom_the_index_is_wrong_is_served_by_lru() -> None:
    story, good, bad = Story(pages=40), round_and_round(30), coming_back()
    for n in range(6000):
        if n % 4:
            story.ask(*next(good), "ann")
        else:
            session, path = next(bad)
            story.ask(session + "b", tuple((first + 50_000, count) for first, count in path), "bob")
    assert story.guard.prefers_lru("bob")
    assert not story.guard.prefers_lru("ann")
    assert not story.guard.prefers_lru("of whom nothing is known")


def test_a_tenant_is_judged_by_all_until_it_has_enough_of_its_own() -> None:
    story = Story()
    story.tell(round_and_round(), 1000)
    story.tell(iter([one(77)] * int(ENOUGH)), int(ENOUGH) - 2, "bob")
    assert not story.guard.prefers_lru("bob")


def test_where_all_fare_worse_every_demand_is_met_by_lru() -> None:
    story = Story()
    story.tell(round_and_round(), 1000)
    story.guard.all.follows_index = False
    assert story.guard.tenants["ann"].follows_index
    assert story.guard.prefers_lru("ann")


def test_a_running_session_keeps_its_place_in_every_shadow() -> None:
    guard = Guard(PAGES, by_index(lambda span, now: 0.0 if span.session == "runs" else 1.0))
    guard.requested(((0, 2),), "ann", "runs", 1.0)
    for n in range(1, 20):
        guard.requested(*_of(n), float(n + 1))
        guard.ended(*_of(n), float(n + 1))
    guard.requested(((0, 2),), "ann", "runs", 30.0)
    assert (guard.all.index, guard.all.lru) == (2, 2)


def _of(n: int) -> tuple[Path, str, str]:
    return ((100 * n, 2),), "ann", f"s{n}"


@pytest.mark.parametrize("stride", [1, 3])
def test_paths_of_keys(stride: int) -> None:
    """Equal names where prefixes are equal, one for each stride of whole blocks."""
    root = b"root" * 8
    long, other = block_keys(root, list(range(40)), 4), block_keys(root, [*range(36), 9, 9, 9, 9], 4)
    paths = key_path(long, stride), key_path(other, stride)
    assert len(paths[0]) == 10 // stride
    same = [a == b for a, b in zip(*paths, strict=True)]
    assert same == [(n + 1) * stride <= 9 for n in range(10 // stride)]
    guard = Guard(10 // stride, newest_first)
    for path in paths:
        guard.requested(path, "ann", "s", 1.0)
    assert guard.all.lru == sum(same)


def test_it_repeats_itself() -> None:
    first, second = Story(), Story()
    for story in (first, second):
        for stream in (round_and_round(), coming_back(3), round_and_round(7)):
            story.tell(stream, 1500)
    assert (first.told, first.hits, first.guard.share) == (second.told, second.hits, second.guard.share)


WORDS = st.text("ab", max_size=9)
TIMES = st.floats(-1e3, 1e9) | st.sampled_from([float("nan"), float("inf"), 0.0])
STEPS = st.lists(st.tuples(WORDS, st.sampled_from(["ann", "bob", "cid"]), TIMES, st.booleans()), max_size=60)


def path_of(word: str) -> Path:
    """A path of the tree of words: a name says the whole word before it."""
    return tuple((2 * int("1" + word[: n + 1].replace("a", "0").replace("b", "1"), 2), 1) for n in range(len(word)))


@given(STEPS, st.integers(0, 7), st.sampled_from([newest_first, lru, by_index(lambda span, now: float("nan"))]))
@settings(max_examples=60, deadline=None)
def test_it_raises_nothing_and_stays_small(steps: list, pages: int, index: Callable) -> None:
    guard = Guard(pages, index, max_tenants=2)
    for word, tenant, now, ends in steps:
        guard.requested(path_of(word), tenant, word[:2], now)
        if ends:
            guard.ended(path_of(word), tenant, word[:2], now)
        for shadow in guard._shadows:
            shadow.check()
            assert shadow.used <= pages
        assert len(guard.tenants) <= 2
        assert guard.all.followed_ever >= (1 - 0.005) * guard.all.lru_ever - pages - 9
    assert 0 <= guard.share <= 1


def test_a_policy_that_spares_everything_breaks_nothing() -> None:
    guard = Guard(2, lambda span, demand: None)
    for n in range(9):
        guard.requested(*_of(n), 1.0)
        guard.ended(*_of(n), 1.0)
    assert guard.prefers_lru("ann")
