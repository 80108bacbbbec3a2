"""A real cache service in a thread of this process, for the worker's stories: looked into, ended, begun again."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from processes import until

from kvprefetch.client.channel import open_channel
from kvprefetch.engines.engine import TransformersEngine
from kvprefetch.inprocess import Local
from kvprefetch.service.figures import figures
from kvprefetch.service.run import build_server
from kvprefetch.service.server import Server
from kvprefetch.service.shelf import Shelf
from kvprefetch.settings import ArenaSettings, ServiceSettings, Settings
from kvprefetch.worker.link import Link


class ServiceThread:
    """A service on a Unix socket in `folder`. `begin` and `end` may be called again and again."""

    def __init__(self, folder: Path, arena: str = "4MiB") -> None:
        self.address = f"unix://{folder}/service.sock"
        self.settings = Settings(
            secret="of the tests",
            service=ServiceSettings(listen=(self.address,), state_dir=str(folder / "state"), drain_s=1.0),
            arena=ArenaSettings(dir=str(folder / "arena"), size=arena, huge_pages=False),
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self.begin()

    def begin(self) -> None:
        ready: Future[Server] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(ready)), daemon=True)
        self._thread.start()
        self.server = ready.result(30)

    async def _serve(self, ready: "Future[Server]") -> None:
        self._loop = asyncio.get_running_loop()
        server = build_server(self.settings)
        try:
            await server.start()
        except BaseException as error:
            ready.set_exception(error)
            raise
        ready.set_result(server)
        await server.wait_closed()

    def end(self) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self.server.hurry)
        self._thread.join(30)
        assert not self._thread.is_alive()

    def call(self, look: Callable[[Shelf], Any]) -> Any:
        """Do something with the one namespace that there is, on the service's thread."""
        assert self._loop is not None

        async def there() -> Any:
            (shelf,) = self.server.core.node.shelves.values()  # type: ignore[attr-defined]
            return look(shelf)

        return asyncio.run_coroutine_threadsafe(there(), self._loop).result(30)

    def stats(self) -> dict[str, Any]:
        return self.call(figures)  # type: ignore[no-any-return]

    def check(self) -> None:
        self.call(lambda shelf: shelf.check())


@contextmanager
def attached(
    engine: TransformersEngine, service: ServiceThread, *, waits: bool = True, settings: Settings | None = None
) -> Iterator[Local]:
    """A worker that is registered with the service, or will be. Its books must be right at the end."""
    channel = open_channel(service.address)
    link = Link(channel, engine.pool, time.monotonic, verify=True)
    with Local(engine, settings or service.settings, link) as kv:
        assert kv.core.station is not None
        assert not waits or kv.core.station.registered.wait(30)
        yield kv
        kv.check()
    kv.check()
    channel.close()


def written(kv: Local, service: ServiceThread) -> None:
    """Wait until all that was computed is in the arena."""
    assert kv.core.link is not None
    offloader = kv.core.link.offloader
    until(lambda: offloader.is_idle, "blocks are not written")
    service.check()
