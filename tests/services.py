"""Real services in this process, each on its own event loop's thread, and workers that do as they are told."""

import asyncio
import os
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import grpc
from processes import until

from kvprefetch.client.channel import open_channel
from kvprefetch.service.run import build_server
from kvprefetch.service.server import Server
from kvprefetch.service.watch import start_time
from kvprefetch.settings import ArenaSettings, Credential, ServiceSettings, Settings
from kvprefetch.v1 import admin_pb2, admin_pb2_grpc, workers_pb2, workers_pb2_grpc

BLOCK_BYTES = 4_096


def credential(name: str, role: str, token: str) -> Credential:
    return Credential(name, role, token_sha256=sha256(token.encode()).hexdigest())


def small(folder: Path, *listen: str, **service: Any) -> Settings:
    """Settings of a service that keeps everything in `folder`; without a `listen`, on a socket there."""
    return Settings(
        secret="of the tests",
        service=ServiceSettings(listen=listen or (f"unix://{folder}/s.sock",), state_dir=str(folder), **service),
        arena=ArenaSettings(dir=str(folder / "arena"), size="1MiB", prefault=False, huge_pages=False),
    )


class Service:
    """A running one."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.server: Server | None = None
        self.error: BaseException | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()
        self._ready.wait()
        if self.error is not None:
            self._thread.join()
            raise self.error

    async def _run(self) -> None:
        try:
            self.loop = asyncio.get_running_loop()
            self.server = build_server(self.settings)
            self.addresses = await self.server.start()
        except BaseException as error:  # noqa: BLE001 - it is the test's
            self.error = error
            return
        finally:
            self._ready.set()
        await self.server.wait_closed()

    @property
    def address(self) -> str:
        return self.addresses[0]

    def do(self, action: Callable[[Server], object]) -> None:
        """Run it on the service's thread, soon; if it has ended, never."""
        assert self.server is not None
        with suppress(RuntimeError):  # the loop is closed
            self.loop.call_soon_threadsafe(action, self.server)

    def stop(self) -> None:
        """An orderly end; again, it does nothing."""
        self.do(lambda server: server.drain())
        self._thread.join()

    def stop_now(self) -> None:
        """The same without waiting for what is in flight."""
        self.do(lambda server: (server.hurry(), server.hurry()))
        self._thread.join()


@contextmanager
def running(settings: Settings) -> Iterator[Service]:
    service = Service(settings)
    try:
        yield service
    finally:
        service.stop_now()


@contextmanager
def calling(address: str, token: str = "", **tls: str) -> Iterator[grpc.Channel]:
    channel = open_channel(address, token, **tls)
    try:
        yield channel
    finally:
        channel.close()


def code_of(call: object, *arguments: object, **more: object) -> grpc.StatusCode:
    try:
        call(*arguments, timeout=20, **more)  # type: ignore[operator]
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def stats(channel: grpc.Channel) -> bytes:
    return admin_pb2_grpc.AdminStub(channel).Stats(admin_pb2.StatsRequest(), timeout=20).stats


class TestWorker:
    """Registers as this process, keeps what it is told, and says what the test wants it to say."""

    __test__ = False

    def __init__(self, channel: grpc.Channel, model: str = "m") -> None:
        self.instance = secrets.token_bytes(16)
        self.told: list[workers_pb2.ServiceMessage] = []
        self.error: grpc.RpcError | None = None
        self._says: SimpleQueue[workers_pb2.WorkerMessage | None] = SimpleQueue()
        register = workers_pb2.Register(
            instance=self.instance,
            pid=os.getpid(),
            started=start_time(os.getpid()),
            model=model,
            fingerprint=f'{{"weights":"{model}"}}',
            block_bytes=BLOCK_BYTES,
            block_tokens=16,
            device_blocks=8,
        )
        self._says.put(workers_pb2.WorkerMessage(register=register))
        self._stream = workers_pb2_grpc.WorkersStub(channel).Work(iter(self._says.get, None))
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        until(lambda: bool(self.told) or self.error is not None, "the worker is not registered", 20)

    def _listen(self) -> None:
        try:
            for message in self._stream:
                self.told.append(message)
        except grpc.RpcError as error:
            self.error = error

    def of(self, kind: str) -> list[Any]:
        """The messages of this kind."""
        return [getattr(message, kind) for message in list(self.told) if message.WhichOneof("message") == kind]

    def wait_for(self, kind: str, number: int = 1) -> list[Any]:
        """Wait until it was told so many of this kind."""
        until(lambda: len(self.of(kind)) >= number, f"the worker is not told a {kind}", 20)
        return self.of(kind)

    def say(self, **message: Any) -> None:
        """`say(preload=PreloadReport(…))`, `say(session=…)`, `say(load=…)`."""
        self._says.put(workers_pb2.WorkerMessage(**message))

    def leave(self) -> None:
        """End the stream."""
        self._says.put(None)
        self._thread.join(20)


def with_credentials(settings: Settings, *credentials: Credential) -> Settings:
    return replace(settings, credentials=credentials)
