"""Workers that are killed, stopped and cut off, and a service that restarts: real processes and signals."""

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from nodes import Process, Served, eventually, node_settings, run, served
from wire import BLOCK, chain

from kvprefetch.service.watch import start_time
from kvprefetch.tiers.arena import ArenaFile
from kvprefetch.tiers.slots import SlotHeader, SlotState


@asynccontextmanager
async def processes(stage: Served, count: int) -> AsyncIterator[list[Process]]:
    """Workers in processes of their own, registered."""
    started = [Process(stage.address) for _ in range(count)]
    try:
        for process in started:
            assert await process.do("register") == stage.node.run
        yield started
    finally:
        for process in started:
            process.end()


def test_what_a_killed_worker_had_reserved_is_free_as_soon_as_its_death_is_proved(tmp_path: Path) -> None:
    async def story() -> None:
        async with served(node_settings(tmp_path), tmp_path / "s") as stage, processes(stage, 1) as (process,):
            await process.do("reserve", "abcd")
            await process.do("write")
            free = stage.shelf.host.pool.free_pages
            os.kill(process.pid, signal.SIGKILL)
            await eventually(lambda: stage.held["reservations"] == 0)
            assert stage.shelf.host.pool.free_pages == free + 4
            assert stage.registry.workers() == []
            assert len(stage.node._watch) == 0
            ann = await stage.worker()
            assert await ann.keep("abcd") == 4

    run(story())


def test_what_a_killed_worker_had_leased_is_free_and_stays(tmp_path: Path) -> None:
    async def story() -> None:
        async with served(node_settings(tmp_path), tmp_path / "s") as stage, processes(stage, 1) as (process,):
            ann = await stage.worker()
            await ann.keep("abcd")
            assert await process.do("lease", "abcd") == 4
            os.kill(process.pid, signal.SIGKILL)
            await eventually(lambda: stage.held["leases"] == 0)
            found = await ann.look_up("abcd")
            assert ann.reads("abcd", found.slots) == "abcd"

    run(story())


def test_a_look_up_that_nobody_waits_for_any_more_leases_nothing(tmp_path: Path) -> None:
    async def story() -> None:
        async with served(node_settings(tmp_path), tmp_path / "s") as stage, processes(stage, 1) as (process,):
            ann = await stage.worker()
            await ann.keep("abcd")
            asked = asyncio.create_task(process.do("hasty", "abcd"))
            await asyncio.sleep(0)
            time.sleep(0.6)  # the service is busy with something else
            assert await asked == "DEADLINE_EXCEEDED"
            assert await process.do("look", "abcd") == 4
            assert stage.held["leases"] == 0

    run(story())


def test_a_stopped_worker_keeps_what_it_has_and_goes_on(tmp_path: Path) -> None:
    """It is alive: it could write at any moment. Time frees nothing."""

    async def story() -> None:
        async with served(node_settings(tmp_path), tmp_path / "s") as stage, processes(stage, 1) as (process,):
            await process.do("reserve", "abcd")
            os.kill(process.pid, signal.SIGSTOP)
            await asyncio.sleep(1.5)
            assert stage.held["reservations"] == 1
            ann = await stage.worker()
            assert (await ann.reserve("abcd")).reservation == 0
            os.kill(process.pid, signal.SIGCONT)
            await process.do("write")
            assert await process.do("commit") == 4
            assert (await ann.look_up("abcd")).found == 4

    run(story())


def test_a_stopped_worker_whose_stream_broke_has_its_slots_in_quarantine_until_it_is_dead(tmp_path: Path) -> None:
    async def story() -> None:
        async with served(node_settings(tmp_path), tmp_path / "s") as stage, processes(stage, 1) as (process,):
            ann = await stage.worker()
            await ann.keep("xy")
            await process.do("lease", "xy")
            await process.do("reserve", "abcd")
            os.kill(process.pid, signal.SIGSTOP)
            (known,) = (worker for worker in stage.registry.workers() if worker.owner.pid == process.pid)
            known.task.cancel()  # as if the connection had timed out
            await eventually(lambda: stage.held["quarantined_vanished"] == 4)
            await stage.node.check()
            await asyncio.sleep(1.2)
            assert stage.held["leases_of_vanished"] == 1
            assert stage.held["quarantined_vanished"] == 4
            assert await ann.keep("abcd") == 4  # elsewhere
            os.kill(process.pid, signal.SIGKILL)
            await eventually(lambda: stage.held["quarantined_vanished"] == 0)
            assert stage.held["leases"] == 0
            assert stage.held["readmitted_died"] == 4

    run(story())


def test_a_worker_that_was_cut_off_returns_and_commits(tmp_path: Path) -> None:
    async def story() -> None:
        async with served(node_settings(tmp_path), tmp_path / "s") as stage, processes(stage, 1) as (process,):
            await process.do("reserve", "abcd")
            (known,) = stage.registry.workers()
            known.task.cancel()
            await eventually(lambda: stage.held["quarantined_vanished"] == 4)
            assert await process.do("commit") == "FAILED_PRECONDITION"
            assert await process.do("reserve", "abcd") == "FAILED_PRECONDITION"

    run(story())


def test_a_worker_that_returns_lists_what_it_still_writes_to(tmp_path: Path) -> None:
    async def story() -> None:
        async with served(node_settings(tmp_path), tmp_path / "s") as stage, processes(stage, 1) as (process,):
            await process.do("reserve", "abcd")
            (known,) = stage.registry.workers()
            known.task.cancel()
            await eventually(lambda: stage.held["quarantined_vanished"] == 4)
            await process.do("register")
            assert stage.held["quarantined_vanished"] == 0
            await process.do("write")
            assert await process.do("commit") == 4
            assert await process.do("look", "abcd") == 4

    run(story())


