"""Whose blocks go, where blocks are only counted."""

import hypothesis.strategies as st
from hypothesis import given

from kvprefetch.cache.fair import whose_blocks_go
from kvprefetch.cache.shares import Share, Shares

NOBODY = Shares()


def test_who_has_most_gives_first_and_then_they_take_turns() -> None:
    charged = {"ann": 6, "bob": 4, "cid": 1}
    assert whose_blocks_go(charged, NOBODY, 10, 2) == {"ann": 2}
    assert whose_blocks_go(charged, NOBODY, 10, 5) == {"ann": 4, "bob": 1}


def test_who_has_more_weight_keeps_more() -> None:
    shares = Shares({"ann": Share(weight=2.0)})
    assert whose_blocks_go({"ann": 8, "bob": 4}, shares, 10, 1) == {"ann": 1}, "as far over as the other: by name"
    assert whose_blocks_go({"ann": 8, "bob": 5}, shares, 10, 4) == {"ann": 2, "bob": 2}


def test_what_is_guaranteed_never_goes() -> None:
    shares = Shares({"ann": Share(guarantee=0.5), "bob": Share(guarantee=0.5)})
    assert whose_blocks_go({"ann": 4, "bob": 6}, shares, 10, 3) == {"bob": 1}
    assert whose_blocks_go({"ann": 5, "bob": 5}, shares, 10, 3) == {}
    assert whose_blocks_go({}, shares, 10, 3) == {}


names = st.sampled_from("abcdefgh")
charges = st.dictionaries(names, st.integers(0, 30))
some = st.dictionaries(names, st.builds(Share, st.sampled_from([0.1, 1.0, 2.5]), st.sampled_from([0.0, 0.05, 0.12])))


@given(charges, some.map(Shares), st.integers(1, 100), st.integers(0, 60))
def test_it_is_max_min_over_guarantees(charged: dict[str, int], shares: Shares, total: int, wanted: int) -> None:
    going = whose_blocks_go(charged, shares, total, wanted)
    over = {tenant: blocks - shares.guaranteed(tenant, total) for tenant, blocks in charged.items()}
    assert sum(going.values()) == min(wanted, sum(max(blocks, 0) for blocks in over.values()))
    for tenant, blocks in going.items():
        assert blocks <= over[tenant], "within its guarantee"
        last = (over[tenant] - blocks + 1) / shares.weight(tenant)  # how far over it was when its last one went
        assert all((over[other] - going.get(other, 0)) / shares.weight(other) <= last for other in charged)
