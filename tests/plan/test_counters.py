"""Virtual-time counters: service by weight, no credit from idleness, and bounded memory."""

from math import inf, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvprefetch.plan.counters import Counters


def test_service_counts_by_weight() -> None:
    counters = Counters(lambda tenant: {"ann": 2.0}.get(tenant, 1.0))
    for tenant in ("ann", "bob"):
        counters.enter(tenant)
    for tenant in ("ann", "bob"):
        counters.charge(tenant, 4.0)
    assert (counters.level("ann"), counters.level("bob")) == (2.0, 4.0)
    assert counters.total == 8.0


def test_who_comes_from_idleness_starts_where_the_least_of_the_others_is() -> None:
    counters = Counters()
    for tenant, service in (("ann", 10.0), ("bob", 30.0)):
        counters.enter(tenant)
        counters.charge(tenant, service)
    counters.enter("cid")
    assert counters.level("cid") == 10.0


def test_what_was_had_before_a_pause_is_not_forgotten_by_it() -> None:
    counters = Counters()
    counters.enter("ann")
    counters.enter("bob")
    counters.charge("bob", 5.0)
    counters.leave("bob")
    counters.enter("bob")
    assert counters.level("bob") == 5.0


def test_where_all_were_idle_the_last_to_leave_is_the_measure() -> None:
    counters = Counters()
    counters.enter("ann")
    counters.charge("ann", 7.0)
    counters.leave("ann")
    counters.enter("bob")
    counters.enter("ann")
    assert (counters.level("ann"), counters.level("bob")) == (7.0, 7.0)


def test_whoever_was_served_while_nobody_else_wanted_it_has_its_credit_still_when_a_flood_comes() -> None:
    counters = Counters(credit=30.0)
    for _ in range(100):  # now and then, alone
        counters.enter("ann")
        counters.charge("ann", 1.0)
        counters.leave("ann")
    counters.enter("flood")
    counters.charge("flood", 0.5)
    counters.enter("ann")
    assert counters.level("ann") < counters.level("flood")
    counters.charge("flood", 1_000.0)  # ever on
    counters.leave("ann")
    counters.enter("ann")
    assert counters.level("ann") == counters.level("flood") - 30.0


def test_who_wants_several_things_is_idle_when_it_wants_none_of_them() -> None:
    counters = Counters()
    counters.enter("ann")
    counters.enter("ann")
    counters.leave("ann")
    counters.enter("bob")
    counters.charge("bob", 3.0)
    assert counters.floor == 0.0, "ann still wants something"
    counters.leave("ann")
    assert counters.floor == 3.0
    counters.leave("ann")
    counters.leave("nobody")


def test_service_beside_the_queue_counts_as_well() -> None:
    counters = Counters()
    counters.enter("bob")
    counters.charge("bob", 1.0)
    counters.charge("ann", 3.0)  # an answer of its is decoded meanwhile
    counters.enter("ann")
    assert counters.level("ann") == 4.0


def test_a_weight_holds_from_when_it_is_set() -> None:
    counters = Counters()
    counters.enter("ann")
    counters.charge("ann", 6.0)
    counters.weight = lambda tenant: 3.0
    counters.charge("ann", 6.0)
    assert counters.level("ann") == 8.0


@pytest.mark.parametrize("nonsense", [nan, inf, -inf, -1.0, 0.0])
def test_nonsense_is_no_service_and_no_weight(nonsense: float) -> None:
    counters = Counters(lambda tenant: nonsense)
    counters.charge("ann", nonsense)
    assert counters.level("ann") == 0.0
    counters.charge("ann", 2.0)
    assert counters.level("ann") == 2.0


def test_of_a_hundred_thousand_tenants_few_are_remembered() -> None:
    counters = Counters(max_idle=1_000)
    counters.enter("stays")
    for number in range(100_000):
        tenant = f"t{number}"
        counters.enter(tenant)
        counters.charge(tenant, 1.0 + number % 10)
        counters.leave(tenant)
        assert len(counters) <= 1_001
    assert len(counters._idle) <= 2_100
    assert counters.level("t99999") == 10.0, "those furthest above the floor are remembered"
    counters.charge("stays", 1e6)
    counters.enter("one")
    counters.charge("one", 1e6)
    counters.leave("one")
    assert len(counters) <= 2, "nobody who is at or below the floor"


@given(
    st.lists(
        st.tuples(st.sampled_from(["enter", "leave", "charge"]), st.sampled_from("abcd"), st.floats(0.0, 10.0)),
        max_size=60,
    )
)
def test_levels_and_the_floor_never_fall_and_no_credit_is_banked(story: list[tuple[str, str, float]]) -> None:
    counters = Counters()
    wants = dict.fromkeys("abcd", 0)
    floor, levels = 0.0, dict.fromkeys("abcd", 0.0)
    for what, tenant, amount in story:
        if what == "enter":
            counters.enter(tenant)
            wants[tenant] += 1
        elif what == "leave":
            counters.leave(tenant)
            wants[tenant] = max(wants[tenant] - 1, 0)
        else:
            counters.charge(tenant, amount)
        active = [counters.level(name) for name, wanted in wants.items() if wanted]
        assert counters.floor >= floor
        assert not active or counters.floor == min(active)
        assert all(counters.level(name) >= max(levels[name], counters.floor) for name in wants)
        floor, levels = counters.floor, {name: counters.level(name) for name in wants}
