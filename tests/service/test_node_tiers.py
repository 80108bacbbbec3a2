"""What lies behind the arena: written behind, brought back, left alone when it fails."""

import asyncio
import pickle
import struct
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from nodes import Worker, brought, eventually, forget_arena, node_settings, run, served, settled
from wire import BLOCK, chain, packed

from kvprefetch.errors import TierUnavailable
from kvprefetch.service import shelf
from kvprefetch.service.figures import figures
from kvprefetch.tiers.checksum import checksum
from kvprefetch.v1 import cache_pb2


def test_what_was_committed_comes_back_from_disk(tmp_path: Path) -> None:
    async def story() -> None:
        async with served(node_settings(tmp_path, disk_slots=32), tmp_path / "s") as stage:
            ann = await stage.worker()
            await ann.keep("abcdef")
            await settled(stage)
            forget_arena(stage)
            assert await brought(stage, ann, "abcdefxy") == "abcdef"
            stats = figures(stage.shelf)
            assert stats["promoted"]["disk"] == 6
            assert stats["tiers"]["disk"]["written"] == {"stored": 6, "refused": 0, "queued": 0}
            assert stats["tiers"]["disk"]["bytes_per_s"] > 0
            await settled(stage)

    run(story())


def test_a_look_up_that_does_not_wait_says_what_is_coming(tmp_path: Path) -> None:
    async def story() -> None:
        async with served(node_settings(tmp_path, disk_slots=32), tmp_path / "s") as stage:
            ann = await stage.worker()
            await ann.keep("abcdef")
            await settled(stage)
            forget_arena(stage)
            found = await ann.look_up("abcdef")
            assert (found.found, found.coming > 0, found.tier) == (0, True, "disk")
            await settled(stage)
            found = await ann.look_up("abcdef")
            assert (found.found, found.coming, found.tier) == (6, 0, "")

    run(story())


def test_what_is_nowhere_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf, "LONGEST_WAIT_S", 60.0)

    async def story() -> None:
        async with served(node_settings(tmp_path, disk_slots=32), tmp_path / "s") as stage:
            ann = await stage.worker()
            found = await asyncio.wait_for(ann.look_up("abc", wait_ms=60_000), 10)
            assert (found.found, found.coming) == (0, 0)
            asked = stage.shelf.promoter._nothing.copy()
            assert list(asked) == [chain("a")[0]]
            assert (await ann.look_up("abc")).coming == 0

    run(story())


def test_several_who_want_the_same_bring_it_once(tmp_path: Path) -> None:
    async def story() -> None:
        async with served(node_settings(tmp_path, disk_slots=32), tmp_path / "s") as stage:
            ann, bob = await stage.worker(), await stage.worker()
            await ann.keep("abcdef")
            await settled(stage)
            forget_arena(stage)
            got = await asyncio.gather(*(brought(stage, worker, "abcdef") for worker in (ann, bob, ann, bob)))
            assert got == ["abcdef"] * 4
            assert stage.shelf.promoter.counters["disk"] == 6

    run(story())


def test_the_disk_outlives_the_arena(tmp_path: Path) -> None:
    async def story() -> None:
        settings = node_settings(tmp_path, disk_slots=32)
        async with served(settings, tmp_path / "s") as stage:
            ann = await stage.worker()
            await ann.keep("abcdef")
            await settled(stage)
        next((tmp_path / "arenas").glob("*.arena")).unlink()
        async with served(settings, tmp_path / "s") as stage:
            ann = await stage.worker()
            assert await brought(stage, ann, "abcdef") == "abcdef"

    run(story())


def test_a_damaged_block_on_disk_ends_what_comes_and_is_computed_again(tmp_path: Path) -> None:
    async def story() -> None:
        async with served(node_settings(tmp_path, disk_slots=32), tmp_path / "s") as stage:
            ann = await stage.worker()
            await ann.keep("abcdef")
            await settled(stage)
            forget_arena(stage)
            (lane,) = stage.shelf.behind.lanes
            slot = lane.tier.pool.resident[chain("abc")[-1]].page
            with open(lane.tier.path, "r+b") as file:
                file.seek(lane.tier.layout.slot_at(slot) + 5)
                file.write(b"!")
            assert await brought(stage, ann, "abcdef") == "ab"
            assert lane.tier.counters["corrupt"] == 1
            assert await ann.keep("abc") == 1
            await settled(stage)
            stage.shelf.promoter._nothing.clear()
            assert await brought(stage, ann, "abcdef") == "abcdef"

    run(story())


def test_a_load_that_would_be_slower_than_computing_is_not_made_but_tried_now_and_then(tmp_path: Path) -> None:
    async def story() -> None:
        async with served(node_settings(tmp_path, disk_slots=32), tmp_path / "s") as stage:
            ann = await stage.worker()
            await ann.keep("abcdef")
            await settled(stage)
            (lane,) = stage.shelf.behind.lanes
            lane.pace.bytes_per_s = 1_000.0  # 4 s a block
            stage.shelf.tokens_per_s[ann.instance] = 16_000.0  # 1 ms a block
            made = 0
            for _ in range(40):
                forget_arena(stage)
                stage.shelf.promoter._nothing.clear()
                lane.pace.bytes_per_s = 1_000.0
                made += bool(await brought(stage, ann, "abcdef"))
            assert made == 1
            assert stage.shelf.promoter.counters["not_worth_disk"] == 6 * 39
            stage.shelf.tokens_per_s[ann.instance] = 1.0
            stage.shelf.promoter._nothing.clear()
            forget_arena(stage)
            assert await brought(stage, ann, "abcdef") == "abcdef"

    run(story())


