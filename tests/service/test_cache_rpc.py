"""The Cache service over a real socket: what it answers, and what it refuses with which words."""

from pathlib import Path
from struct import pack, unpack
from typing import Any

import grpc
import grpc.aio
import pytest
from nodes import node_settings, run, served
from wire import BLOCK, TAKEN, chain, content, packed

from kvprefetch.service.figures import figures
from kvprefetch.service.frames import unpack as unpack_frame
from kvprefetch.v1 import cache_pb2 as pb

Code = grpc.StatusCode


def test_what_one_worker_wrote_another_reads(tmp_path: Path) -> None:
    async def story() -> None:
        async with served(node_settings(tmp_path), tmp_path / "s") as stage:
            ann, bob = await stage.worker(), await stage.worker()
            assert await ann.keep("abcde") == 5
            found = await bob.look_up("abcdexy")
            assert (found.found, found.coming, found.tier) == (5, 0, "")
            assert bob.reads("abcdexy", found.slots) == "abcde"
            assert stage.held["leases"] == 1
            await bob.release(leases=[found.lease])
            assert stage.held["leases"] == 0

    run(story())


def test_without_a_lease_it_only_counts(tmp_path: Path) -> None:
    async def story() -> None:
        async with served(node_settings(tmp_path), tmp_path / "s") as stage:
            ann = await stage.worker()
            await ann.keep("abc")
            found = await ann.look_up("abc", lease=False)
            assert (found.lease, found.slots, found.found) == (0, b"", 3)
            assert (await ann.look_up("xyz")).lease == 0
            assert stage.held["leases"] == 0

    run(story())


def test_a_block_is_written_by_one_worker_at_a_time(tmp_path: Path) -> None:
    async def story() -> None:
        async with served(node_settings(tmp_path), tmp_path / "s") as stage:
            ann, bob = await stage.worker(), await stage.worker()
            mine = await ann.reserve("abc")
            theirs = await bob.reserve("abcd")
            assert unpack("<4I", theirs.slots)[:3] == (TAKEN,) * 3
            assert (await bob.reserve("abc")).reservation == 0
            assert (await bob.look_up("abc")).found == 0
            assert await ann.commit(mine.reservation, ann.write("abc", mine.slots)) == 3
            assert await bob.commit(theirs.reservation, bob.write("abcd", theirs.slots)) == 1
            assert (await bob.look_up("abcd")).found == 4

    run(story())


def test_a_full_arena_gives_fewer_slots(tmp_path: Path) -> None:
    async def story() -> None:
        async with served(node_settings(tmp_path, slots=4), tmp_path / "s") as stage:
            ann = await stage.worker()
            reserved = await ann.reserve("abcdef")
            assert len(reserved.slots) // 4 == stage.shelf.host.arena.slots
            assert figures(stage.shelf)["reserved"]["full"] == 6 - stage.shelf.host.arena.slots

    run(story())


def test_a_damaged_block_is_reported_and_found_no_more(tmp_path: Path) -> None:
    async def story() -> None:
        async with served(node_settings(tmp_path), tmp_path / "s") as stage:
            ann = await stage.worker()
            await ann.keep("abc")
            found = await ann.look_up("abc")
            slot = unpack("<3I", found.slots)[1]
            ann.arena.slot(slot)[7] ^= 1
            assert ann.reads("abc", found.slots) == "a"
            await ann.release(leases=[found.lease], corrupt=pack("<I", slot))
            assert (await ann.look_up("abc", lease=False)).found == 1
            stats = figures(stage.shelf)
            assert stats["host"]["corrupt"] == 1
            assert stats["lookups"]["misses"] == {"corrupt": 2}
            assert await ann.keep("abc") == 1
            assert (await ann.look_up("abc", lease=False)).found == 3

    run(story())


def test_a_miss_has_a_reason(tmp_path: Path) -> None:
    async def story() -> None:
        async with served(node_settings(tmp_path, slots=4), tmp_path / "s") as stage:
            ann, bob = await stage.worker(), await stage.worker()
            await ann.look_up("abcd")
            await ann.reserve("ab")
            await bob.look_up("ab")
            await ann.keep("cd")
            await ann.keep("ef")
            await ann.look_up("c")
            misses = figures(stage.shelf)["lookups"]["misses"]
            assert misses == {"never_seen": 4, "in_flight": 2, "evicted": 1}

    run(story())


