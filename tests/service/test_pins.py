from collections.abc import Iterator
from pathlib import Path

import pytest
from arenas import ANN, Desk, chain, open_host, packed

from kvprefetch.cache.shares import Share, Shares
from kvprefetch.errors import LimitExceeded
from kvprefetch.service.pins import LONGEST_S, Pins


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(open_host(tmp_path))
    yield desk
    desk.check()


def pin(desk: Desk, pins: Pins, path: str, hold_s: float, now: float = 0.0, tenant: str = "ann") -> int:
    return pins.pin(tenant, tuple(chain(path)), desk.host.longest(packed(path)), hold_s, now)


def test_pinned_blocks_stay_until_their_time_is_over(desk: Desk) -> None:
    pins = Pins(desk.host.pool, most_slots=4)
    desk.keep("abc")
    assert pin(desk, pins, "abcd", 10.0) == 3
    desk.host.pool.clear()
    desk.check()
    assert desk.found("abc") == "abc"
    pins.expire(9.9)
    assert len(pins) == 1
    pins.expire(10.0)
    desk.host.pool.clear()
    assert desk.found("abc") == ""


def test_a_pin_is_prolonged_and_never_cut_short(desk: Desk) -> None:
    pins = Pins(desk.host.pool, most_slots=4)
    desk.keep("ab")
    for hold_s in (10.0, 20.0, 5.0):
        assert pin(desk, pins, "ab", hold_s) == 2
    desk.check()
    assert len(pins) == 1
    pins.expire(19.0)
    assert len(pins) == 1
    pins.expire(20.0)
    assert len(pins) == 0


def test_nobody_pins_for_longer_than_an_hour(desk: Desk) -> None:
    pins = Pins(desk.host.pool, most_slots=4)
    desk.keep("ab")
    pin(desk, pins, "ab", 1e9)
    pins.expire(LONGEST_S)
    assert len(pins) == 0


def test_what_is_not_there_cannot_be_pinned(desk: Desk) -> None:
    pins = Pins(desk.host.pool, most_slots=4)
    assert pin(desk, pins, "abc", 10.0) == 0
    assert len(pins) == 0


def test_a_tenant_pins_so_much_and_takes_nothing_from_anothers_share(desk: Desk) -> None:
    pins = Pins(desk.host.pool, most_slots=3)
    desk.keep("ab")
    desk.keep("xy")
    pin(desk, pins, "ab", 10.0)
    with pytest.raises(LimitExceeded, match="2 blocks of 'ann' are pinned, of 3"):
        pin(desk, pins, "xy", 10.0)
    assert pin(desk, pins, "xy", 10.0, tenant="bob") == 2
    assert pin(desk, pins, "xy", 10.0, now=10.0) == 2  # the first is over
    desk.check()


def test_a_pin_is_taken_back_by_its_tenant_alone(desk: Desk) -> None:
    pins = Pins(desk.host.pool, most_slots=8)
    desk.keep("ab", ANN)
    pin(desk, pins, "ab", 10.0)
    assert pin(desk, pins, "ab", 0.0, tenant="bob") == 0
    assert len(pins) == 1
    pin(desk, pins, "abc", 0.0)
    assert len(pins) == 0


def test_a_tenant_pins_no_more_than_its_share_of_the_arena(desk: Desk) -> None:
    pins = Pins(desk.host.pool, most_slots=4)
    pins.shares = Shares({"ann": Share(guarantee=0.5), "bob": Share()})
    desk.keep("abcd")
    desk.keep("wxyz")
    assert pin(desk, pins, "wx", 10.0, tenant="bob") == 2  # of a fourth of eight: half of what nobody is guaranteed
    with pytest.raises(LimitExceeded, match="2 blocks of 'bob' are pinned, of 2"):
        pin(desk, pins, "a", 10.0, tenant="bob")
    with pytest.raises(LimitExceeded, match="0 blocks of 'cid' are pinned, of 1"):
        pin(desk, pins, "wx", 10.0, tenant="cid")  # a third of it
    assert pin(desk, pins, "abcd", 10.0) == 4  # a half and a fourth, but no more than any tenant
    with pytest.raises(LimitExceeded, match="4 blocks of 'ann' are pinned, of 4"):
        pin(desk, pins, "w", 10.0)


def test_where_a_share_becomes_less_what_is_pinned_stays_until_its_time_is_over(desk: Desk) -> None:
    pins = Pins(desk.host.pool, most_slots=4)
    desk.keep("ab")
    desk.keep("xy")
    for path in ("ab", "xy"):
        assert pin(desk, pins, path, 10.0, tenant="bob") == 2
    pins.shares = Shares({"ann": Share(guarantee=0.75), "bob": Share(weight=0.5)})
    desk.host.pool.clear()
    assert (desk.found("ab"), desk.found("xy")) == ("ab", "xy")
    with pytest.raises(LimitExceeded, match="2 blocks of 'bob' are pinned, of 1"):
        pin(desk, pins, "ab", 20.0, tenant="bob")
    with pytest.raises(LimitExceeded, match="0 blocks of 'bob' are pinned, of 1"):
        pin(desk, pins, "ab", 20.0, now=10.0, tenant="bob")
    assert pin(desk, pins, "a", 20.0, now=10.0, tenant="bob") == 1
    pins.shares = Shares({"ann": Share(guarantee=1.0)})
    assert pin(desk, pins, "a", 30.0, now=10.0, tenant="bob") == 1  # one block is always allowed
