"""The server: sockets and ports, who is let in, health, reflection, and an orderly end.

Promises
- `start` opens everything, or raises SettingsError or ServiceError, having opened nothing.
- Draining, nothing new begins, what is in flight finishes, for at most `service.drain_s`, streams end; then everything
  is closed and the sockets are gone. Asked for again it changes nothing; `hurry` ends the waiting.
- All of it happens on the event loop that `start` is called in.
"""

import asyncio
import logging
import os
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckResponse
from grpc_reflection.v1alpha import reflection

from kvprefetch.client.channel import is_loopback
from kvprefetch.errors import ServiceError
from kvprefetch.service.addresses import Claim, Port, UnixSocket, claim_all, places, private_files
from kvprefetch.service.admin_rpc import AdminService, Figures
from kvprefetch.service.auth import Gate
from kvprefetch.service.calls import Calls
from kvprefetch.service.hints import HintBook
from kvprefetch.service.hints_rpc import HintsService
from kvprefetch.service.reach import Reach, connect
from kvprefetch.service.registry import Registry, Worker
from kvprefetch.service.tls import server_credentials
from kvprefetch.settings import ServiceSettings, Settings
from kvprefetch.v1 import admin_pb2, admin_pb2_grpc, cache_pb2, hints_pb2, hints_pb2_grpc, workers_pb2

