"""State of predictors as bytes and back."""

import json
import zlib
from collections import OrderedDict, deque
from math import inf, isnan, nan

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvprefetch.errors import StateError
from kvprefetch.predict.gaps import GapModel
from kvprefetch.predict.rates import Shares
from kvprefetch.predict.saved import VERSION, dump, load
from kvprefetch.predict.sessions import Sessions
from kvprefetch.predict.trials import Trials
from kvprefetch.predict.which import Which


def packed(text: str) -> bytes:
    body = zlib.compress(text.encode())
    return b"kvprefetch-state %d %08x %d\n" % (VERSION, zlib.crc32(body), len(body)) + body


def some_days(which: Which, first: int = 0) -> list[object]:
    """Uses and signals; what was foreseen before each."""
    said: list[object] = []
    for i in range(first, first + 120):
        session, name, at = f"s{i // 20}", f"src/{'abcdef'[i * i % 6]}.py", which.now + 1 + i % 30
        if i % 3 == 0:
            which.signalled(session, "t", "u", "grep", name, at)
        said += [(p, p.because) for p in which.predictions(session, "t", "u", at)]
        which.used(session, "t", "u", name, "read", at + 1)
    return said


def test_what_is_restored_foresees_and_learns_the_same() -> None:
    which = Which()
    some_days(which)
    restored = load(dump(which), Which)
    assert some_days(restored, 500) == some_days(which, 500)
    assert dump(restored) == dump(which)


def test_sessions_go_on_where_they_were() -> None:
    sessions = Sessions()
    for i in range(60):
        sessions.requested(f"s{i % 3}", "t", 10.0 * i)
        sessions.turn_ended(f"s{i % 3}", "t", 10.0 * i + 2, "tool", 1000)
    restored = load(dump(sessions), Sessions)
    for model in (sessions, restored):
        model.signalled("s1", "t", 640.0, "typing")
        model.requested("s2", "t", 900.0)
    assert restored.outlook("s1", 950.0, 2.0) == sessions.outlook("s1", 950.0, 2.0)
    assert dump(restored) == dump(sessions)


def test_trials_shares_and_gaps_go_on_where_they_were() -> None:
    trials, shares, gaps = Trials(), Shares(0.5), GapModel()
    for i in range(40):
        trials.propose(f"s{i % 4}", "opened", "t", 0.3, 1, float(i), i + 3.0)
        trials.used(f"s{i % 3}", 1.0, i + 0.5)
        shares.learn(("a", ("a", i % 2)), i % 2)
        gaps.ended(gaps.cell(("use",)), float(i))
    one, other, third = load(dump([trials, shares, gaps]), list)
    assert one.calibrated("opened", "t", 0.3, 1) == trials.calibrated("opened", "t", 0.3, 1)
    assert other.mean(("a", ("a", 1))) == shares.mean(("a", ("a", 1)))
    assert third.cell(("use",)).quantile(3.0, 0.5) == gaps.cell(("use",)).quantile(3.0, 0.5)
    for model in (trials, one):
        model.propose("s9", "opened", "t", 0.3, 1, 50.0, 51.0)
        model.advance(60.0)
    assert dump(one) == dump(trials)


def test_one_object_stays_one() -> None:
    gaps = GapModel()
    one, other = load(dump([gaps, gaps]), list)
    assert one is other


LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
KEYS = st.text() | st.tuples(st.text(), st.integers())
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(KEYS, inner)
        | st.dictionaries(KEYS, inner).map(OrderedDict)
        | st.lists(inner).map(lambda items: deque(items, maxlen=7))
        | st.sets(KEYS)
    ),
    max_leaves=20,
)


@settings(deadline=None)
@given(VALUES)
def test_plain_values_come_back_as_they_were(value: object) -> None:
    back = load(dump(value), object)
    assert back == value
    assert repr(back) == repr(value) or "{" in repr(value)  # types, too; sets have no order


def test_numbers_that_are_none_come_back() -> None:
    low, high, none = load(dump([-inf, inf, nan]), list)
    assert (low, high) == (-inf, inf)
    assert isnan(none)


def test_what_is_no_state_is_not_saved() -> None:
    for odd in (object(), print, Which, [1, {"a": b"bytes"}]):
        with pytest.raises(StateError):
            dump(odd)


def test_another_version_is_named() -> None:
    data = dump(Which()).replace(b" %d " % VERSION, b" 999 ", 1)
    with pytest.raises(StateError, match="version 999"):
        load(data, Which)


def test_another_kind_is_named() -> None:
    with pytest.raises(StateError, match="Trials"):
        load(dump(Trials()), Which)


@pytest.mark.parametrize(
    "content",
    [
        "[",
        '["object","Which"]',
        '["object","os","system"]',
        '["object","str","x"]',
        '["eval","1"]',
        '["same",3]',
        '["deque",-1]',
        '["count",1e999]',
        '["dict",1]',
        '["dict",["list"],1]',
        '["parts",1]',
        "[]",
        "[" * 100_000,
        json.dumps(["object", "Row", 1, 2, 3, 4]),
    ],
)
def test_sound_bytes_of_no_state_are_refused(content: str) -> None:
    with pytest.raises(StateError):
        load(packed(content), Which)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damage_is_always_found(data: st.DataObject) -> None:
    sound = dump(Trials())
    at = data.draw(st.integers(0, len(sound) - 1))
    damaged = bytearray(sound)
    damaged[at] ^= data.draw(st.integers(1, 255))
    for bad in (bytes(damaged), sound[:at], sound + b"x", sound[at + 1 :]):
        with pytest.raises(StateError):
            load(bad, Trials)


@given(st.binary(max_size=200))
def test_any_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(StateError):
        load(data, Which)
