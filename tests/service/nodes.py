"""A node behind a real gRPC server on a Unix socket, and workers that talk to it from here or from other processes."""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from struct import pack, unpack
from typing import Any

import grpc
import grpc.aio
from wire import BLOCK, FINGERPRINT, TAKEN, chain, content, packed

from kvprefetch.service.auth import Gate
from kvprefetch.service.cache_rpc import CacheService, add_cache
from kvprefetch.service.calls import Calls
from kvprefetch.service.node import Node
from kvprefetch.service.registry import Registry
from kvprefetch.service.watch import start_time
from kvprefetch.service.workers_rpc import WorkersService
from kvprefetch.settings import ArenaSettings, DiskSettings, RedisSettings, ServiceSettings, Settings
from kvprefetch.tiers.arena import ArenaFile
from kvprefetch.tiers.checksum import checksum
from kvprefetch.v1 import cache_pb2, cache_pb2_grpc, workers_pb2, workers_pb2_grpc

TIMEOUT_S = 20.0


def run(story: Coroutine[Any, Any, None]) -> None:
    """Run a story with a loop of its own."""
    asyncio.run(asyncio.wait_for(story, 60))


def node_settings(
    folder: Path, slots: int = 16, *, disk_slots: int = 0, redis: RedisSettings | None = None
) -> Settings:
    """Of a node whose files lie in `folder`."""
    size = f"{4096 * 2 + slots * (BLOCK + 256)}"
    disk = DiskSettings(str(folder / "disk"), str(8192 + disk_slots * (BLOCK + 256))) if disk_slots else DiskSettings()
    return Settings(
        service=ServiceSettings(state_dir=str(folder / "state")),
        arena=ArenaSettings(dir=str(folder / "arenas"), size=size, prefault=False, huge_pages=False),
        disk=disk,
        redis=redis or RedisSettings(),
        secret="secret",
    )


async def eventually(what: Callable[[], bool | Awaitable[bool]], timeout_s: float = TIMEOUT_S) -> None:
    """Wait until it is so."""
    until = time.monotonic() + timeout_s
    while True:
        answer = what()
        if answer if isinstance(answer, bool) else await answer:
            return
        assert time.monotonic() < until, "it has not become so"
        await asyncio.sleep(0.01)


@dataclass
class Served:
    """A running service. `check` proves law 5 of all that it has."""

    node: Node
    registry: Registry
    server: grpc.aio.Server
    address: str
    channel: grpc.aio.Channel
    workers: "list[Worker]" = field(default_factory=list)

    async def worker(self, **changes: Any) -> "Worker":
        """A worker of this process that has registered."""
        worker = Worker(self.channel)
        await worker.register(**changes)
        self.workers.append(worker)
        return worker

    @property
    def shelf(self) -> Any:
        """The only one."""
        (shelf,) = self.node.shelves.values()
        return shelf

    @property
    def held(self) -> dict[str, int]:
        return dict(self.shelf.leases.counts())


@asynccontextmanager
async def served(settings: Settings, socket: Path, *, tcp: bool = False) -> AsyncIterator[Served]:
    """Serve a node; at the end it is proved that nothing was lost."""
    node = Node(settings)
    registry = Registry(node.clock, settings.service.confidence)
    server = grpc.aio.server(
        interceptors=[Calls(Gate((), "default"))], options=(("grpc.max_receive_message_length", -1),)
    )
    add_cache(server, CacheService(node, registry, settings.service.max_blocks))
    workers_pb2_grpc.add_WorkersServicer_to_server(WorkersService(node, registry), server)
    socket.unlink(missing_ok=True)
    address = f"unix:{socket}"
    server.add_insecure_port(address)
    if tcp:
        server.add_insecure_port(settings.redis.advertise)
    await server.start()
    node.start()
    async with grpc.aio.insecure_channel(address, options=(("grpc.use_local_subchannel_pool", 1),)) as channel:
        stage = Served(node, registry, server, address, channel)
        try:
            yield stage
            await node.check()
        finally:
            for worker in stage.workers:
                await worker.leave()
            await server.stop(0.5)
            await node.close()