log = logging.getLogger(__name__)
TICK_S = 0.5
SILENT_S = 2.5
"""A worker that says nothing for so long (it reports every second) stands still, or the line to it does."""
_LAST_WORDS_S = 0.5  # for streams to end by themselves
_FRAME_BYTES = 64 * 2**20  # what may be sent: more than any frame
_SERVICES = tuple(
    service.full_name
    for file in (cache_pb2, hints_pb2, workers_pb2, admin_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
)


class Node(Figures, Protocol):
    """What is behind the server: tiers and leases."""

    def start(self) -> None:
        """Begin to do what is due every second."""

    async def close(self) -> None:
        """Finish what is being written behind, and let go of everything."""


@dataclass(frozen=True)
class Core:
    """The node, its workers, and the services `Cache` and `Workers` over them."""

    node: Node
    registry: Registry
    add_to: Callable[[grpc.aio.Server], None]  # registers the two services


class Server:
    """See the module's promises. It owns the node and closes it."""

    def __init__(self, settings: Settings, core: Core, clock: Callable[[], float] = time.monotonic) -> None:
        self.settings, self.core, self.clock = settings, core, clock
        self.calls = Calls(Gate(settings.credentials, settings.tenant))
        reach = Reach(core.registry)
        service = settings.service
        first = secrets.randbits(40) << 22  # another run's numbers are unknown here
        self.book = HintBook(reach, service.max_hints, service.max_context_bytes, first)
        self.hints = HintsService(self.book, settings, clock)
        connect(core.registry, self.book, self.hints.public, clock)
        self.admin = AdminService(settings, core.node, self.hints, self.calls, self._about, self.drain)
        self.addresses: list[str] = []
        self._health = health.aio.HealthServicer()
        self._server: grpc.aio.Server | None = None
        self._claims: list[Claim] = []
        self._ticker: asyncio.Task[None] | None = None
        self._drain: asyncio.Task[None] | None = None
        self._asked, self._hurry = asyncio.Event(), asyncio.Event()
        self._started_at = 0.0

    async def start(self) -> list[str]:
        """Listen; returns the addresses. Raises SettingsError, ServiceError."""
        try:
            found, credentials = places(self.settings), server_credentials(self.settings)
            self._claims = claim_all(found)
            self._server = self._make()
            self.addresses = _bind(self._server, found, credentials)
            await self._server.start()
        except BaseException:
            await self._close(0.0)
            raise
        for name in ("", *_SERVICES):
            await self._health.set(name, HealthCheckResponse.SERVING)
        self._started_at = self.clock()
        self.core.node.start()
        self._ticker = asyncio.create_task(self._tick())
        _warn_of_clear_ports(found, credentials)
        return self.addresses

    def drain(self) -> None:
        """Begin to end; see the module's promises. Returns at once."""
        if self._drain is None:
            self._drain = asyncio.create_task(self._end())
            self._asked.set()

    def hurry(self) -> None:
        """Begin to end; wait for nothing if that has begun already."""
        if self._drain is not None:
            self._hurry.set()
        self.drain()

    async def wait_closed(self) -> None:
        """Until `drain` has been asked for and everything is closed."""
        await self._asked.wait()
        assert self._drain is not None
        await self._drain

    # -- within ----------------------------------------------------------------------------------------
    def _make(self) -> grpc.aio.Server:
        server = grpc.aio.server(interceptors=[self.calls], options=_options(self.settings.service))
        hints_pb2_grpc.add_HintsServicer_to_server(self.hints, server)
        admin_pb2_grpc.add_AdminServicer_to_server(self.admin, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        self.core.add_to(server)
        reflection.enable_server_reflection((*_SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        return server

    def _about(self) -> dict[str, Any]:
        workers = self.core.registry.workers()
        return {
            "addresses": self.addresses,
            "up_s": round(self.clock() - self._started_at, 3),
            "draining": self.calls.is_draining,
            "workers": [_figures(worker, self.clock()) for worker in workers],
            "silent": sum(self.clock() - worker.heard_at > SILENT_S for worker in workers),
        }

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            try:
                self.book.expire(self.clock())
                self.hints.public.expire(self.clock())
            except Exception:  # the task's outermost line
                log.exception("closing overdue hints broke")

    async def _end(self) -> None:
        log.info("draining: %d calls in flight", self.calls.in_flight)
        self.calls.is_draining = True
        await self._health.enter_graceful_shutdown()
        self.core.registry.drain()
        self.book.close("the service was ended", self.clock())
        self.hints.public.close("the service was ended")
        waits = [asyncio.create_task(self.calls.wait_idle()), asyncio.create_task(self._hurry.wait())]
        await asyncio.wait(waits, timeout=self.settings.service.drain_s, return_when=asyncio.FIRST_COMPLETED)
        for task in waits:
            task.cancel()
        await self._close(_LAST_WORDS_S)

    async def _close(self, grace_s: float) -> None:
        """Everything that is open; the sockets last."""
        try:
            if self._ticker is not None:
                self._ticker.cancel()
            if self._server is not None:
                await self._server.stop(grace_s)
            await self.core.node.close()
        finally:
            self._release()

    def _release(self) -> None:
        for claim in self._claims:
            claim.release()
        self._claims = []


def _figures(worker: Worker, now: float) -> dict[str, Any]:
    return {
        "name": worker.name,
        "live": worker.load.live,
        "preloads": worker.load.preloads,
        "free_blocks": worker.load.free_blocks,
        "tokens_per_s": round(worker.load.tokens_per_s, 1),
        "silent_s": round(now - worker.heard_at, 1),
    }


def _options(settings: ServiceSettings) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.max_send_message_length", max(settings.max_message_bytes, _FRAME_BYTES)),
        ("grpc.so_reuseport", 0),  # two services would share a port, each with half of the calls
        ("grpc.keepalive_time_ms", 10_000),  # a client that stopped is found out
        ("grpc.keepalive_timeout_ms", 5_000),
        ("grpc.http2.ping_timeout_ms", 5_000),
        ("grpc.http2.max_pings_without_data", 0),  # on streams where nothing happens, too
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),  # clients do the same
    ]


def _bind(
    server: grpc.aio.Server, found: Sequence[UnixSocket | Port], credentials: grpc.ServerCredentials | None
) -> list[str]:
    """Open each place; the addresses that came of it. Raises ServiceError."""
    addresses = []
    for place in found:
        try:
            if isinstance(place, UnixSocket):
                with private_files():
                    server.add_insecure_port(f"unix:{place.path}")
                os.chmod(place.path, 0o600)
                addresses.append(str(place))
            elif credentials is None:
                addresses.append(str(Port(place.host, server.add_insecure_port(str(place)))))
            else:
                addresses.append(str(Port(place.host, server.add_secure_port(str(place), credentials))))
        except (RuntimeError, OSError) as error:  # gRPC's, and the socket's file
            raise ServiceError(f"cannot listen on {place}: {error}") from error
    return addresses


def _warn_of_clear_ports(found: Sequence[UnixSocket | Port], credentials: grpc.ServerCredentials | None) -> None:
    for place in found:
        if credentials is None and isinstance(place, Port) and not is_loopback(place.host):
            log.warning("%s speaks in the clear: tokens and prompts can be read on the way; set service.tls_*", place)
