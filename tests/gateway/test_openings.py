"""Beginnings that sessions share."""

import hypothesis.strategies as st
from hypothesis import given

from kvprefetch.gateway.contract import Dialect, Draft
from kvprefetch.gateway.openings import Opening, Openings

KEYS = [b"key"]


def _began(openings: Openings, text: bytes = b"you are kind", tenant: str = "ann", who: str = "1") -> Opening:
    draft = Draft(Dialect.CHAT, {}, (text,), headers=(("x-user", who),), salt=who)
    return openings.began(tenant, draft, [who.encode()])


def test_the_third_session_makes_an_opening_shared() -> None:
    openings = Openings(8, 1000)
    assert [_began(openings).is_shared for _ in range(4)] == [False, False, True, True]


def test_an_opening_is_sent_as_its_latest_session_would() -> None:
    openings = Openings(8, 1000)
    first, second = _began(openings, who="1"), _began(openings, who="2")
    assert first is second
    assert first.draft.headers == (("x-user", "2"),)
    assert first.draft.salt == "2"
    assert first.keys == [b"2"]  # which a salt changes, too


def test_tenants_share_no_opening() -> None:
    openings = Openings(8, 1000)
    ann, bob = _began(openings, tenant="ann"), _began(openings, tenant="bob")
    assert ann is not bob
    assert ann.session != bob.session
    assert openings.of("bob", b"you are kind") is bob
    assert openings.of("eve", b"you are kind") is None


def test_openings_that_nobody_begins_with_are_forgotten() -> None:
    openings = Openings(2, 1000)
    first, _ = _began(openings, b"first"), _began(openings, b"second")
    _began(openings, b"first")
    _began(openings, b"third")
    assert openings.of("ann", b"first") is first
    assert openings.of("ann", b"second") is None


def test_an_opening_that_was_forgotten_is_counted_anew() -> None:
    openings = Openings(1, 1000)
    for text in (b"first", b"first", b"second", b"first"):
        last = _began(openings, text)
    assert last.sessions == 1


@given(st.lists(st.tuples(st.sampled_from(["ann", "bob"]), st.integers(0, 12)), max_size=40))
def test_openings_are_bounded_by_number_and_bytes(began: list[tuple[str, int]]) -> None:
    openings = Openings(3, 20)
    for tenant, size in began:
        last = _began(openings, b"x" * size, tenant)
        assert openings.of(tenant, b"x" * size) is last
        assert len(openings.known) <= 3
        assert sum(len(opening.draft.canonical[0]) for opening in openings.known.values()) <= 20
