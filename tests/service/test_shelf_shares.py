"""A tenant that floods a tiny arena beside one with a guarantee: what its workers hold takes nothing of the other's."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from itertools import count
from pathlib import Path

import pytest
from arenas import ANN, BOB, CID, NAMESPACE, chain, content, open_host, packed

from kvprefetch.cache.shares import Share, Shares
from kvprefetch.errors import LimitExceeded
from kvprefetch.service.shelf import Behind, Shelf
from kvprefetch.tiers.checksum import checksum

Slots = tuple[int, list[int | None]]
HALF = Shares({"ann": Share(guarantee=0.5), "bob": Share(weight=2.0)})


class Flooded:
    """Two workers at an arena of eight slots: ANN asks for the tenant ann, BOB for bob."""

    def __init__(self, folder: Path) -> None:
        self.now = 0.0
        self.shelf = Shelf(NAMESPACE, open_host(folder), Behind(), CID, count(1), lambda: self.now, 32)
        self.shelf.rule(HALF)
        for owner in (ANN, BOB):
            self.shelf.leases.returned(owner.instance, (), ())

    def reserve(self, tenant: str, path: str, hold_s: float | None = None) -> Slots:
        """A while later; the reservation's number, and slots for a leading part."""
        self.now += 1.0
        return self.shelf.reserve(ANN if tenant == "ann" else BOB, b"", chain(path), tenant, hold_s)

    def commit(self, tenant: str, path: str, reserved: Slots) -> int:
        """What was reserved is written; how many blocks."""
        number, slots = reserved
        keys = [key for key, slot in zip(chain(path), slots, strict=False) if slot is not None]
        for key, slot in zip(chain(path), slots, strict=False):
            if slot is not None:
                self.shelf.host.arena.slot(slot)[:] = content(key)
        sums = [checksum(content(key)) for key in keys]
        return self.shelf.commit((ANN if tenant == "ann" else BOB).instance, number, sums) if number else 0

    def keep(self, tenant: str, path: str, hold_s: float | None = None) -> int:
        """Reserve and commit."""
        return self.commit(tenant, path, self.reserve(tenant, path, hold_s))

    async def lease(self, tenant: str, path: str) -> int:
        """The lease on a leading part of `path`."""
        owner = ANN if tenant == "ann" else BOB
        return (await self.shelf.look_up(packed(path), tenant, "", lease_for=owner.instance)).lease

    def release(self, tenant: str, leases: Sequence[int] = (), reservations: Sequence[int] = ()) -> None:
        self.shelf.release((ANN if tenant == "ann" else BOB).instance, leases, reservations, set())

    def found(self, path: str) -> str:
        return path[: self.shelf.host.longest(packed(path)).count]

    @property
    def blocks(self) -> dict[str, int]:
        """Charged to each tenant."""
        return {tenant: size // 64 for tenant, size in sorted(self.shelf.host.usage().by_tenant.items())}


def told(folder: Path, story: Callable[[Flooded], Coroutine[None, None, None]]) -> None:
    async def tell() -> None:
        arena = Flooded(folder)
        await story(arena)
        arena.shelf.check()
        await arena.shelf.close()

    asyncio.run(tell())


def test_reservations_of_a_flood_end_at_what_another_is_guaranteed(tmp_path: Path) -> None:
    async def story(at: Flooded) -> None:
        assert at.keep("ann", "abcd") == 4
        number, slots = at.reserve("bob", "klmnopqr")
        assert len(slots) == 4
        for path in ("s", "tu"):
            assert at.reserve("bob", path) == (0, []), "all that is lent is being written by it"
        assert at.found("abcd") == "abcd"
        assert at.blocks == {"ann": 4, "bob": 4}
        assert at.commit("bob", "klmnopqr", (number, slots)) == 4
        for letter in "stuvwxyz":
            assert at.keep("bob", 3 * letter) == 3
            assert at.found("abcd") == "abcd"
        assert at.shelf.counts.not_reserved["full"] == 4 + 1 + 2

    told(tmp_path, story)


def test_slots_that_a_vanished_worker_may_still_write_to_are_its_tenants(tmp_path: Path) -> None:
    async def story(at: Flooded) -> None:
        at.keep("ann", "abcd")
        at.reserve("bob", "kl")
        at.shelf.leases.vanish(BOB.instance)
        at.shelf.check()
        at.shelf.leases.returned(BOB.instance, (), (1, 2))
        assert at.keep("bob", "wxyz") == 2
        assert at.found("abcd") == "abcd"
        assert at.blocks == {"ann": 4, "bob": 4}
        at.shelf.leases.died(BOB.instance)

    told(tmp_path, story)


def test_leases_of_a_flood_hold_what_was_lent_no_longer_than_its_copies_take(tmp_path: Path) -> None:
    async def story(at: Flooded) -> None:
        assert at.keep("bob", "klmnopqr") == 8
        lease = await at.lease("bob", "klmnopqr")
        assert at.reserve("ann", "abcd") == (0, []), "its worker is reading all of them"
        at.release("bob", [lease])
        lease = await at.lease("bob", "klmn")
        assert at.keep("ann", "abcd") == 4
        mine = await at.lease("ann", "ab")
        assert at.keep("bob", "wxyz") == 0, "all of its own are held"
        at.release("bob", [lease])
        assert at.keep("bob", "wxyz") == 4
        assert (at.found("abcd"), at.found("wxyz")) == ("abcd", "wxyz")
        at.release("ann", [mine])

    told(tmp_path, story)


def test_pins_of_a_flood_leave_everybody_its_guarantee(tmp_path: Path) -> None:
    async def story(at: Flooded) -> None:
        assert at.keep("bob", "klmn") == 4
        assert at.keep("bob", "wxyz") == 4
        assert at.shelf.pin("bob", packed("kl"), 1e9) == 2
        for path in ("wx", "klmn"):
            with pytest.raises(LimitExceeded):
                at.shelf.pin("bob", packed(path), 1e9)
        at.shelf.rule(Shares({"ann": Share(guarantee=0.75), "bob": Share()}))
        with pytest.raises(LimitExceeded, match="of 1"):
            at.shelf.pin("bob", packed("kl"), 2e9)
        assert at.keep("ann", "abcdef") == 6
        assert at.found("klmn") == "kl"
        assert at.shelf.pin("ann", packed("ab"), 60.0) == 2
        assert at.keep("bob", "op") == 0, "what it may have, it has pinned"
        assert at.blocks == {"ann": 6, "bob": 2}

    told(tmp_path, story)


def test_pins_of_the_flood_protect_nothing_of_its_own_from_its_next_need(tmp_path: Path) -> None:
    async def story(at: Flooded) -> None:
        at.keep("ann", "abcd")
        at.keep("bob", "kl")
        at.shelf.pin("bob", packed("kl"), 60.0)
        for path in ("uv", "wx", "yz"):
            assert at.keep("bob", path) == 2
            assert (at.found("abcd"), at.found("kl")) == ("abcd", "kl")

    told(tmp_path, story)


def test_a_preload_through_the_arena_takes_of_its_own_tenant_alone(tmp_path: Path) -> None:
    async def story(at: Flooded) -> None:
        assert at.keep("bob", "klmnopqr") == 8
        assert at.reserve("ann", "abcd", hold_s=60.0) == (0, []), "nobody has asked for it yet"
        assert at.keep("ann", "ab") == 2
        assert at.keep("bob", "wxyz", hold_s=60.0) == 4
        assert at.found("ab") == "ab"
        assert at.keep("ann", "cdef") == 4
        assert at.blocks == {"ann": 6, "bob": 2}, "before what was used another's unused speculation goes"

    told(tmp_path, story)


def test_who_is_writing_has_what_it_is_writing(tmp_path: Path) -> None:
    async def story(at: Flooded) -> None:
        at.keep("bob", "k")
        at.keep("cid", "cd")
        reserved = at.reserve("bob", "vwxyz")
        assert at.keep("ann", "a") == 1
        assert (at.found("k"), at.found("cd")) == ("", "cd")
        at.release("bob", reservations=[reserved[0]])
        assert at.blocks == {"ann": 1, "cid": 2}

    told(tmp_path, story)


def test_shares_change_while_slots_are_reserved_leased_and_pinned(tmp_path: Path) -> None:
    async def story(at: Flooded) -> None:
        at.keep("ann", "abcd")
        lease = await at.lease("ann", "abc")
        reserved = at.reserve("bob", "klmn")
        at.shelf.rule(Shares({"bob": Share(guarantee=0.75)}))
        assert at.blocks == {"ann": 4, "bob": 4}
        assert at.keep("bob", "yz") == 1, "the other three are being read"
        assert at.found("abcd") == "abc"
        at.release("ann", [lease])
        assert at.keep("bob", "yz") == 1
        assert at.commit("bob", "klmn", reserved) == 4
        assert at.found("abcd") == "ab"
        for path in ("w", "x", "v"):  # of what nobody is guaranteed each has one, and no more
            assert at.keep("bob", path) == 1
            assert (at.found("abcd"), at.blocks) == ("a", {"ann": 1, "bob": 7})

    told(tmp_path, story)