def test_what_was_looked_up_last_stays_longest_unless_nobody_has_asked_for_it(tmp_path: Path) -> None:
    async def story() -> None:
        async with served(node_settings(tmp_path, slots=8), tmp_path / "s") as stage:
            ann = await stage.worker()
            for path in ("a", "b", "c"):
                await ann.keep(path)
            await ann.look_up("a", lease=True)
            await ann.cache.Lookup(
                pb.LookupRequest(
                    instance=ann.instance, tenant="ann", keys=packed("b"), lease=True, speculative=True, hold_s=9
                )
            )
            for found in stage.shelf.leases.by_instance[ann.instance].leases.copy():
                await ann.release(leases=[found])
            slots = stage.shelf.host.arena.slots
            for at in range(slots - 1):
                await ann.keep(str(at))
            assert [path for path in "abc" if (await ann.look_up(path, lease=False)).found] == ["a"]

    run(story())


def test_blocks_are_read_in_raw_frames(tmp_path: Path) -> None:
    async def story() -> None:
        async with served(node_settings(tmp_path), tmp_path / "s") as stage:
            ann = await stage.worker()
            await ann.keep("abcdefg")
            got = await read(stage.channel, ann.registered.namespace, packed("abcdefgh"))
            assert got == [content(key) for key in chain("abcdefg")]
            assert await read(stage.channel, ann.registered.namespace, packed("x")) == []
            assert figures(stage.shelf)["read_by_nodes"] == 7

    run(story())


async def read(channel: grpc.aio.Channel, namespace: str, keys: bytes) -> list[bytes]:
    method: Any = channel.unary_stream("/kvprefetch.v1.Cache/Read", request_serializer=pb.ReadRequest.SerializeToString)
    blocks = []
    async for frame in method(pb.ReadRequest(namespace=namespace, keys=keys)):
        blocks += [bytes(block.data) for block in unpack_frame(frame, BLOCK)]
    return blocks


def test_pinned_blocks_stay_until_their_time_is_over(tmp_path: Path) -> None:
    async def story() -> None:
        async with served(node_settings(tmp_path, slots=8), tmp_path / "s") as stage:
            ann = await stage.worker()
            await ann.keep("ab")
            pin = {"namespace": ann.registered.namespace, "tenant": "ann", "keys": packed("abc")}
            assert (await ann.cache.Pin(pb.PinRequest(**pin, hold_s=60))).pinned == 2
            await ann.keep("stuvwxyz")
            assert (await ann.look_up("ab", lease=False)).found == 2
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await ann.cache.Pin(pb.PinRequest(**{**pin, "keys": packed("s")}, hold_s=60))
            assert refused.value.code() is Code.RESOURCE_EXHAUSTED
            stage.shelf.pins.expire(stage.node.clock() + 61)
            await ann.keep("12345678")
            assert (await ann.look_up("ab", lease=False)).found == 0

    run(story())


def test_a_pin_ends_when_it_is_taken_back(tmp_path: Path) -> None:
    async def story() -> None:
        async with served(node_settings(tmp_path, slots=8), tmp_path / "s") as stage:
            ann = await stage.worker()
            await ann.keep("ab")
            pin = {"namespace": ann.registered.namespace, "tenant": "ann", "keys": packed("ab")}
            await ann.cache.Pin(pb.PinRequest(**pin, hold_s=60))
            assert len(stage.shelf.pins) == 1
            assert (await ann.cache.Pin(pb.PinRequest(**pin, hold_s=0))).pinned == 0
            assert len(stage.shelf.pins) == 0

    run(story())


