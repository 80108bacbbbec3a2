"""A worker's stream: it registers, is told things, says things, and others are told of it."""

import asyncio
import os
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from nodes import Process, Served, Worker, eventually, node_settings, run, served
from wire import BLOCK

from kvprefetch.v1 import workers_pb2 as pb

Code = grpc.StatusCode


def test_a_worker_is_told_where_its_arena_is_and_its_models_secret(tmp_path: Path) -> None:
    async def story() -> None:
        async with served(node_settings(tmp_path), tmp_path / "s") as stage:
            ann, bob = await stage.worker(), await stage.worker()
            told = ann.registered
            assert told.namespace == bob.registered.namespace
            assert told.arena.endswith(f"{told.namespace}.arena")
            assert (told.slots, told.slot_bytes) == (stage.shelf.host.arena.slots, BLOCK)
            assert len(told.secret) == 32
            assert told.secret == bob.registered.secret
            assert told.service == stage.node.run
            other = await stage.worker(fingerprint='{"weights":"others"}', model="other")
            assert other.registered.namespace != told.namespace
            assert other.registered.secret != told.secret

    run(story())


def test_the_secret_outlives_the_service(tmp_path: Path) -> None:
    async def story() -> None:
        seen = []
        settings = node_settings(tmp_path)
        object.__setattr__(settings, "secret", "")
        for _ in range(2):
            async with served(settings, tmp_path / "s") as stage:
                seen.append((await stage.worker()).registered.secret)
        assert seen[0] == seen[1]
        kept = tmp_path / "state" / "secret"
        assert kept.stat().st_mode & 0o777 == 0o600
        assert seen[0] not in kept.read_bytes()

    run(story())


def test_what_is_written_differently_is_the_same_model(tmp_path: Path) -> None:
    async def story() -> None:
        async with served(node_settings(tmp_path), tmp_path / "s") as stage:
            ann = await stage.worker(fingerprint='{"a":1,"b":2}')
            bob = await stage.worker(fingerprint='{ "b": 2, "a": 1 }')
            assert ann.registered.namespace == bob.registered.namespace

    run(story())


REFUSED: list[tuple[str, dict[str, Any], Code, str]] = [
    ("a short instance", {"instance": b"a"}, Code.INVALID_ARGUMENT, "16 random"),
    ("no model", {"model": ""}, Code.INVALID_ARGUMENT, "model: a name"),
    ("no block", {"block_bytes": 0}, Code.INVALID_ARGUMENT, "block_bytes: 0"),
    ("no tokens", {"block_tokens": 0}, Code.INVALID_ARGUMENT, "block_tokens: 0"),
    ("no JSON", {"fingerprint": "{"}, Code.INVALID_ARGUMENT, "fingerprint: no JSON"),
    ("no object", {"fingerprint": "[1]"}, Code.INVALID_ARGUMENT, "a JSON object"),
    ("no process", {"pid": 0}, Code.INVALID_ARGUMENT, "pid, started"),
    ("another start", {"started": 1}, Code.INVALID_ARGUMENT, "no such process is seen"),
    ("an odd pid", {"pid": 2**32 - 1}, Code.INVALID_ARGUMENT, "pid, started"),
    ("blocks that do not fit", {"block_bytes": 2**29}, Code.FAILED_PRECONDITION, "arena.size"),
]


@pytest.mark.parametrize(("name", "fields", "code", "says"), REFUSED, ids=[row[0] for row in REFUSED])
def test_who_registers_badly_is_told_why(
    tmp_path: Path, name: str, fields: dict[str, Any], code: Code, says: str
) -> None:
    async def story() -> None:
        async with served(node_settings(tmp_path), tmp_path / "s") as stage:
            await refused(stage, code, says, **fields)
            assert stage.registry.workers() == []
            await stage.worker()

    run(story())