class Broken:
    """A tier that is out of reach, or slow, as long as it is told to be."""

    def __init__(self, tier: Any) -> None:
        self.tier, self.fails, self.calls = tier, True, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tier, name)

    def _try(self) -> None:
        self.calls += 1
        if self.fails:
            raise TierUnavailable("pulled out")

    def find(self, keys: Any) -> int:
        self._try()
        return int(self.tier.find(keys))

    def load(self, keys: Any, into: Any) -> int:
        self._try()
        return int(self.tier.load(keys, into))

    def store(self, blocks: Any) -> int:
        self._try()
        return int(self.tier.store(blocks))


def test_a_tier_out_of_reach_costs_its_blocks_and_nothing_else(tmp_path: Path) -> None:
    async def story() -> None:
        async with served(node_settings(tmp_path, disk_slots=32), tmp_path / "s") as stage:
            ann = await stage.worker()
            (lane,) = stage.shelf.behind.lanes
            broken = lane.tier = Broken(lane.tier)
            for path in ("abc", "xyz", "123"):
                assert await ann.keep(path) == 3
                await settled(stage)
            assert broken.calls == 1  # then it was left alone
            written = figures(stage.shelf)["tiers"]["disk"]["written"]
            assert written == {"stored": 0, "refused": 3, "dropped_unavailable": 6, "queued": 0}
            assert (await ann.look_up("abcd", wait_ms=50)).coming == 0
            assert (await ann.look_up("abc", lease=False)).found == 3
            broken.fails = False
            lane.breaker.succeeded()
            await ann.keep("late")
            await settled(stage)
            forget_arena(stage)
            assert await brought(stage, ann, "late") == "late"

    run(story())


def test_of_what_waits_to_be_written_a_part_is_held_and_the_rest_may_go(tmp_path: Path) -> None:
    async def story() -> None:
        async with served(node_settings(tmp_path, slots=16, disk_slots=32), tmp_path / "s") as stage:
            ann = await stage.worker()
            (writer,) = stage.shelf.writers.values()
            gate = asyncio.Event()
            store = writer.lane.store

            async def slowly(blocks: Any) -> int:
                await gate.wait()
                return int(await store(blocks))

            writer.lane.store = slowly
            assert await ann.keep("abcdefgh") == 8
            await stage.node.check()
            assert len(writer) == 8
            forget_arena(stage)
            held = (await ann.look_up("abcdefgh", lease=False)).found
            assert held == writer.most_held < 8
            gate.set()
            await settled(stage)
            assert writer.counters == {"stored": held, "refused": 0, "dropped_evicted": 8 - held}
            forget_arena(stage)
            assert stage.shelf.host.pool.free_pages == stage.shelf.host.arena.slots

    run(story())


def test_what_waits_to_be_written_is_bounded(tmp_path: Path) -> None:
    async def story() -> None:
        async with served(node_settings(tmp_path, slots=16, disk_slots=32), tmp_path / "s") as stage:
            ann = await stage.worker()
            (writer,) = stage.shelf.writers.values()
            writer.most = 3
            await ann.keep("abcdefgh")
            await settled(stage)
            assert writer.counters["dropped_full"] >= 4
            assert writer.counters["stored"] + writer.counters["dropped_full"] == 8

    run(story())


def test_a_block_that_is_dropped_before_its_turn_is_not_written(tmp_path: Path) -> None:
    async def story() -> None:
        async with served(node_settings(tmp_path, disk_slots=32), tmp_path / "s") as stage:
            ann = await stage.worker()
            (writer,) = stage.shelf.writers.values()
            gate, store = asyncio.Event(), writer.lane.store

            async def slowly(blocks: Any) -> int:
                await gate.wait()
                return int(await store(blocks))

            writer.lane.store = slowly
            await ann.keep("abc")
            found = await ann.look_up("abc")
            await ann.release(leases=[found.lease], corrupt=found.slots[4:8])
            gate.set()
            await settled(stage)
            assert writer.counters["stored"] == 2
            assert writer.counters["dropped_damaged"] + writer.counters["dropped_evicted"] == 1
            (lane,) = stage.shelf.behind.lanes
            assert chain("ab")[1] not in lane.tier.pool.resident

    run(story())


def test_without_its_disk_a_node_serves_from_the_arena_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def story() -> None:
        (tmp_path / "disk").write_text("a file where a folder should be")
        async with served(node_settings(tmp_path, disk_slots=32), tmp_path / "s") as stage:
            ann = await stage.worker()
            await ann.keep("abc")
            assert (await ann.look_up("abc", lease=False)).found == 3
            assert len(stage.node.stats()["refused"]) == 1
            assert "does without a disk tier" in caplog.text

    run(story())


