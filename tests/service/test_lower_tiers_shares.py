"""Shares in the tiers behind the arena, through a shelf: who writes much costs those who write little nothing."""

import asyncio
from collections.abc import Callable, Coroutine
from itertools import count
from pathlib import Path

from arenas import ANN, BLOCK, CID, NAMESPACE, chain, checksum, content, open_host

from kvprefetch.cache.shares import Share, Shares
from kvprefetch.service.lane import Lane
from kvprefetch.service.shelf import Behind, Shelf
from kvprefetch.tiers.disk import DiskTier


class Stage:
    """A roomy arena before a disk file of eight slots."""

    def __init__(self, folder: Path) -> None:
        self.now = 0.0
        (folder / "disk").mkdir(mode=0o700)
        self.disk = DiskTier(folder / "disk" / "a.blocks", NAMESPACE, BLOCK, 8, lambda: self.now)
        lane = Lane(self.disk, lambda: self.now)
        self.shelf = Shelf(NAMESPACE, open_host(folder, slots=128), Behind([lane]), CID, count(1), lambda: self.now, 32)
        self.shelf.leases.returned(ANN.instance, (), ())

    def keep(self, tenant: str, path: str, hold_s: float | None = None) -> None:
        """A while later its worker commits a sequence, which waits to be written behind."""
        self.now += 1.0
        number, slots = self.shelf.reserve(ANN, b"", chain(path), tenant, hold_s)
        sums = []
        for key, slot in zip(chain(path), slots, strict=False):
            assert slot is not None
            self.shelf.host.arena.slot(slot)[:] = content(key)
            sums.append(checksum(content(key)))
        self.shelf.commit(ANN.instance, number, sums)

    def on_disk(self, path: str) -> str:
        return path[: self.disk.find(chain(path))]

    @property
    def blocks(self) -> dict[str, int]:
        """On disk, charged to each tenant."""
        return {tenant: size // BLOCK for tenant, size in sorted(self.disk.usage().by_tenant.items())}


def told(folder: Path, story: Callable[[Stage], Coroutine[None, None, None]]) -> None:
    async def tell() -> None:
        stage = Stage(folder)
        await story(stage)
        stage.shelf.check()
        await stage.shelf.check_tiers()
        await stage.shelf.close()

    asyncio.run(tell())


def test_what_is_guaranteed_on_disk_stays_whatever_others_write(tmp_path: Path) -> None:
    async def story(at: Stage) -> None:
        at.shelf.rule(Shares({"ann": Share(guarantee=0.5)}))
        at.keep("ann", "abcd")
        for letter in "klmnopqr":
            at.keep("bob", 3 * letter)
        await at.shelf.drain()
        assert at.on_disk("abcd") == "abcd"
        assert at.blocks == {"ann": 4, "bob": 4}
        at.shelf.rule(Shares({"bob": Share(guarantee=0.75)}))
        assert at.blocks == {"ann": 4, "bob": 4}
        at.keep("bob", "uvwxyz")
        await at.shelf.drain()
        assert (at.on_disk("uvwxyz"), at.blocks) == ("uvwxyz", {"ann": 1, "bob": 7}), "of the rest each has one"

    told(tmp_path, story)


def test_whom_a_tier_refuses_a_preload_costs_nobody_else_a_block(tmp_path: Path) -> None:
    async def story(at: Stage) -> None:
        at.keep("bob", "klmnopqr")
        await at.shelf.drain()
        at.keep("ann", "ab", hold_s=60.0)  # the two and the next wait together
        at.keep("bob", "xy")
        at.keep("cid", "fg")
        await at.shelf.drain()
        assert at.shelf.writers["disk"].counters["refused"] == 2
        assert (at.on_disk("ab"), at.on_disk("xy"), at.on_disk("fg")) == ("", "xy", "fg")
        at.keep("cid", "hi", hold_s=60.0)
        await at.shelf.drain()
        assert at.blocks["cid"] == 2, "at most in place of its own"

    told(tmp_path, story)


def test_a_change_of_shares_does_not_wait_for_a_store_that_is_under_way(tmp_path: Path) -> None:
    async def story(at: Stage) -> None:
        with at.disk._lock:  # the disk takes its time
            at.keep("ann", "abcd")
            await asyncio.sleep(0.01)
            at.shelf.rule(Shares({"ann": Share(guarantee=0.5)}))
            assert at.shelf.host.pool.shares.of("ann").guarantee == 0.5
        await at.shelf.drain()
        assert await at.shelf.behind.lanes[0].run(lambda: at.disk.pool.shares.of("ann").guarantee) == 0.5

    told(tmp_path, story)
