"""One service, from its settings to its end."""

import asyncio
import gc
import signal
import time
from collections.abc import Callable

import grpc.aio

from kvprefetch.service.cache_rpc import CacheService, add_cache
from kvprefetch.service.node import Node
from kvprefetch.service.registry import Registry
from kvprefetch.service.server import Core, Server
from kvprefetch.service.workers_rpc import WorkersService
from kvprefetch.settings import Settings
from kvprefetch.v1 import workers_pb2_grpc


def build_server(settings: Settings, clock: Callable[[], float] = time.monotonic) -> Server:
    """A server with its node, not listening yet. To be called in a running event loop. Raises SettingsError."""
    node, registry = Node(settings, clock), Registry(clock, settings.service.confidence)
    cache = CacheService(node, registry, settings.service.max_blocks)
    workers = WorkersService(node, registry)

    def add_to(server: grpc.aio.Server) -> None:
        add_cache(server, cache)
        workers_pb2_grpc.add_WorkersServicer_to_server(workers, server)

    return Server(settings, Core(node, registry, add_to), clock)


async def run(settings: Settings, ready: Callable[[list[str]], None]) -> None:
    """Serve until SIGTERM, SIGINT or `Admin.Drain`; a second signal ends it without waiting.

    `ready` is told the addresses. Raises SettingsError, ServiceError.
    """
    server = build_server(settings)
    addresses = await server.start()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.hurry)
    gc.collect()
    gc.freeze()  # look-ups wait for collections: these need not look at what lives as long as the process
    ready(addresses)
    await server.wait_closed()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.remove_signal_handler(number)
        signal.signal(number, signal.SIG_IGN)  # one more must not spoil the exit status
