"""What one tenant may ask for: signals a second, names and their bytes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvprefetch.errors import LimitExceeded, UnknownContext
from kvprefetch.service.limits import BURST_S, IN_USE_S, Bucket, Names
from kvprefetch.v1.hints_pb2 import Context


def context(size: int) -> Context:
    """Of exactly so many bytes on the wire (a tag and a length before the text)."""
    made = Context(messages=b"[" * (size - 2))
    assert made.ByteSize() == size
    return made


def passed(bucket: Bucket, times: list[float]) -> int:
    return sum(bucket.take(now) for now in times)


def test_a_burst_passes_and_then_the_rate() -> None:
    bucket = Bucket(2.0)
    assert passed(bucket, [100.0] * 50) == 2 * BURST_S
    assert passed(bucket, [101.0] * 50) == 2
    assert passed(bucket, [101.4, 101.5]) == 1
    assert passed(bucket, [1_000.0] * 50) == 2 * BURST_S


def test_a_rate_below_one_in_ten_seconds_still_lets_one_through_and_none_lets_nothing() -> None:
    bucket = Bucket(0.01)
    assert passed(bucket, [5.0, 6.0, 104.0, 105.0, 106.0]) == 2
    assert passed(Bucket(0.0), [1.0, 1_000.0]) == 0


@given(st.floats(0.1, 50.0), st.lists(st.floats(0.0, 2.0), max_size=80))
def test_no_pattern_of_signals_passes_faster_than_the_rate(rate: float, gaps: list[float]) -> None:
    bucket, now, through = Bucket(rate), 0.0, 0
    for gap in gaps:
        now += gap
        through += bucket.take(now)
    assert through <= max(rate * BURST_S, 1.0) + rate * now + 1e-6


def test_a_name_finds_its_context_and_another_name_none() -> None:
    names = Names(2, 100)
    names.remember("a", context(10), 0.0)
    assert names.recall("a", 0.0) == context(10)
    with pytest.raises(UnknownContext, match="no context is known by the name 'b'"):
        names.recall("b", 0.0)


def test_a_new_name_is_refused_while_the_others_are_in_use_and_displaces_the_longest_unused() -> None:
    names = Names(2, 100)
    names.remember("a", context(10), 0.0)
    names.remember("b", context(10), 1.0)
    with pytest.raises(LimitExceeded, match=r"2 named contexts .*service\.max_contexts"):
        names.remember("c", context(10), IN_USE_S)
    names.recall("a", 2.0)
    names.remember("c", context(10), IN_USE_S + 1.5)
    assert names.recall("a", IN_USE_S + 2) == names.recall("c", IN_USE_S + 2)
    with pytest.raises(UnknownContext):
        names.recall("b", IN_USE_S + 2)


def test_a_name_can_be_given_anew_when_all_are_in_use() -> None:
    names = Names(1, 100)
    names.remember("a", context(10), 0.0)
    names.remember("a", context(90), 0.0)
    assert (len(names), names.bytes) == (1, 90)


def test_bytes_are_limited_too_and_a_refusal_changes_nothing() -> None:
    names = Names(10, 100)
    names.remember("a", context(60), 0.0)
    for name, size in (("b", 50), ("a", 101)):
        with pytest.raises(LimitExceeded):
            names.remember(name, context(size), 1.0)
    assert (len(names), names.bytes, names.recall("a", 1.0)) == (1, 60, context(60))
    with pytest.raises(LimitExceeded):
        names.remember("b", context(101), 1_000.0)
    assert names.recall("a", 1_000.0)
    names.remember("b", context(100), 2_000.0)
    assert (len(names), names.bytes) == (1, 100)


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(3, 60), st.floats(0.0, 100.0)), max_size=40))
def test_names_never_hold_more_than_they_may(story: list[tuple[str, int, float]]) -> None:
    names, now, kept = Names(3, 100), 0.0, {}
    for name, size, gap in story:
        now += gap
        try:
            names.remember(name, context(size), now)
            kept[name] = size
        except LimitExceeded:
            pass
        held = [each for each in "abcdef" if each in names._named]
        assert len(held) == len(names) <= 3
        assert names.bytes == sum(kept[each] for each in held) <= 100