def test_a_restarted_service_finds_its_blocks_and_its_workers_go_on(tmp_path: Path) -> None:
    async def story() -> None:
        settings, socket = node_settings(tmp_path), tmp_path / "s"
        async with served(settings, socket) as stage:
            writer, reader = Process(stage.address), Process(stage.address)
            try:
                first = await writer.do("register")
                await reader.do("register")
                await writer.do("reserve", "abcd")
                await writer.do("write")
                assert await writer.do("commit") == 4
                assert await reader.do("lease", "abcd") == 4
                await writer.do("reserve", "abcdef")
            except BaseException:
                writer.end()
                reader.end()
                raise
        try:
            assert await reader.do("look", "abcd") == "UNAVAILABLE"
            async with served(settings, socket) as stage:
                assert await eventually_answers(reader, "look", "abcd") == "FAILED_PRECONDITION"
                assert await reader.do("register") == stage.node.run != first
                assert await reader.do("look", "abcd") == 4
                assert stage.held["quarantined_orphaned"] == 2  # the writer lives
                assert await writer.do("register") == stage.node.run
                assert stage.held["quarantined_orphaned"] == 2  # and lists them
                assert await writer.do("commit") == "NOT_FOUND"
                assert stage.held["quarantined_orphaned"] == 0
                await writer.do("reserve", "abcdef")
                await writer.do("write")
                assert await writer.do("commit") == 2
                assert await reader.do("look", "abcdef") == 6
        finally:
            writer.end()
            reader.end()

    run(story())


async def eventually_answers(process: Process, *words: str) -> object:
    """Once the channel is there again."""
    answer: object = "UNAVAILABLE"
    for _ in range(200):
        answer = await process.do(*words)
        if answer != "UNAVAILABLE":
            break
        await asyncio.sleep(0.05)
    return answer


def test_what_a_worker_had_reserved_is_free_when_it_died_while_the_service_was_away(tmp_path: Path) -> None:
    async def story() -> None:
        settings, socket = node_settings(tmp_path), tmp_path / "s"
        process: Process | None = None
        async with served(settings, socket) as stage:
            process = Process(stage.address)
            await process.do("register")
            await process.do("reserve", "abcd")
        process.end()
        async with served(settings, socket) as stage:
            await stage.worker()
            assert stage.held["quarantined_orphaned"] == 0
            assert stage.shelf.host.pool.free_pages == stage.shelf.host.arena.slots

    run(story())


def test_orphaned_slots_are_free_when_their_owner_dies_without_coming_back(tmp_path: Path) -> None:
    async def story() -> None:
        settings, socket = node_settings(tmp_path), tmp_path / "s"
        async with served(settings, socket) as stage:
            process = Process(stage.address)
            await process.do("register")
            await process.do("reserve", "abcd")
        try:
            os.kill(process.pid, signal.SIGSTOP)
            async with served(settings, socket) as stage:
                ann = await stage.worker()
                await asyncio.sleep(1.2)
                assert stage.held["quarantined_orphaned"] == 4
                assert await ann.keep("abcd") == 4
                os.kill(process.pid, signal.SIGKILL)
                await eventually(lambda: stage.held["quarantined_orphaned"] == 0)
        finally:
            process.end()

    run(story())


def test_slots_of_two_processes_that_seem_to_be_one_wait_each_for_its_own(tmp_path: Path) -> None:
    """A damaged header may name somebody else's instance."""

    async def story() -> None:
        settings = node_settings(tmp_path)
        async with served(settings, tmp_path / "s") as stage:
            told = (await stage.worker()).registered
            slots = stage.shelf.host.arena.slots
        sleepers = [subprocess.Popen(["sleep", "60"]) for _ in range(2)]
        try:
            arena = ArenaFile.create(told.arena, told.namespace, BLOCK, slots, prefault=False)
            for slot, each in enumerate(sleepers):
                reserved = SlotHeader(SlotState.RESERVED, chain("ab")[slot], sequence=9, length=BLOCK)
                owned = replace(reserved, instance=b"i" * 16, pid=each.pid, started=start_time(each.pid) or 0)
                arena.write_header(slot, owned)
            arena.close()
            async with served(settings, tmp_path / "s") as stage:
                await stage.worker()
                assert stage.held["quarantined_orphaned"] == 2
                for left in (1, 0):
                    sleepers[left].kill()
                    await eventually(lambda left=left: stage.held["quarantined_orphaned"] == left)
                assert stage.node._owners.keys() == {worker.instance for worker in stage.workers}
        finally:
            for each in sleepers:
                each.kill()
                each.wait()

    run(story())


def test_workers_that_come_and_are_killed_leave_nothing_behind(tmp_path: Path) -> None:
    async def story() -> None:
        async with served(node_settings(tmp_path), tmp_path / "s") as stage:
            for path in ("abc", "xyz"):
                async with processes(stage, 2) as (first, second):
                    await first.do("reserve", path)
                    await second.do("lease", path)
                    await first.do("write")
            await eventually(lambda: stage.held["reservations"] == 0 == stage.held["leases"])
            await eventually(lambda: len(stage.node._watch) == 0)
            assert stage.node._owners == {}
            assert stage.shelf.leases.by_instance == {}
            assert stage.registry.workers() == []

    run(story())
