"""Sequences that begin with blocks of shared namespaces: who reads them, who fills them, who pays."""

from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_pools import BLOCK, letters, live

from kvprefetch.cache import keys as hashing
from kvprefetch.cache.commons import Commons, Owner, borrow
from kvprefetch.cache.evict import Demand
from kvprefetch.cache.keys import BlockKey, Scope, block_keys
from kvprefetch.cache.misses import explain
from kvprefetch.cache.pool import BlockPool
from kvprefetch.cache.sequence import PagedSequence
from kvprefetch.cache.shares import OPERATOR

PUBLIC, TEAM = b"public root", b"root of the team"


def root(tenant: str) -> BlockKey:
    return sha256(tenant.encode()).digest()


class Shop:
    """A pool whose tenants read the public namespace; ann and bob are a team."""

    def __init__(self, pages: int = 16) -> None:
        self.pool, self.commons = BlockPool(pages), Commons()
        self.pool.on_evict = lambda block, rule: self.commons.forget([block.key])
        self.operator = Owner(PUBLIC, OPERATOR, Scope.PUBLIC, (), self.commons)

    def owner(self, tenant: str, *, team: bool = False) -> Owner:
        if team:
            return Owner(TEAM, tenant, Scope.GROUP, (PUBLIC,), self.commons)
        groups = (TEAM,) if tenant in ("ann", "bob") else ()
        return Owner(root(tenant), tenant, Scope.PRIVATE, (PUBLIC, *groups), self.commons)

    def sequence(self, owner: Owner, text: str) -> PagedSequence:
        sequence = PagedSequence(self.pool, owner, letters(text), BLOCK)
        sequence.settle()
        sequence.open(len(text), Demand(owner.tenant, speculative=False, now=0.0, shared=owner.is_group))
        self.pool.touch(sequence.blocks[: sequence.shared], 0.0, "", owner.tenant)
        return sequence

    def serve(self, owner: Owner, text: str) -> int:
        """A request from beginning to end; the tokens that it found."""
        sequence = self.sequence(owner, text)
        found = sequence.written
        sequence.complete(len(text))
        self.pool.touch(sequence.blocks[: sequence.shared], 0.0, "", owner.tenant)
        sequence.close()
        self.pool.check()
        return found

    def warm(self, text: str, until: float = 100.0) -> None:
        """What the operator has warmed for all."""
        sequence = PagedSequence(self.pool, self.operator, letters(text), BLOCK)
        sequence.open(len(text), Demand(OPERATOR, speculative=True, now=0.0))
        sequence.complete(len(text), speculative_until=until)
        sequence.close()


def test_every_tenant_finds_what_the_operator_has_filled_and_goes_on_behind_it_for_itself() -> None:
    shop = Shop()
    shop.warm("aaaabbbb")
    assert [shop.serve(shop.owner(tenant), "aaaabbbbcccc") for tenant in ("ann", "eve")] == [8, 8]
    assert [shop.serve(shop.owner(tenant), "aaaabbbbcccc") for tenant in ("ann", "eve")] == [12, 12]
    assert {name: kinds.total() for name, kinds in shop.pool.charges().items()} == {OPERATOR: 2, "ann": 1, "eve": 1}


def test_public_blocks_are_the_operators_speculation_until_somebody_uses_them() -> None:
    shop = Shop()
    shop.warm("aaaabbbb")
    assert shop.pool.charges() == {OPERATOR: {"speculative": 2}}
    shop.serve(shop.owner("eve"), "aaaaxxxx")
    assert shop.pool.charges()[OPERATOR] == {"speculative": 1, "used": 1}


def test_the_reason_of_a_miss_does_not_tell_whether_others_went_on_behind_a_public_block() -> None:
    shop, reasons = Shop(), []
    shop.warm("aaaa")
    for _ in range(2):
        probe = PagedSequence(shop.pool, shop.owner("eve"), letters("aaaaxxxx"), BLOCK)
        reasons.append(explain(shop.pool, probe.keys, 1, BLOCK, borrowed=probe.borrowed))
        shop.serve(shop.owner("ann"), "aaaabbbb")
    assert reasons[0] == reasons[1]


def test_no_tenant_prolongs_what_the_operator_holds() -> None:
    shop = Shop()
    shop.warm("aaaa", until=100.0)
    (block,) = shop.pool.resident.values()
    shop.pool.extend_hold([block], 1e9, "ann")
    assert block.hold_until == 100.0
    shop.pool.extend_hold([block], 200.0, OPERATOR)
    assert block.hold_until == 200.0


def test_a_request_fills_nothing_public_whatever_it_borrows() -> None:
    shop = Shop()
    shop.warm("aaaa")
    shop.serve(shop.owner("ann"), "aaaabbbb")
    public = block_keys(PUBLIC, letters("aaaabbbb"), BLOCK)
    assert [key in shop.pool.resident for key in public] == [True, False]
    assert shop.serve(shop.owner("eve"), "aaaabbbb") == 4


def test_what_was_public_when_the_request_came_and_is_gone_when_it_is_admitted_becomes_its_own() -> None:
    shop = Shop()
    shop.warm("aaaabbbb")
    waiting = PagedSequence(shop.pool, shop.owner("ann"), letters("aaaabbbbcccc"), BLOCK)
    assert waiting.borrowed == 2
    shop.pool.clear()
    waiting.settle()
    assert waiting.open(12, live("ann")) == 0
    waiting.complete(12)
    assert set(shop.pool.resident) == set(block_keys(root("ann"), letters("aaaabbbbcccc"), BLOCK))
    assert len(shop.commons) == 0
    waiting.close()
    shop.pool.check()


