"""One rule of shares, every tier that is bounded: see `kvprefetch.tiers.contract`."""

import hypothesis.strategies as st
import pytest
from conformance_tiers import BLOCK, Open, Place, chain, incoming
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from kvprefetch.cache.shares import Share, Shares
from kvprefetch.tiers.contract import Tier


def bounded(opened: Open, slots: int = 8) -> Place:
    place = opened(slots)
    if not place.is_bounded:
        pytest.skip("its server bounds it")
    return place


def store(place: Place, tenant: str, words: str, *, hold_s: float | None = None, block_bytes: int = BLOCK) -> int:
    """A while later, the tenant stores its sequence of so many letters."""
    place.clock.now += 1
    until = None if hold_s is None else place.clock.now + hold_s
    return place.tier.store(incoming(words, block_bytes, tenant, until=until, root=tenant.encode()))


def has(tier: Tier, tenant: str, words: str) -> int:
    return tier.find(chain(words, tenant.encode()))


def blocks_of(tier: Tier) -> dict[str, int]:
    """By tenant."""
    return {tenant: size // tier.block_bytes for tenant, size in sorted(tier.usage().by_tenant.items())}


def test_who_is_within_its_guarantee_loses_nothing_to_a_flood(opened: Open) -> None:
    place = bounded(opened)
    place.tier.rule(Shares({"ann": Share(guarantee=0.5)}))
    store(place, "ann", "abcd")
    for letter in "klmnopqrst":
        assert store(place, "bob", 3 * letter) == 3
        assert has(place.tier, "ann", "abcd") == 4
    assert blocks_of(place.tier) == {"ann": 4, "bob": 4}
    assert store(place, "bob", "uvwxyz") == 4, "as many as there are beside them"
    assert has(place.tier, "ann", "abcd") == 4


def test_what_nobody_uses_is_lent_and_given_back(opened: Open) -> None:
    place = bounded(opened)
    place.tier.rule(Shares({"ann": Share(guarantee=0.5), "bob": Share(guarantee=0.25)}))
    assert store(place, "bob", "stuvwxyz") == 8, "no slot stays empty while somebody wants it"
    assert store(place, "ann", "abcd") == 4
    assert blocks_of(place.tier) == {"ann": 4, "bob": 4}


def test_beyond_guarantees_it_is_shared_by_weight(opened: Open) -> None:
    place = bounded(opened, 12)
    place.tier.rule(Shares({"ann": Share(weight=3.0, guarantee=1 / 6), "bob": Share(guarantee=1 / 6)}))
    for letter in "klmnopqrstuvwxyz":
        store(place, "ann", letter)
        store(place, "bob", letter)
    assert blocks_of(place.tier) == {"ann": 8, "bob": 4}


def test_who_is_furthest_over_pays_for_another_and_for_itself(opened: Open) -> None:
    place = bounded(opened)
    place.tier.rule(Shares({"ann": Share(guarantee=0.25), "bob": Share(guarantee=0.25)}))
    for letter in "klmn":
        store(place, "bob", letter)
    for letter in "abcd":
        store(place, "cid", letter)
    store(place, "bob", "o")
    assert blocks_of(place.tier) == {"bob": 5, "cid": 3}
    store(place, "cid", "e")
    assert blocks_of(place.tier) == {"bob": 5, "cid": 3}, "it is as far over as the other, with what it asks for"
    assert (has(place.tier, "cid", "b"), has(place.tier, "cid", "e")) == (0, 1), "its oldest went"


def test_shares_may_change_at_any_moment_and_nothing_goes_at_once(opened: Open) -> None:
    place = bounded(opened)
    place.tier.rule(Shares({"ann": Share(guarantee=0.75)}))
    store(place, "ann", "abcdef")
    store(place, "bob", "xy")
    place.tier.rule(Shares({"ann": Share(guarantee=0.25), "bob": Share(guarantee=0.75)}))
    assert blocks_of(place.tier) == {"ann": 6, "bob": 2}
    for words in ("xyz", "pqr"):
        assert store(place, "bob", words) == 3
    assert blocks_of(place.tier) == {"ann": 2, "bob": 6}
    store(place, "bob", "klm")
    assert has(place.tier, "ann", "ab") == 2, "the beginning of the sequence"
    assert blocks_of(place.tier) == {"ann": 2, "bob": 6}
    place.tier.rule(Shares())
    assert blocks_of(place.tier) == {"ann": 2, "bob": 6}


def test_a_preload_takes_of_its_own_tenant_alone(opened: Open) -> None:
    place = bounded(opened)
    place.tier.rule(Shares({"ann": Share(guarantee=0.5)}))
    store(place, "bob", "tuvwxyz")
    assert store(place, "ann", "abcd", hold_s=60.0) == 1
    assert blocks_of(place.tier) == {"ann": 1, "bob": 7}
    assert store(place, "ann", "klm", hold_s=60.0) in (0, 1), "at most in place of its own"
    assert blocks_of(place.tier) == {"ann": 1, "bob": 7}
    assert store(place, "ann", "klm") == 3


def test_the_operator_pays_for_what_is_public(opened: Open) -> None:
    place = bounded(opened)
    place.tier.rule(Shares({"ann": Share(guarantee=0.5)}))
    store(place, "", "abcdefgh")
    assert blocks_of(place.tier) == {"": 8}
    store(place, "ann", "klmn")
    assert blocks_of(place.tier) == {"": 4, "ann": 4}


# -- whatever comes ----------------------------------------------------------------------------------------
SLOTS = 10
TENANTS = ("ann", "bob", "cid")
shares = st.dictionaries(
    st.sampled_from(TENANTS),
    st.builds(Share, st.sampled_from([0.5, 1.0, 3.0]), st.sampled_from([0.0, 0.1, 0.3])),
).map(Shares)


class SharesMachine(RuleBasedStateMachine):
    """Three tenants on ten slots, and one who only preloads. `opened` is set in a subclass."""

    opened: Open

    @initialize(shares=shares)
    def start(self, shares: Shares) -> None:
        self.place, self.shares = self.opened(SLOTS, 64), shares
        self.place.tier.rule(shares)

    @rule(shares=shares)
    def change(self, shares: Shares) -> None:
        before = blocks_of(self.place.tier)
        self.shares = shares
        self.place.tier.rule(shares)
        assert blocks_of(self.place.tier) == before

    @rule(tenant=st.sampled_from(TENANTS), words=st.text("abc", min_size=1, max_size=5))
    def store(self, tenant: str, words: str) -> None:
        before = blocks_of(self.place.tier)
        stored = store(self.place, tenant, words, block_bytes=64)
        after = blocks_of(self.place.tier)
        assert has(self.place.tier, tenant, words) >= stored
        for other, blocks in before.items():
            if other != tenant:
                assert after.get(other, 0) >= min(blocks, self.shares.guaranteed(other, SLOTS)), "within its guarantee"
        assert after.get(tenant, 0) >= min(len(words), self.shares.guaranteed(tenant, SLOTS))
        assert stored == len(words) or sum(after.values()) == SLOTS, "no slot stays empty while somebody wants it"

    @rule(words=st.text("abc", min_size=1, max_size=5))
    def preload(self, words: str) -> None:
        """By one who never asks, so that no guarantee counts what only was preloaded."""
        before = blocks_of(self.place.tier)
        store(self.place, "dan", words, hold_s=1e6, block_bytes=64)
        after = blocks_of(self.place.tier)
        assert all(after.get(other, 0) == before[other] for other in before if other != "dan")

    @rule(tenant=st.sampled_from(TENANTS), words=st.text("abc", min_size=1, max_size=5))
    def load(self, tenant: str, words: str) -> None:
        keys = chain(words, tenant.encode())
        self.place.tier.load(keys, [memoryview(bytearray(64)) for _ in keys])

    @rule()
    def reopen(self) -> None:
        if self.place.reopen is not None:
            before = blocks_of(self.place.tier)
            self.place.tier.close()
            self.place.reopen()
            self.place.tier.rule(self.shares)
            assert blocks_of(self.place.tier) == before

    @invariant()
    def it_adds_up(self) -> None:
        self.place.tier.check()
        usage = self.place.tier.usage()
        assert usage.blocks <= SLOTS
        assert usage.capacity == SLOTS * 64
        assert sum(usage.by_tenant.values()) == usage.bytes == usage.blocks * 64

    def teardown(self) -> None:
        self.place.tier.close()
        self.place.is_closed = True


def test_guarantees_hold_and_nothing_stays_empty_whatever_comes(opened: Open) -> None:
    bounded(opened)

    class Machine(SharesMachine):
        pass

    Machine.opened = staticmethod(opened)  # type: ignore[assignment]
    few = settings(
        max_examples=30, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck), database=None
    )
    run_state_machine_as_test(Machine, settings=few)
