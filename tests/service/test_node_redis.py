"""Nodes that share a real Redis: blocks through it, and from one node's arena to another's."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from nodes import Served, brought, eventually, forget_arena, node_settings, run, served, settled
from redis_servers import PATIENT_S, RedisServer, free_port
from wire import chain

from kvprefetch.settings import RedisSettings


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@asynccontextmanager
async def two_nodes(folder: Path, server: RedisServer, **redis: Any) -> AsyncIterator[tuple[Served, Served]]:
    """Two nodes of one secret; `redis`: settings of both."""
    server.client().flushall()
    options = {"timeout_s": PATIENT_S, **redis}

    def settings(name: str) -> Any:
        shared = RedisSettings(url=server.url, advertise=f"127.0.0.1:{free_port()}", **options)
        (folder / name).mkdir()
        return node_settings(folder / name, disk_slots=32, redis=shared)

    async with (
        served(settings("one"), folder / "s", tcp=True) as one,
        served(settings("two"), folder / "t", tcp=True) as two,
    ):
        yield one, two


def test_what_one_node_computed_another_has_from_redis(tmp_path: Path, redis_server: RedisServer) -> None:
    async def story() -> None:
        async with two_nodes(tmp_path, redis_server) as (one, two):
            ann, bob = await one.worker(), await two.worker()
            assert ann.registered.secret == bob.registered.secret
            await ann.keep("abcdef")
            await settled(one)
            assert await brought(two, bob, "abcdefxy") == "abcdef"
            assert two.shelf.promoter.counters["redis"] == 6
            await settled(two)
            assert two.shelf.writers["disk"].counters["stored"] == 6  # nearer than where it came from
            assert two.shelf.writers["redis"].counters["stored"] == 0
            charges = await two.node.bytes_by_tenant()
            assert charges["ann"]["host"] == charges["ann"]["disk"] == charges["ann"]["redis"] == 6 * 4096

    run(story())


def test_what_lies_on_disk_and_what_lies_in_redis_make_one_run(tmp_path: Path, redis_server: RedisServer) -> None:
    async def story() -> None:
        async with two_nodes(tmp_path, redis_server) as (one, two):
            ann, bob = await one.worker(), await two.worker()
            await ann.keep("abc")
            await settled(one)
            assert await brought(two, bob, "abc") == "abc"
            await settled(two)
            forget_arena(two)
            await ann.keep("abcdef")
            await settled(one)
            two.shelf.promoter._nothing.clear()
            assert await brought(two, bob, "abcdef") == "abcdef"
            assert two.shelf.promoter.counters == {"redis": 6, "disk": 3}

    run(story())


def test_without_blocks_in_redis_they_come_from_the_node_that_has_them(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    async def story() -> None:
        async with two_nodes(tmp_path, redis_server, store_blocks=False) as (one, two):
            ann, bob = await one.worker(), await two.worker()
            await ann.keep("abcdef")
            await one.shelf.behind.announcer.drain()
            assert await brought(two, bob, "abcdefxy") == "abcdef"
            assert two.shelf.promoter.counters["node"] == 6
            assert one.shelf.counts.read == 6
            await settled(two)

    run(story())


def test_what_a_node_evicted_is_not_looked_for_there(tmp_path: Path, redis_server: RedisServer) -> None:
    async def story() -> None:
        async with two_nodes(tmp_path, redis_server, store_blocks=False) as (one, two):
            ann, bob = await one.worker(), await two.worker()
            await ann.keep("abcdef")
            await settled(one)  # nothing waits for the disk any more, and holds it
            await one.shelf.behind.announcer.drain()
            one.shelf.host.pool.evict(one.shelf.host.pool.resident[chain("abcdef")[-1]], "test")
            await one.shelf.behind.announcer.drain()
            assert await two.shelf.behind.nodes.find(chain("abcdef")) == 5
            assert await brought(two, bob, "abcdef") == "abcde"

    run(story())


def test_a_node_that_took_over_its_arena_says_what_is_in_it(tmp_path: Path, redis_server: RedisServer) -> None:
    async def story() -> None:
        redis_server.client().flushall()
        shared = RedisSettings(
            url=redis_server.url, advertise=f"127.0.0.1:{free_port()}", store_blocks=False, timeout_s=PATIENT_S
        )
        settings = node_settings(tmp_path, redis=shared)
        async with served(settings, tmp_path / "s", tcp=True) as stage:
            await (await stage.worker()).keep("abc")
        redis_server.client().flushall()
        async with served(settings, tmp_path / "s", tcp=True) as stage:
            await stage.worker()
            directory = stage.shelf.behind.nodes.directory
            await stage.shelf.behind.announcer.drain()
            found = await asyncio.to_thread(directory.who_has, chain("abc"))
            assert found == [[shared.advertise]] * 3
            assert await stage.shelf.behind.nodes.find(chain("abc")) == 0  # it does not ask itself

    run(story())


def test_a_node_that_is_gone_costs_a_moment_and_is_left_alone(tmp_path: Path, redis_server: RedisServer) -> None:
    async def story() -> None:
        async with two_nodes(tmp_path, redis_server, store_blocks=False) as (one, two):
            ann, bob = await one.worker(), await two.worker()
            await ann.keep("abcdef")
            await one.shelf.behind.announcer.drain()
            await one.server.stop(0)
            assert await brought(two, bob, "abcdef") == ""
            nodes = two.shelf.behind.nodes
            assert nodes.counters["loaded"] == 0
            assert nodes.counters["unavailable"] + nodes.counters["timed_out"] == 1
            two.shelf.promoter._nothing.clear()
            assert await brought(two, bob, "abcdef") == ""
            assert nodes.counters["skipped"] >= 1

    run(story())


def test_a_block_that_is_damaged_in_the_other_node_is_not_taken(tmp_path: Path, redis_server: RedisServer) -> None:
    async def story() -> None:
        async with two_nodes(tmp_path, redis_server, store_blocks=False) as (one, two):
            ann, bob = await one.worker(), await two.worker()
            await ann.keep("abcdef")
            await one.shelf.behind.announcer.drain()
            slot = one.shelf.host.pool.resident[chain("abc")[-1]].page
            ann.arena.slot(slot)[3] ^= 1
            assert await brought(two, bob, "abcdef") == "ab"
            assert two.shelf.behind.nodes.counters["corrupt"] >= 1

    run(story())


def test_a_redis_that_is_gone_costs_its_blocks_and_nothing_else(tmp_path: Path) -> None:
    async def story() -> None:
        with RedisServer(tmp_path / "redis") as server:
            async with two_nodes(tmp_path, server, timeout_s=0.05) as (one, two):
                ann, bob = await one.worker(), await two.worker()
                await ann.keep("abc")
                await settled(one)
                server.kill()
                assert await ann.keep("xyz") == 3
                assert (await ann.look_up("abcxyz", wait_ms=50)).found == 3
                assert (await bob.look_up("abc", wait_ms=50)).found == 0
                await settled(one)
                await eventually(lambda: not one.shelf.behind.lanes[1].is_open)
                assert (await bob.look_up("123")).coming == 0 or two.shelf.behind.lanes[0].is_open
                forget_arena(one)
                assert await brought(one, ann, "xyz") == "xyz"  # from disk
                server.restart()

                async def stores() -> bool:
                    await ann.keep("late")
                    await one.shelf.drain()
                    forget_arena(one)
                    one.shelf.promoter._nothing.clear()
                    return bool(one.shelf.writers["redis"].counters["stored"] > 3)

                await eventually(stores)

    run(story())
