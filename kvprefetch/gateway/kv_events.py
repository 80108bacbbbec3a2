"""What an engine says of its prefix cache, as vLLM publishes it over ZeroMQ, and the task that listens.

Each message has three parts: a topic, a sequence number (8 bytes, big endian) and a batch of events in MessagePack.
Only blocks in the device's own memory are told on: what is offloaded to the host or kept elsewhere is not ready.

Promises: `listen` never raises but for its own cancellation, and never blocks the event loop. A message is at most 16
MiB, and 1,000 wait at most; more than that are lost, which is noticed. Whenever something was missed (a gap in the
numbers, a connection lost, a message that cannot be read) what was known is forgotten; see `Residency`. An engine that
just stopped talking is noticed in 15 s.

The publisher must be bound: vLLM needs a `*` in its endpoint for that (`tcp://*:5557`). With data parallelism each rank
publishes on a port of its own: name them all, with commas. A request with `vllm_xargs: {"kv_cache_report_mode":
"full"}` makes vLLM tell all the blocks that it reuses, which mends what was missed of them.
"""

import asyncio
import logging
import re
from collections.abc import Sequence
from typing import Any

import msgspec
import zmq
import zmq.asyncio
import zmq.utils.monitor

from kvprefetch.errors import SettingsError
from kvprefetch.gateway.residency import Blocks, Residency

log = logging.getLogger(__name__)

_MAX_MESSAGE_BYTES, _MAX_WAITING = 16 * 2**20, 1_000
_BEAT_MS, _DEAD_MS = 5_000, 15_000
_RECONNECT_MS, _RECONNECT_MAX_MS = 100, 5_000
_DEVICE = ("GPU", None)  # None: from before there were others

BlockHash = int | bytes


class Event(msgspec.Struct, tag=True, gc=False):
    """One thing that happened in the cache. Fields that are not named here are skipped."""


class BlockStored(Event):
    """A run of blocks, each the next one's parent."""

    block_hashes: list[BlockHash]
    parent_block_hash: BlockHash | None
    token_ids: list[int]
    block_size: int
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[list[Any] | None] | None = None  # for each block: adapter, images, salt (of the first), embeddings
    group_idx: int | None = None
    locality: str | None = None


class BlockRemoved(Event):
    """They are gone from `medium`."""

    block_hashes: list[BlockHash]
    medium: str | None = None
    locality: str | None = None


class AllBlocksCleared(Event):
    """The whole cache was emptied."""


class Batch(msgspec.Struct, array_like=True, gc=False):
    """The events of one step of the engine."""

    ts: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]
    data_parallel_rank: int | None = None


_decoder = msgspec.msgpack.Decoder(Batch)


def take(residency: Residency, message: Sequence[bytes]) -> None:
    """Tell `residency` of a message. One that cannot be read may have said anything, so that all is forgotten."""
    try:
        _, seq, payload = message
        batch = _decoder.decode(payload)
        blocks = residency.message(batch.data_parallel_rank or 0, int.from_bytes(seq, "big"))
        if blocks is not None:
            for event in batch.events:
                _tell(blocks, event)
    except (ValueError, OverflowError, msgspec.MsgspecError) as error:
        log.warning(
            "a KV event cannot be read (%s): all that was known of the cache is forgotten", type(error).__name__
        )
        residency.forget()


def _tell(blocks: Blocks, event: BlockStored | BlockRemoved | AllBlocksCleared) -> None:
    if isinstance(event, AllBlocksCleared):
        blocks.cleared()
    elif event.medium not in _DEVICE or event.locality == "REMOTE":
        pass
    elif isinstance(event, BlockRemoved):
        blocks.removed(event.block_hashes)
    else:
        blocks.stored(
            event.block_hashes,
            event.parent_block_hash,
            event.token_ids,
            event.block_size,
            adapter=event.lora_name or "",
            extras=event.extra_keys,
            group=event.group_idx or 0,
        )


class Listener:
    """Hears one engine. Its `residency` is for reading, in the event loop of `listen`.

    Raises SettingsError where an address is none.
    """

    def __init__(self, addresses: str, residency: Residency | None = None) -> None:
        self.residency = residency or Residency()
        self.addresses = [address.strip() for address in addresses.split(",")]
        for address in self.addresses:
            if not re.fullmatch(r"tcp://[^*/\s]+:\d{1,5}|ipc://\S+", address):
                raise SettingsError(f"kv_events {address!r}: write tcp://HOST:PORT, where the engine publishes")

    async def listen(self) -> None:
        """Hear the engine until cancelled. It may start later, stop and come back."""
        while True:
            try:
                await self._hear()
            except Exception:
                log.exception("KV events from %s", ", ".join(self.addresses))
            self.residency.forget()
            await asyncio.sleep(_RECONNECT_MAX_MS / 1e3)

    async def _hear(self) -> None:
        context = zmq.asyncio.Context()
        socket = context.socket(zmq.SUB)
        try:
            monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
            self._connect(socket)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._watch(monitor))
                while True:
                    take(self.residency, await socket.recv_multipart())
                    await asyncio.sleep(0)  # let others go first: what waits is there at once
        finally:
            socket.disable_monitor()
            context.destroy(linger=0)

    def _connect(self, socket: zmq.asyncio.Socket) -> None:
        for option, value in (
            (zmq.RCVHWM, _MAX_WAITING),
            (zmq.MAXMSGSIZE, _MAX_MESSAGE_BYTES),
            (zmq.HEARTBEAT_IVL, _BEAT_MS),
            (zmq.HEARTBEAT_TIMEOUT, _DEAD_MS),
            (zmq.RECONNECT_IVL, _RECONNECT_MS),
            (zmq.RECONNECT_IVL_MAX, _RECONNECT_MAX_MS),
            (zmq.IPV6, 1),
        ):
            socket.setsockopt(option, value)
        socket.subscribe(b"")
        for address in self.addresses:
            socket.connect(address)

    async def _watch(self, monitor: zmq.asyncio.Socket) -> None:
        """What is said while a connection is down is missed."""
        while True:
            event = zmq.utils.monitor.parse_monitor_message(await monitor.recv_multipart())
            if event["event"] == zmq.EVENT_DISCONNECTED:
                self.residency.forget()