class Worker:
    """A worker as the service sees it, in this process: its stream, its arena, its calls."""

    def __init__(self, channel: grpc.aio.Channel, instance: bytes | None = None) -> None:
        self.channel = channel
        self.instance = instance or os.urandom(16)
        self.cache: Any = cache_pb2_grpc.CacheStub(channel)
        self.arena: ArenaFile | None = None
        self.registered: workers_pb2.Registered | None = None
        self._stream: Any = None

    async def register(self, **changes: Any) -> workers_pb2.Registered:
        """Open the stream; `changes` to what is registered."""
        self._stream = workers_pb2_grpc.WorkersStub(self.channel).Work()
        fields: dict[str, Any] = {
            "instance": self.instance,
            "pid": os.getpid(),
            "started": start_time(os.getpid()),
            "model": "tiny",
            "fingerprint": FINGERPRINT,
            "block_bytes": BLOCK,
            "block_tokens": 16,
        }
        await self.say(register=workers_pb2.Register(**{**fields, **changes}))
        message = await asyncio.wait_for(self._stream.read(), TIMEOUT_S)
        if message is grpc.aio.EOF:
            raise AssertionError(f"the stream ended: {await self._stream.code()} {await self._stream.details()}")
        self.registered = message.registered
        self.arena = ArenaFile.attach(self.registered.arena, self.registered.namespace, prefault=False)
        return self.registered

    async def say(self, **message: Any) -> None:
        await self._stream.write(workers_pb2.WorkerMessage(**message))

    async def hear(self) -> workers_pb2.ServiceMessage:
        return await asyncio.wait_for(self._stream.read(), TIMEOUT_S)

    async def leave(self) -> None:
        """The stream breaks."""
        if self._stream is not None:
            self._stream.cancel()
            self._stream = None

    async def look_up(self, path: str, *, lease: bool = True, wait_ms: int = 0, tenant: str = "ann") -> Any:
        return await self.cache.Lookup(
            cache_pb2.LookupRequest(
                instance=self.instance, tenant=tenant, session="s", keys=packed(path), lease=lease, wait_ms=wait_ms
            )
        )

    async def reserve(self, path: str, skip: int = 0, **changes: Any) -> Any:
        keys = chain(path)
        fields = {
            "instance": self.instance,
            "tenant": "ann",
            "parent": keys[skip - 1] if skip else b"",
            "keys": b"".join(keys[skip:]),
        }
        return await self.cache.Reserve(cache_pb2.ReserveRequest(**{**fields, **changes}))

    def write(self, path: str, slots: bytes, skip: int = 0) -> bytes:
        """Fill the slots; the packed checksums."""
        assert self.arena is not None
        sums = []
        for key, slot in zip(chain(path)[skip:], unpack(f"<{len(slots) // 4}I", slots), strict=False):
            if slot != TAKEN:
                self.arena.slot(slot)[:] = content(key)
                sums.append(checksum(content(key)))
        return pack(f"<{len(sums)}Q", *sums)

    async def commit(self, reservation: int, checksums: bytes) -> int:
        request = cache_pb2.CommitRequest(instance=self.instance, reservation=reservation, checksums=checksums)
        return int((await self.cache.Commit(request)).committed)

    async def keep(self, path: str) -> int:
        """Compute `path`, as far as it is missing; how many blocks were committed."""
        reserved = await self.reserve(path)
        if not reserved.reservation:
            return 0
        return await self.commit(reserved.reservation, self.write(path, reserved.slots))

    async def release(self, **numbers: Any) -> None:
        await self.cache.Release(cache_pb2.ReleaseRequest(instance=self.instance, **numbers))

    def reads(self, path: str, slots: bytes) -> str:
        """The part of `path` that lies whole in these slots."""
        assert self.arena is not None
        into = bytearray(BLOCK)
        found = unpack(f"<{len(slots) // 4}I", slots)
        for at, (key, slot) in enumerate(zip(chain(path), found, strict=False)):
            if not self.arena.read(slot, key, memoryview(into)) or bytes(into) != content(key):
                return path[:at]
        return path[: len(found)]


async def settled(stage: Served) -> None:
    """Nothing moves any more."""
    await stage.shelf.drain()
    await stage.node.check()


def forget_arena(stage: Served) -> None:
    """Evict everything that nobody holds."""
    stage.shelf.host.pool.clear()


async def brought(stage: Served, worker: Worker, path: str) -> str:
    """What of `path` is found, after it was asked for and waited for."""
    found = await worker.look_up(path, wait_ms=50)
    for _ in range(100):
        if not found.coming:
            break
        await worker.release(leases=[found.lease])
        found = await worker.look_up(path, wait_ms=50)
    read = worker.reads(path, found.slots)
    await worker.release(leases=[found.lease])
    return read


class Process:
    """A worker in a process of its own (`worker_process.py`), told what to do line by line."""

    def __init__(self, address: str) -> None:
        script = Path(__file__).with_name("worker_process.py")
        self.popen = subprocess.Popen(
            [sys.executable, str(script), address], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = self.popen.pid

    async def do(self, *words: str) -> Any:
        """Have it do something; what came of it."""
        return await asyncio.to_thread(self._do, words)

    def end(self) -> None:
        """However it is, it goes."""
        self.popen.kill()
        self.popen.wait()
        for pipe in (self.popen.stdin, self.popen.stdout):
            assert pipe is not None
            pipe.close()

    def _do(self, words: tuple[str, ...]) -> Any:
        assert self.popen.stdin is not None
        assert self.popen.stdout is not None
        self.popen.stdin.write(" ".join(words) + "\n")
        self.popen.stdin.flush()
        return json.loads(self.popen.stdout.readline())
