"""What a tenant may count on: which shares there can be, and what they come to in pages."""

from math import inf, nan

import hypothesis.strategies as st
import pytest
from hypothesis import given

from kvprefetch.cache.shares import OPERATOR, Share, Shares
from kvprefetch.errors import InvalidRequest


@pytest.mark.parametrize("weight", [0, -1, -0.0, inf, -inf, nan])
def test_a_weight_is_above_nothing(weight: float) -> None:
    with pytest.raises(InvalidRequest, match="a weight is a finite number above 0"):
        Share(weight=weight)


@pytest.mark.parametrize("guarantee", [-0.1, 1.1, inf, nan])
def test_a_guarantee_is_a_part_of_the_pool(guarantee: float) -> None:
    with pytest.raises(InvalidRequest, match="a guarantee is a fraction of the pool from 0 to 1"):
        Share(guarantee=guarantee)


def test_no_more_than_the_pool_is_guaranteed() -> None:
    Shares({"ann": Share(guarantee=0.6), "bob": Share(guarantee=0.4)})
    with pytest.raises(InvalidRequest, match=r"add up to 110\.0% of a pool"):
        Shares({"ann": Share(guarantee=0.6), "bob": Share(guarantee=0.5)})


def test_a_guarantee_of_less_than_a_page_is_none() -> None:
    shares = Shares({"ann": Share(guarantee=0.04), "bob": Share()})
    shares.require_fit(25)
    assert shares.guaranteed("ann", 24) == 0
    with pytest.raises(InvalidRequest, match=r"the guarantee of 'ann' \(4.000%\) is less than one of 24 pages"):
        shares.require_fit(24)


@pytest.mark.parametrize("name", [OPERATOR, "eve", "", "a b\0c\n", "Ünïcode ☃", "x" * 10_000, "'; drop --"])
def test_who_is_not_named_has_weight_one_and_no_guarantee(name: str) -> None:
    shares = Shares({"ann": Share(weight=3, guarantee=0.5)})
    assert (shares.weight(name), shares.guaranteed(name, 100)) == (1.0, 0)
    named = Shares({name: Share(weight=3, guarantee=0.5)})
    assert (named.weight(name), named.guaranteed(name, 100)) == (3.0, 50)


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=50), st.integers(1, 2_000_000))
def test_all_guarantees_together_fit_into_every_pool(parts: list[int], pages: int) -> None:
    total = max(sum(parts), 1)
    shares = Shares({str(at): Share(guarantee=part / total) for at, part in enumerate(parts)})
    assert sum(shares.guaranteed(str(at), pages) for at in range(len(parts))) <= pages


@given(st.integers(1, 100_000), st.integers(1, 100_000))
def test_a_guarantee_of_whole_pages_is_that_many(one: int, another: int) -> None:
    pages, own = max(one, another), min(one, another)
    assert Shares({"ann": Share(guarantee=own / pages)}).guaranteed("ann", pages) == own
