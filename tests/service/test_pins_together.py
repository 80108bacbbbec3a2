"""Pins of many tenants together, each of whom may pin a part of what nobody is guaranteed."""

from pathlib import Path

import pytest
from arenas import Desk, chain, open_host, packed

from kvprefetch.cache.shares import Share, Shares
from kvprefetch.errors import LimitExceeded
from kvprefetch.service.pins import Pins


def pin(desk: Desk, pins: Pins, tenant: str, path: str, hold_s: float = 10.0) -> int:
    return pins.pin(tenant, tuple(chain(path)), desk.host.longest(packed(path)), hold_s, 0.0)


def test_all_pins_together_leave_another_its_guarantee(tmp_path: Path) -> None:
    desk = Desk(open_host(tmp_path, slots=16))
    pins = Pins(desk.host.pool, most_slots=4)
    pins.shares = Shares({"ann": Share(guarantee=0.5)})
    paths = {"bob": "kl", "cid": "mn", "dan": "op", "eve": "qr", "fay": "st"}
    for path in paths.values():
        desk.keep(path)
    for tenant in ("bob", "cid", "dan", "eve"):
        assert pin(desk, pins, tenant, paths[tenant]) == 2
    with pytest.raises(LimitExceeded, match="0 blocks of 'fay' are pinned, of 1"):
        pin(desk, pins, "fay", paths["fay"])  # alone it might have 4
    assert pin(desk, pins, "bob", paths["bob"], 20.0) == 2, "what it has, it may prolong"
    desk.keep("abcd")
    assert pin(desk, pins, "ann", "abcd") == 4, "its guarantee is its own"
    pin(desk, pins, "bob", paths["bob"], 0.0)
    assert pin(desk, pins, "fay", paths["fay"]) == 2
    desk.check()


def test_pins_within_a_guarantee_take_nothing_of_what_others_may_pin(tmp_path: Path) -> None:
    desk = Desk(open_host(tmp_path))
    pins = Pins(desk.host.pool, most_slots=4)
    pins.shares = Shares({"ann": Share(guarantee=0.5)})
    desk.keep("abcd")
    desk.keep("kl")
    assert pin(desk, pins, "ann", "abcd") == 4
    assert pin(desk, pins, "bob", "kl") == 2
    desk.check()
