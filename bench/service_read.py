"""Blocks from one node to another over loopback TCP, beside a raw socket that moves as many bytes.

Two processes each, in turns in one run, into the same memory, which was touched before. Ours is a real service's
`Cache.Read`, taken in by what its own nodes use (`service/peers.py`), which copies every block to its slot and verifies
it; the raw socket does neither. `batched` asks again for every 32 blocks, as bringing blocks into an arena does.
"""

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

from results_format import Results
from service_arena import SHAPES
from service_client import Registered, chain
from service_node import Node
from service_socket import receive

from kvprefetch.service import peers
from kvprefetch.service.peers import Peers, Take
from kvprefetch.settings import RedisSettings

TOTAL_BYTES = 256 * 2**20
_BATCH = 32
_WAYS = ("socket", "read", "batched")


class Reader:
    """Our side of the reading, and the raw socket's, into one stretch of memory."""

    def __init__(self, address: str, namespace: str, keys: Sequence[bytes], block_bytes: int, raw_port: int) -> None:
        self.address, self.namespace, self.keys, self.block_bytes = address, namespace, keys, block_bytes
        self.memory = memoryview(bytearray(len(keys) * block_bytes))
        self.views = [self.memory[at * block_bytes : (at + 1) * block_bytes] for at in range(len(keys))]
        peers.PATIENCE_S = 5.0  # here a frame that takes long is a figure, not a failure
        self.peers = Peers(RedisSettings(), time.monotonic)
        self.threads = ThreadPoolExecutor(2)
        self.raw = socket.create_connection(("127.0.0.1", raw_port))

    async def seconds(self, way: str) -> float:
        """One time, all bytes."""
        began = time.perf_counter()
        if way == "socket":
            receive(self.raw, self.memory)
        else:
            step = len(self.keys) if way == "read" else _BATCH
            for at in range(0, len(self.keys), step):
                await self._read(at, at + step)
        return time.perf_counter() - began

    async def close(self) -> None:
        """Let go of all connections."""
        self.raw.close()
        await self.peers.close()
        self.threads.shutdown()

    async def _read(self, first: int, end: int) -> None:
        take = Take(self.views[first:end], self.block_bytes, self.threads)
        why = await self.peers.read(self.address, self.namespace, self.keys[first:end], take)
        if why or take.is_corrupt or len(take.sums) != len(take.into):
            raise RuntimeError(f"only {len(take.sums)} of {len(take.into)} blocks came: {why or 'damaged'}")


def node_reads(results: Results, seed: int, rounds: int = 9) -> None:
    """A row for every size of block; the figure is the worst of them."""
    rows = []
    for name, shape in SHAPES.items():
        row = measure(shape.bytes, TOTAL_BYTES // shape.bytes, rounds, seed)
        rows.append({"section": "node to node", "blocks_of": name, **row})
        print(rows[-1], flush=True)
    results.rows += rows
    results.figures["node_read_over_socket"] = min(row["read_over_socket"] for row in rows)


def measure(block_bytes: int, blocks: int, rounds: int, seed: int) -> dict[str, Any]:
    """One size of block. Ratios are medians over the rounds, each of which runs all ways, beginning with another."""
    port = _free_port()
    tcp = f"127.0.0.1:{port}"
    size = str((blocks + 8) * (block_bytes + 8_192))
    with Node(size, listen=(tcp,), service="insecure_local = true") as node, node.serve():
        worker = Registered(node.address, block_bytes=block_bytes)
        keys = chain(blocks, seed)
        worker.fill(keys, os.urandom(block_bytes))
        sender = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("service_socket.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert sender.stdout is not None
            raw_port = int(sender.stdout.readline().rpartition(" ")[2])
            seconds = asyncio.run(_rounds(tcp, worker.place.namespace, keys, block_bytes, raw_port, rounds))
        finally:
            sender.kill()
            sender.wait()
            worker.close()
    return _row(block_bytes, blocks, seconds)


async def _rounds(
    address: str, namespace: str, keys: Sequence[bytes], block_bytes: int, raw_port: int, rounds: int
) -> dict[str, list[float]]:
    reader = Reader(address, namespace, keys, block_bytes, raw_port)
    seconds: dict[str, list[float]] = {way: [] for way in _WAYS}
    try:
        for turn in range(-1, rounds):
            for at in range(len(_WAYS)):
                way = _WAYS[(turn + at) % len(_WAYS)]
                took = await reader.seconds(way)
                if turn >= 0:  # the first round warms up
                    seconds[way].append(took)
    finally:
        await reader.close()
    return seconds


def _row(block_bytes: int, blocks: int, seconds: dict[str, list[float]]) -> dict[str, Any]:
    total = block_bytes * blocks
    row: dict[str, Any] = {"block_bytes": block_bytes, "blocks": blocks, "rounds": len(seconds["socket"])}
    row |= {f"{way}_gb_per_s": round(total / median(times) / 1e9, 3) for way, times in seconds.items()}
    for way in ("read", "batched"):
        ratios = [a / b for a, b in zip(seconds["socket"], seconds[way], strict=True)]
        row[f"{way}_over_socket"] = round(median(ratios), 4)
    return row


def _free_port() -> int:
    """One that nobody uses now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