async def refused(stage: Served, code: Code, says: str, worker: Worker | None = None, **fields: Any) -> None:
    worker = worker or Worker(stage.channel)
    with pytest.raises((grpc.aio.AioRpcError, AssertionError)):
        await worker.register(**fields)
    assert await worker._stream.code() is code
    assert says in await worker._stream.details()


def test_other_blocks_of_the_same_model_are_refused(tmp_path: Path) -> None:
    async def story() -> None:
        async with served(node_settings(tmp_path), tmp_path / "s") as stage:
            await stage.worker()
            await refused(stage, Code.FAILED_PRECONDITION, "run the same version", block_bytes=2 * BLOCK)
            await refused(stage, Code.FAILED_PRECONDITION, "run the same version", block_tokens=32)

    run(story())


def test_an_arena_of_another_size_is_refused(tmp_path: Path) -> None:
    async def story() -> None:
        async with served(node_settings(tmp_path), tmp_path / "s") as stage:
            await stage.worker()
        async with served(node_settings(tmp_path, slots=32), tmp_path / "s") as stage:
            await refused(stage, Code.FAILED_PRECONDITION, "set the size back")

    run(story())


def test_two_services_on_one_arena_are_refused(tmp_path: Path) -> None:
    async def story() -> None:
        async with (
            served(node_settings(tmp_path), tmp_path / "s") as first,
            served(node_settings(tmp_path), tmp_path / "t") as second,
        ):
            await first.worker()
            await refused(second, Code.FAILED_PRECONDITION, "another service has")

    run(story())


def test_a_stream_begins_with_register_and_has_one(tmp_path: Path) -> None:
    async def story() -> None:
        async with served(node_settings(tmp_path), tmp_path / "s") as stage:
            stranger = Worker(stage.channel)
            stranger._stream = stage_stream = _stream(stage)
            await stranger.say(load=pb.LoadReport(live=1))
            assert await stage_stream.code() is Code.INVALID_ARGUMENT
            ann = await stage.worker()
            await ann.say(register=pb.Register())
            assert await ann._stream.code() is Code.INVALID_ARGUMENT
            await eventually(lambda: stage.registry.workers() == [])

    run(story())


def _stream(stage: Served) -> Any:
    from kvprefetch.v1 import workers_pb2_grpc

    return workers_pb2_grpc.WorkersStub(stage.channel).Work()


def test_another_process_with_the_same_instance_is_refused(tmp_path: Path) -> None:
    async def story() -> None:
        async with served(node_settings(tmp_path), tmp_path / "s") as stage:
            process = Process(stage.address)
            try:
                await process.do("register")
                (known,) = stage.registry.workers()
                await refused(stage, Code.ALREADY_EXISTS, f"pid {process.pid}", Worker(stage.channel, known.instance))
                os.kill(process.pid, 9)
                await eventually(lambda: stage.node.owner(known.instance) is None)
                await Worker(stage.channel, known.instance).register()
            finally:
                process.end()

    run(story())


def test_a_process_that_registers_again_takes_its_own_place(tmp_path: Path) -> None:
    """It came back before we noticed that it was gone."""

    async def story() -> None:
        async with served(node_settings(tmp_path), tmp_path / "s") as stage:
            ann = await stage.worker()
            reserved = await ann.reserve("ab")
            again = Worker(stage.channel, ann.instance)
            await again.register(reservations=[reserved.reservation])
            stage.workers.append(again)
            assert len(stage.registry.workers()) == 1
            assert await again.commit(reserved.reservation, ann.write("ab", reserved.slots)) == 2
            await ann.leave()
            await asyncio.sleep(0.05)
            assert len(stage.registry.workers()) == 1

    run(story())


