"""Blocks in the arenas of other nodes, found in the directory and read from their services.

Promises
- Whatever another node sends is verified: a block that has not its checksum, and all after it, is not taken.
- A node that brings no complete block for `PATIENCE_S` is given up, and left alone for a while; so is one that refuses.
- Lives on the event loop's thread; copies are made in threads, into memory that stays reserved until they are done.
- Tells the C library, for this whole process, to keep the memory of frames (`frames.keep_memory`).
"""

import asyncio
import ctypes
import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import grpc
import grpc.aio

from kvprefetch.cache.keys import BlockKey
from kvprefetch.client.channel import Endpoint, endpoint, host_and_port, open_async_channel
from kvprefetch.errors import SettingsError, TierUnavailable
from kvprefetch.service.frames import keep_memory, unpack
from kvprefetch.service.lane import Clock, Pace
from kvprefetch.settings import RedisSettings
from kvprefetch.tiers.breaker import Breaker
from kvprefetch.tiers.checksum import checksum
from kvprefetch.tiers.directory import Directory, longest_run
from kvprefetch.tiers.mapped import address_of
from kvprefetch.v1.cache_pb2 import ReadRequest

log = logging.getLogger(__name__)

PATIENCE_S = 0.05
READ = "/kvprefetch.v1.Cache/Read"
_MOST_NODES = 256
_WINDOW = (("grpc.http2.lookahead_bytes", 4 * 2**20), ("grpc.http2.bdp_probe", 0))
"""What comes before it is asked for stays within a processor's caches."""
_MOST_PLACES = 65_536  # keys of which we remember where they are


class Peers:
    """Connections to other nodes' services, one for each, shared by all namespaces."""

    def __init__(self, settings: RedisSettings, clock: Clock) -> None:
        self.settings, self.clock = settings, clock
        keep_memory()
        self._nodes: OrderedDict[str, tuple[Endpoint, grpc.aio.Channel, Breaker]] = OrderedDict()

    async def read(self, address: str, namespace: str, keys: Sequence[BlockKey], take: "Take") -> str:
        """Ask `address` for blocks and give each frame to `take`, until it has enough; why it ended, or ""."""
        try:
            end, channel, breaker = await self._node(address)
        except SettingsError as error:
            log.warning("the node at %s cannot be read from: %s", address, error)
            return "refused"
        if not breaker.allows(self.clock()):
            return "skipped"
        method: Any = channel.unary_stream(READ, request_serializer=ReadRequest.SerializeToString)
        call = method(ReadRequest(namespace=namespace, keys=b"".join(keys)), metadata=end.metadata)
        why = ""
        try:
            await self._take_all(call, take)
        except TimeoutError:
            why = "timed_out"
        except grpc.aio.AioRpcError as error:
            why = "unavailable" if error.code() is grpc.StatusCode.UNAVAILABLE else "refused"
            log.warning("the node at %s: %s: %s", address, error.code().name, error.details())
        except ValueError as error:
            why = "damaged"
            log.warning("the node at %s sent no blocks of ours: %s", address, error)
        finally:
            call.cancel()
        breaker.failed(self.clock()) if why else breaker.succeeded()
        return why

    async def _take_all(self, call: Any, take: "Take") -> None:
        """One frame is copied while the next one comes."""
        taking: asyncio.Task[bool] | None = None
        try:
            while True:
                frame = await asyncio.wait_for(call.read(), PATIENCE_S)
                if taking is not None and not await taking:
                    return
                if frame is grpc.aio.EOF:
                    return
                taking = asyncio.create_task(take(frame))
        finally:  # it writes to memory that is the caller's
            if taking is not None:
                await asyncio.wait({taking})

    async def close(self) -> None:
        """Calling it again does nothing."""
        while self._nodes:
            _, (_, channel, _) = self._nodes.popitem()
            await channel.close()

    async def _node(self, address: str) -> tuple[Endpoint, grpc.aio.Channel, Breaker]:
        node = self._nodes.get(address)
        if node is None:
            host_and_port(address, address)  # whoever writes to Redis may not have our token sent in the clear
            end = endpoint(address, self.settings.peer_token, ca=self.settings.peer_ca)
            end = replace(end, options=(*end.options, *_WINDOW))
            node = self._nodes[address] = end, open_async_channel(end), Breaker()
            if len(self._nodes) > _MOST_NODES:
                _, (_, old, _) = self._nodes.popitem(last=False)
                await old.close()
        self._nodes.move_to_end(address)
        return node