def test_an_arena_with_no_room_takes_nothing_and_says_so(tmp_path: Path) -> None:
    async def story() -> None:
        async with served(node_settings(tmp_path, slots=8, disk_slots=32), tmp_path / "s") as stage:
            ann = await stage.worker()
            await ann.keep("ab")
            await settled(stage)
            forget_arena(stage)
            slots = stage.shelf.host.arena.slots
            await ann.reserve("stuvwxyz"[:slots])
            assert await brought(stage, ann, "ab") == ""
            assert stage.shelf.promoter.counters["refused_full"] >= 1

    run(story())


def test_a_block_in_vllms_layout_and_under_its_key_comes_back_unchanged(tmp_path: Path) -> None:
    """Keys that we did not derive, bytes that we do not understand: of each layer K, then V, in bfloat16."""

    async def story() -> None:
        layers, tokens, heads, width = 2, 16, 2, 16
        pages = torch.randn(2, layers, 2, tokens, heads, width).to(torch.bfloat16)
        blocks = [page.contiguous().view(torch.uint8).numpy().tobytes() for page in pages]
        assert [len(block) for block in blocks] == [BLOCK, BLOCK]
        keys = [pickled(at) for at in range(2)]
        async with served(node_settings(tmp_path, disk_slots=32), tmp_path / "s") as stage:
            ann = await stage.worker()
            reserved = await ann.reserve("", keys=b"".join(keys))
            for slot, block in zip(struct.unpack("<2I", reserved.slots), blocks, strict=True):
                ann.arena.slot(slot)[:] = block
            sums = struct.pack("<2Q", *map(checksum, blocks))
            assert await ann.commit(reserved.reservation, sums) == 2
            await settled(stage)
            for _ in range(2):  # from the arena, then from disk
                found = await looked_up(ann, keys)
                got = [bytes(ann.arena.slot(slot)) for slot in struct.unpack("<2I", found.slots)]
                assert got == blocks
                await ann.release(leases=[found.lease])
                forget_arena(stage)

    run(story())


def pickled(at: int) -> bytes:
    """As vLLM's hashes are: SHA-256 of something of its own."""
    return sha256(pickle.dumps((None, (at, 1, 2), None))).digest()


async def looked_up(worker: Worker, keys: list[bytes]) -> Any:
    request = cache_pb2.LookupRequest(
        instance=worker.instance, tenant="ann", keys=b"".join(keys), lease=True, wait_ms=50
    )
    return await worker.cache.Lookup(request)


def test_a_promotion_that_is_under_way_when_the_service_ends_leaves_nothing_half_written(tmp_path: Path) -> None:
    async def story() -> None:
        settings = node_settings(tmp_path, disk_slots=32)
        async with served(settings, tmp_path / "s") as stage:
            ann = await stage.worker()
            await ann.keep("abcdef")
            await settled(stage)
            forget_arena(stage)
            assert (await ann.look_up("abcdef")).coming > 0
        async with served(settings, tmp_path / "s") as stage:
            await stage.worker()
            assert stage.held["quarantined_orphaned"] == 0
            assert not stage.shelf.host.pool.in_flight

    run(story())


def test_the_end_waits_for_what_is_being_written_into_the_arena(tmp_path: Path) -> None:
    async def story() -> None:
        async with served(node_settings(tmp_path, disk_slots=32), tmp_path / "s") as stage:
            ann = await stage.worker()
            await ann.keep("abc")
            await settled(stage)
            forget_arena(stage)
            (lane,) = stage.shelf.behind.lanes
            gate, load = asyncio.Event(), lane.load

            async def slowly(keys: Any, into: Any) -> list[int]:
                await gate.wait()
                return list(await load(keys, into))

            lane.load = slowly
            await ann.look_up("abc", wait_ms=10)
            ending = asyncio.create_task(stage.shelf.promoter.close())
            await asyncio.sleep(0.05)
            assert not ending.done()
            assert stage.shelf.host.pool.in_flight
            gate.set()
            await ending
            assert not stage.shelf.host.pool.in_flight
            assert (await ann.look_up("abc", wait_ms=10)).coming == 0  # nothing new begins

    run(story())


def test_waiting_ends_when_the_time_is_over(tmp_path: Path) -> None:
    async def story() -> None:
        async with served(node_settings(tmp_path, disk_slots=32), tmp_path / "s") as stage:
            ann = await stage.worker()
            await ann.keep("abc")
            await settled(stage)
            forget_arena(stage)
            (lane,) = stage.shelf.behind.lanes
            gate, find = asyncio.Event(), lane.find

            async def never(keys: Any) -> int:
                await gate.wait()
                return int(await find(keys))

            lane.find = never
            found = await asyncio.wait_for(ann.look_up("abc", wait_ms=60_000), 10)
            assert (found.found, found.coming, found.tier) == (0, 3, "disk")
            gate.set()
            await eventually(lambda: stage.shelf.host.longest(packed("abc")).count == 3)

    run(story())