def test_numbers_of_an_earlier_run_mean_nothing_in_the_next(tmp_path: Path) -> None:
    async def story() -> None:
        async with served(node_settings(tmp_path), tmp_path / "s") as stage:
            ann = await stage.worker()
            before = await ann.reserve("ab")
            await ann.keep("xy")
            lease = (await ann.look_up("xy")).lease
        async with served(node_settings(tmp_path), tmp_path / "s") as stage:
            again = Worker(stage.channel, ann.instance)
            stage.workers.append(again)
            await again.register(leases=[lease], reservations=[before.reservation])
            assert stage.held["quarantined_orphaned"] == 2
            await again.reserve("cd")
            await again.look_up("xy")
            await again.release(leases=[lease], reservations=[before.reservation])
            assert stage.held["quarantined_orphaned"] == 0
            assert (stage.held["leases"], stage.held["reservations"]) == (1, 1)

    run(story())


def test_the_registry_tells_of_workers_and_sends_to_them(tmp_path: Path) -> None:
    async def story() -> None:
        async with served(node_settings(tmp_path), tmp_path / "s") as stage:
            told: list[tuple[str, Any]] = []
            stage.registry.on_joined(lambda worker: told.append(("joined", worker.name)))
            stage.registry.on_left(lambda worker: told.append(("left", worker.name)))
            stage.registry.on_report(lambda worker, message: told.append(("said", message.WhichOneof("message"))))
            ann = await stage.worker()
            name = f"tiny@{os.getpid()}"
            assert stage.registry.send(ann.instance, pb.ServiceMessage(withdraw=pb.Withdraw(hint=7)))
            assert (await ann.hear()).withdraw.hint == 7
            await ann.say(preload=pb.PreloadReport(hint=7))
            await ann.say(load=pb.LoadReport(live=3, tokens_per_s=100.0))
            await eventually(lambda: len(told) == 3)
            (known,) = stage.registry.workers()
            assert known.load.live == 3
            assert stage.shelf.compute_s() == pytest.approx(0.16)
            await ann.leave()
            await eventually(lambda: len(told) == 4)
            assert told == [("joined", name), ("said", "preload"), ("said", "load"), ("left", name)]
            assert not stage.registry.send(ann.instance, pb.ServiceMessage())
            assert stage.shelf.compute_s() is None

    run(story())


def test_a_worker_that_does_not_read_is_told_no_more(tmp_path: Path) -> None:
    async def story() -> None:
        async with served(node_settings(tmp_path), tmp_path / "s") as stage:
            ann = await stage.worker()
            (known,) = stage.registry.workers()
            sent = 0
            while stage.registry.send(ann.instance, pb.ServiceMessage(withdraw=pb.Withdraw(hint=1))):
                sent += 1
                assert sent < 10_000
            assert known.outbox.full()

    run(story())


def test_a_session_is_placed_where_it_was_served(tmp_path: Path) -> None:
    async def story() -> None:
        async with served(node_settings(tmp_path), tmp_path / "s") as stage:
            assert stage.registry.place("ann", "s") is None
            first, second = await stage.worker(), await stage.worker()
            assert stage.registry.place("ann", "s")[1] == pb.PLACE_HOST
            await second.say(session=pb.SessionReport(tenant="ann", session="s"))
            await first.say(load=pb.LoadReport(live=9))
            await eventually(lambda: stage.registry.place("ann", "s")[1] == pb.PLACE_DEVICE)
            assert stage.registry.place("ann", "s")[0].instance == second.instance
            assert stage.registry.expected_at("ann", "s").instance == second.instance
            await eventually(lambda: stage.registry.place("ann", "new")[0].instance == second.instance)
            await second.leave()
            await eventually(lambda: stage.registry.place("ann", "s")[0].instance == first.instance)
            assert stage.registry.place("ann", "s", "another model") is None

    run(story())


def test_while_draining_nobody_registers_and_everybody_is_told(tmp_path: Path) -> None:
    async def story() -> None:
        async with served(node_settings(tmp_path), tmp_path / "s") as stage:
            ann = await stage.worker()
            stage.registry.drain()
            assert (await ann.hear()).WhichOneof("message") == "draining"
            await refused(stage, Code.UNAVAILABLE, "draining")
            assert await ann.keep("ab") == 2

    run(story())
