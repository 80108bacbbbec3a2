import hypothesis.strategies as st
from hypothesis import given, settings
from tiny_pools import BLOCK, keep, keys_of, live, opened

from kvprefetch.cache.misses import Lookup, explain
from kvprefetch.cache.pool import BlockPool
from kvprefetch.errors import PoolError
from kvprefetch.outcomes import MissReason


def look_up(pool: BlockPool, text: str, tenant: str = "ann") -> Lookup:
    keys = keys_of(text, tenant)
    return explain(pool, keys, len(pool.match(keys)), BLOCK)


def test_a_hit_needs_no_reason() -> None:
    pool = BlockPool(8)
    keep(pool, "aaaabbbb")
    lookup = look_up(pool, "aaaabbbbcc")
    assert (lookup.blocks, lookup.hits, lookup.misses.total(), lookup.diverged_at) == (2, 2, 0, None)


def test_what_was_never_there_was_never_seen() -> None:
    pool = BlockPool(8)
    keep(pool, "aaaa", "bob")
    lookup = look_up(pool, "aaaabbbb")
    assert lookup.misses == {MissReason.NEVER_SEEN: 2}
    assert lookup.diverged_at is None


def test_a_text_that_goes_on_where_nobody_went_on_was_never_seen() -> None:
    pool = BlockPool(8)
    keep(pool, "aaaa")
    assert look_up(pool, "aaaabbbbcccc").misses == {MissReason.NEVER_SEEN: 2}


def test_a_text_that_takes_another_turn_diverged_at_that_block() -> None:
    pool = BlockPool(8)
    keep(pool, "aaaabbbbcccc")
    lookup = look_up(pool, "aaaabbbbxxxxyyyy")
    assert lookup.hits == 2
    assert lookup.misses == {MissReason.DIVERGED: 2}
    assert lookup.diverged_at == 8


def test_what_somebody_computes_right_now_is_in_flight() -> None:
    pool = BlockPool(8)
    other = opened(pool, "aaaabbbb")
    other.complete(4)
    lookup = look_up(pool, "aaaabbbbcccc")
    assert lookup.hits == 1
    assert lookup.misses == {MissReason.IN_FLIGHT: 1, MissReason.NEVER_SEEN: 1}
    other.close()
    assert look_up(pool, "aaaabbbbcccc").misses == {MissReason.NEVER_SEEN: 2}


def test_what_was_evicted_names_the_rule() -> None:
    pool = BlockPool(2)
    keep(pool, "aaaa", now=1.0)
    keep(pool, "pppp", now=2.0, until=5.0)
    pool.reserve(1, live(now=9.0))
    assert look_up(pool, "pppp").rules == {"hold_expired": 1}
    pool.reserve(1, live(now=9.0))
    lookup = look_up(pool, "aaaabbbb")
    assert lookup.misses == {MissReason.EVICTED: 1, MissReason.NEVER_SEEN: 1}
    assert lookup.rules == {"lru": 1}


def test_what_is_computed_again_after_eviction_is_in_flight() -> None:
    pool = BlockPool(4)
    keep(pool, "aaaa")
    pool.clear()
    opened(pool, "aaaa")
    assert look_up(pool, "aaaa").misses == {MissReason.IN_FLIGHT: 1}


def test_once_evictions_are_forgotten_a_miss_may_be_one_of_them() -> None:
    pool = BlockPool(4, evicted_memory=1)
    keep(pool, "aaaa")
    pool.clear()
    assert look_up(pool, "xxxx").misses == {MissReason.NEVER_SEEN: 1}
    keep(pool, "bbbb")
    pool.clear()
    assert look_up(pool, "aaaa").misses == {MissReason.UNKNOWN: 1}
    assert look_up(pool, "bbbb").misses == {MissReason.EVICTED: 1}


def test_behind_a_known_continuation_that_is_gone_nothing_diverged() -> None:
    """The turn was known, so it is no turn: what follows it is simply new."""
    pool = BlockPool(8)
    keep(pool, "aaaabbbb")
    keep(pool, "aaaacccc")
    pool.evict(pool.resident[keys_of("aaaabbbb")[1]], "lru")
    lookup = look_up(pool, "aaaabbbbxxxx")
    assert lookup.misses == {MissReason.EVICTED: 1, MissReason.NEVER_SEEN: 1}
    assert lookup.diverged_at is None


def test_behind_a_continuation_in_flight_nothing_diverged() -> None:
    pool = BlockPool(8)
    keep(pool, "aaaacccc")
    opened(pool, "aaaabbbb")
    lookup = look_up(pool, "aaaabbbbxxxx")
    assert lookup.misses == {MissReason.IN_FLIGHT: 1, MissReason.NEVER_SEEN: 1}
    assert lookup.diverged_at is None


TEXTS = st.lists(st.sampled_from(["aaaa", "bbbb"]), min_size=1, max_size=4).map("".join)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["keep", "open", "ask"]), TEXTS), max_size=12), st.integers(0, 3))
def test_every_block_is_a_hit_or_has_a_reason(story: list[tuple[str, str]], evicted_memory: int) -> None:
    pool = BlockPool(6, evicted_memory=evicted_memory)
    for now, (verb, text) in enumerate([*story, ("ask", "aaaabbbbaaaa")]):
        lookup = look_up(pool, text)
        assert lookup.hits + lookup.misses.total() == lookup.blocks == len(text) // BLOCK
        assert lookup.rules.total() == lookup.misses[MissReason.EVICTED]
        assert (lookup.diverged_at is None) == (lookup.misses[MissReason.DIVERGED] == 0)
        try:
            if verb == "keep":
                keep(pool, text, now=float(now))
            elif verb == "open":
                opened(pool, text, now=float(now)).complete(BLOCK)
        except PoolError:
            pool.clear()


def test_what_another_tier_holds_is_no_miss() -> None:
    pool = BlockPool(8)
    keep(pool, "aaaa")
    keys = keys_of("aaaabbbbccccdddd")
    lookup = explain(pool, keys, 1, BLOCK, elsewhere=3)
    assert (lookup.hits, lookup.loaded, lookup.misses) == (1, 2, {MissReason.NEVER_SEEN: 1})


def test_where_the_other_tier_could_not_say_it_is_the_reason() -> None:
    pool = BlockPool(8)
    keep(pool, "aaaa")
    lookup = explain(pool, keys_of("aaaabbbbcccc"), 1, BLOCK, failed=MissReason.UNAVAILABLE)
    assert lookup.misses == {MissReason.UNAVAILABLE: 2}