LOOKUP = {"tenant": "ann", "keys": packed("ab"), "lease": True}
RESERVE = {"tenant": "ann", "keys": packed("ab")}
NOBODY = b"?" * 16
REFUSED: list[tuple[str, str, dict[str, Any], Code, str]] = [
    ("a part of a key", "Lookup", {**LOOKUP, "keys": b"1" * 33}, Code.INVALID_ARGUMENT, "whole keys of 32 bytes"),
    ("too many keys", "Lookup", {**LOOKUP, "keys": bytes(32 * 17_000)}, Code.INVALID_ARGUMENT, "service.max_blocks"),
    ("nobody looks up", "Lookup", {**LOOKUP, "instance": NOBODY}, Code.FAILED_PRECONDITION, "Workers.Work"),
    ("no instance", "Lookup", {**LOOKUP, "instance": b""}, Code.FAILED_PRECONDITION, "Workers.Work"),
    ("a long tenant", "Lookup", {**LOOKUP, "tenant": "a" * 64}, Code.INVALID_ARGUMENT, "at most 63 bytes"),
    ("a long session", "Lookup", {**LOOKUP, "session": "a" * 257}, Code.INVALID_ARGUMENT, "at most 256 bytes"),
    ("a part of a parent", "Reserve", {**RESERVE, "parent": b"1" * 31}, Code.INVALID_ARGUMENT, "parent: 31 bytes"),
    ("nobody reserves", "Reserve", {**RESERVE, "instance": NOBODY}, Code.FAILED_PRECONDITION, "Workers.Work"),
    (
        "an odd hold",
        "Reserve",
        {**RESERVE, "speculative": True, "hold_s": float("nan")},
        Code.INVALID_ARGUMENT,
        "hold_s: nan",
    ),
    ("nobody commits", "Commit", {"instance": NOBODY, "reservation": 1}, Code.FAILED_PRECONDITION, "Workers.Work"),
    ("an unknown reservation", "Commit", {"reservation": 1}, Code.NOT_FOUND, "do not write to its slots again"),
    ("a part of a checksum", "Commit", {"checksums": b"1" * 7}, Code.INVALID_ARGUMENT, "whole numbers of 8 bytes"),
    ("nobody releases", "Release", {"instance": NOBODY, "leases": [1]}, Code.FAILED_PRECONDITION, "Workers.Work"),
    ("a part of a slot", "Release", {"corrupt": b"1"}, Code.INVALID_ARGUMENT, "whole numbers of 4 bytes"),
    ("an unknown namespace", "Pin", {"namespace": "x", "tenant": "ann"}, Code.NOT_FOUND, "that namespace"),
]


@pytest.mark.parametrize(("name", "method", "fields", "code", "says"), REFUSED, ids=[row[0] for row in REFUSED])
def test_bad_input_is_refused_and_changes_nothing(
    tmp_path: Path, name: str, method: str, fields: dict[str, Any], code: Code, says: str
) -> None:
    async def story() -> None:
        async with served(node_settings(tmp_path), tmp_path / "s") as stage:
            ann = await stage.worker()
            await ann.keep("a")
            before = stage.held, stage.shelf.host.pool.free_pages
            request = getattr(pb, f"{method}Request")
            known = {"instance": ann.instance} if "instance" in request.DESCRIPTOR.fields_by_name else {}
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await getattr(ann.cache, method)(request(**{**known, **fields}))
            assert refused.value.code() is code
            assert says in refused.value.details()
            assert (stage.held, stage.shelf.host.pool.free_pages) == before
            assert (await ann.look_up("a", lease=False)).found == 1

    run(story())


def test_a_commit_of_too_many_checksums_is_refused_and_can_be_mended(tmp_path: Path) -> None:
    async def story() -> None:
        async with served(node_settings(tmp_path), tmp_path / "s") as stage:
            ann = await stage.worker()
            reserved = await ann.reserve("ab")
            sums = ann.write("ab", reserved.slots)
            with pytest.raises(grpc.aio.AioRpcError, match="3 checksums for 2"):
                await ann.commit(reserved.reservation, sums + bytes(8))
            assert await ann.commit(reserved.reservation, sums) == 2

    run(story())


def test_reading_from_an_unknown_namespace_says_so(tmp_path: Path) -> None:
    async def story() -> None:
        async with served(node_settings(tmp_path), tmp_path / "s") as stage:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await read(stage.channel, "0" * 16, packed("a"))
            assert refused.value.code() is Code.NOT_FOUND

    run(story())