class Take:
    """Copies frames' blocks into memory, in a thread, as long as they are whole.

    Each of `into` is writable, contiguous, and has `block_bytes`.
    """

    def __init__(self, into: Sequence[memoryview], block_bytes: int, threads: ThreadPoolExecutor) -> None:
        self.into, self.block_bytes, self.threads = into, block_bytes, threads
        self.sums: list[int] = []
        self.is_corrupt = False

    async def __call__(self, frame: bytes) -> bool:
        """Whether more is wanted. Raises ValueError for what is no frame."""
        await asyncio.get_running_loop().run_in_executor(self.threads, self._copy, frame)
        return len(self.sums) < len(self.into) and not self.is_corrupt

    def _copy(self, frame: bytes) -> None:
        source = ctypes.cast(ctypes.c_char_p(frame), ctypes.c_void_p).value or 0
        for block in unpack(frame, self.block_bytes):
            if len(self.sums) == len(self.into):
                return
            target = self.into[len(self.sums)]
            ctypes.memmove(address_of(target), source + block.at, target.nbytes)  # other threads run meanwhile
            if checksum(target) != block.checksum:
                self.is_corrupt = True
                return
            self.sums.append(block.checksum)


class NodeSource:
    """The other nodes as a `Source` of one namespace."""

    name = "node"

    def __init__(
        self, peers: Peers, directory: Directory, namespace: str, block_bytes: int, own: str, clock: Clock
    ) -> None:
        self.peers, self.directory, self.namespace = peers, directory, namespace
        self.block_bytes, self.own, self.clock = block_bytes, own, clock
        self.pace, self.counters, self.breaker = Pace(), Counter[str](), Breaker()
        self._places: OrderedDict[BlockKey, str] = OrderedDict()
        self._threads = ThreadPoolExecutor(2, "kvprefetch-peers")

    @property
    def is_open(self) -> bool:
        return not self.breaker.is_open

    async def find(self, keys: Sequence[BlockKey]) -> int:
        if not self.breaker.allows(self.clock()):
            self.counters["skipped"] += 1
            return 0
        try:
            found = await self._run(lambda: self.directory.who_has(keys))
        except TierUnavailable:
            self.breaker.failed(self.clock())
            self.counters["unavailable"] += 1
            return 0
        self.breaker.succeeded()
        address, count = longest_run(found, self.own)
        for key in keys[:count]:
            self._places[key] = address
        while len(self._places) > _MOST_PLACES:
            self._places.popitem(last=False)
        return count

    async def load(self, keys: Sequence[BlockKey], into: Sequence[memoryview]) -> list[int]:
        address = self._places.get(keys[0]) if keys else None
        if address is None:
            return []
        began, take = self.clock(), Take(into, self.block_bytes, self._threads)
        why = await self.peers.read(address, self.namespace, keys, take)
        seconds = self.clock() - began
        if take.sums or why == "timed_out":
            self.pace.learn(len(take.sums) * self.block_bytes, seconds)
        if take.is_corrupt or why:
            self.counters[why or "corrupt"] += 1
        if len(take.sums) < len(keys):
            for key in keys:
                self._places.pop(key, None)
        self.counters["loaded"] += len(take.sums)
        return take.sums

    async def close(self) -> None:
        """Calling it again does nothing."""
        self._threads.shutdown(wait=False)

    async def _run(self, work: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)
