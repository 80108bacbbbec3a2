"""The order by index, within law 3, and under guard."""

from collections.abc import Callable
from math import inf, nextafter

import hypothesis.strategies as st
import pytest
from hypothesis import given
from tiny_pools import live, preload

from kvprefetch.cache.evict import Demand, Rank, by_index, lru
from kvprefetch.cache.guard import Guard, guarded
from kvprefetch.cache.spans import Span

NOW = 10.0


def span(tenant: str, kind: str, last_used: float = 3.0) -> Span:
    """A span that was used, or unused speculation on hold or past it."""
    found = Span(0, 1, 0, None, tenant, "s", last_used)
    found.speculative = kind != "used"
    found.hold_until = {"used": 0.0, "on hold": NOW + 1, "expired": NOW}[kind]
    return found


def worth(value: float) -> Callable[[Span, Demand], Rank | None]:
    """The policy where everything's index is `value`."""
    return by_index(lambda span, now: value)


@pytest.mark.parametrize(
    ("tenant", "kind", "rank"),
    [
        ("ann", "expired", Rank(0, 3.0, "hold_expired")),
        ("bob", "expired", Rank(0, 3.0, "speculative_of_other_tenant")),
        ("bob", "on hold", Rank(0, 3.0, "speculative_of_other_tenant")),
        ("ann", "on hold", Rank(1, nextafter(0.5, 0), "index")),
        ("ann", "used", Rank(1, 0.5, "index")),
        ("bob", "used", Rank(1, 0.5, "index")),
    ],
)
def test_a_live_request_takes(tenant: str, kind: str, rank: Rank) -> None:
    assert worth(0.5)(span(tenant, kind), live("ann", NOW)) == rank


@pytest.mark.parametrize(
    ("tenant", "kind", "rank"),
    [
        ("ann", "expired", Rank(0, 3.0, "hold_expired")),
        ("ann", "on hold", Rank(1, nextafter(0.5, 0), "index")),
        ("ann", "used", Rank(1, 0.5, "index")),
        ("bob", "expired", None),
        ("bob", "on hold", None),
        ("bob", "used", None),
    ],
)
def test_a_preload_takes(tenant: str, kind: str, rank: Rank | None) -> None:
    assert worth(0.5)(span(tenant, kind), Demand("ann", True, NOW, worth=0.6)) == rank


@pytest.mark.parametrize("value", [0.0, 0.5, inf])
def test_where_indices_are_equal_speculation_goes_first(value: float) -> None:
    used, held = (worth(value)(span("ann", kind), live("ann", NOW)) for kind in ("used", "on hold"))
    assert used is not None
    assert held is not None
    assert held < used


@pytest.mark.parametrize("kind", ["used", "on hold"])
def test_a_preload_takes_nothing_worth_as_much(kind: str) -> None:
    assert worth(0.6)(span("ann", kind), Demand("ann", True, NOW, worth=0.6)) is None


def test_the_index_is_asked_for_the_time_of_the_demand() -> None:
    asked: list[float] = []

    def index(span: Span, now: float) -> float:
        asked.append(now)
        return 1.0

    by_index(index)(span("ann", "used"), live("ann", 42.0))
    assert asked == [42.0]


SPANS = st.builds(
    span, st.sampled_from(["ann", "bob"]), st.sampled_from(["used", "on hold", "expired"]), st.floats(0, NOW)
)
DEMANDS = st.builds(Demand, st.sampled_from(["ann", "bob"]), st.booleans(), st.just(NOW), st.floats(0, 2))


@given(SPANS, DEMANDS, st.booleans())
def test_under_guard_one_policy_ranks_everything_for_a_demand(one: Span, demand: Demand, follows: bool) -> None:
    guard = Guard(4, worth(1.0))
    guard.all.follows_index = follows
    policy = guarded(worth(1.0), guard)
    assert policy(one, demand) == (worth(1.0) if follows else lru)(one, demand)


def test_a_guard_starts_with_lru() -> None:
    policy = guarded(worth(1.0), Guard(4, worth(1.0)))
    for demand in (live("ann", NOW), preload("ann", NOW)):
        for kind in ("used", "on hold", "expired"):
            assert policy(span("ann", kind), demand) == lru(span("ann", kind), demand)