def test_even_unsettled_it_publishes_what_it_computes_as_its_own() -> None:
    shop = Shop()
    shop.warm("aaaabbbb")
    waiting = PagedSequence(shop.pool, shop.owner("ann"), letters("aaaabbbb"), BLOCK)
    shop.pool.clear()
    waiting.open(8, live("ann"))
    waiting.complete(8)
    assert set(shop.pool.resident) == set(block_keys(root("ann"), letters("aaaabbbb"), BLOCK))
    waiting.close()
    shop.pool.check()
    assert not shop.pool.announced


def test_what_is_loaded_of_the_public_from_another_tier_is_the_operators() -> None:
    shop = Shop()
    shop.warm("aaaabbbb")
    shop.pool.on_evict = lambda block, rule: None  # the arena has it still
    shop.pool.clear()
    loading = PagedSequence(shop.pool, shop.owner("ann"), letters("aaaabbbbcccc"), BLOCK)
    loading.settle(elsewhere=2)
    loading.open(12, live("ann"))
    loading.loaded(1)
    assert shop.pool.charges() == {OPERATOR: {"used": 1}, "ann": {"in_flight": 2}}
    loading.complete(12)  # the second one came too late
    assert {name: kinds.total() for name, kinds in shop.pool.charges().items()} == {OPERATOR: 1, "ann": 2}
    loading.close()
    shop.pool.check()
    public = block_keys(PUBLIC, letters("aaaabbbb"), BLOCK)
    assert [key in shop.pool.resident for key in public] == [True, False]


def test_a_group_shares_what_was_asked_in_its_name_and_those_who_use_it_pay() -> None:
    shop = Shop()
    shop.serve(shop.owner("ann", team=True), "aaaabbbb")
    assert shop.serve(shop.owner("eve"), "aaaabbbb") == 0, "no member"
    assert shop.serve(shop.owner("bob"), "aaaabbbbcccc") == 8, "a member finds it without asking in its name"
    charged = {name: kinds.total() for name, kinds in shop.pool.charges().items()}
    assert charged == {"ann": 1.0, "bob": 2.0, "eve": 2.0}


def test_what_a_member_asks_for_itself_is_not_the_groups() -> None:
    shop = Shop()
    shop.serve(shop.owner("ann"), "aaaabbbb")
    assert shop.serve(shop.owner("bob"), "aaaabbbb") == 0
    assert shop.serve(shop.owner("bob", team=True), "aaaabbbb") == 0


def test_a_groups_blocks_behind_public_ones_are_found_too() -> None:
    shop = Shop()
    shop.warm("aaaa")
    shop.serve(shop.owner("ann", team=True), "aaaabbbb")
    assert shop.serve(shop.owner("bob"), "aaaabbbbcccc") == 8
    assert shop.serve(shop.owner("eve"), "aaaabbbbcccc") == 4


def test_where_nothing_is_shared_nothing_is_hashed_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    shop, hashed = Shop(), 0

    def count(key: BlockKey, data: bytes) -> BlockKey:
        nonlocal hashed
        hashed += 1
        return sha256(key + data).digest()

    monkeypatch.setattr(hashing, "next_key", count)
    monkeypatch.setattr("kvprefetch.cache.commons.next_key", count)
    PagedSequence(shop.pool, shop.owner("eve"), letters("aaaabbbbcccc"), BLOCK)
    assert hashed == 3
    shop.commons.fill(b"something else", is_group=False)
    PagedSequence(shop.pool, shop.owner("eve"), letters("aaaabbbbcccc"), BLOCK)
    assert hashed == 3 + 3 + 1, "one look at the first block"


def test_what_is_known_to_be_filled_is_bounded_and_the_oldest_goes() -> None:
    commons = Commons(most=2)
    for key in (b"a", b"b", b"a", b"c"):
        commons.fill(key, is_group=False)
    assert [key in commons for key in (b"a", b"b", b"c")] == [True, False, True]


@given(
    st.lists(st.tuples(st.sampled_from(["ann", "bob", "eve"]), st.text("ab", max_size=20), st.booleans()), max_size=12)
)
def test_whatever_is_asked_no_tenant_fills_another_namespace_and_borrows_only_what_it_may(
    asked: list[tuple[str, str, bool]],
) -> None:
    shop = Shop(pages=64)
    shop.warm("aaaa")
    filled = dict.fromkeys(shop.pool.resident, PUBLIC)
    for tenant, text, team in asked:
        owner = shop.owner(tenant, team=team and tenant != "eve")
        before = set(shop.pool.resident)
        readable = {PUBLIC, owner.root, *owner.shared}
        assert all(filled[key] in readable for key in borrow(owner, letters(text), BLOCK))
        sequence = shop.sequence(owner, text)
        assert all(filled[block.key] in readable for block in sequence.blocks[: sequence.shared])
        sequence.complete(len(text))
        sequence.close()
        mine = set(block_keys(owner.root, letters(text), BLOCK))
        assert set(shop.pool.resident) - before <= mine
        filled |= dict.fromkeys(set(shop.pool.resident) - before, owner.root)
        shop.pool.check()
