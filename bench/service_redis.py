"""Blocks out of a Redis on this machine through the Redis tier, beside `redis-benchmark` reading values of that size.

In turns in one run, from one server, as many keys each; every one of our blocks is verified and copied to memory that
was touched before. `redis-benchmark` runs with its 50 connections, as it comes, and with 4, where it is faster; a
round's ratio is to the faster of the two.
"""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from statistics import median
from typing import Any

from results_format import Results
from service_node import Absent

from kvprefetch.settings import RedisSettings
from kvprefetch.tiers.checksum import checksum
from kvprefetch.tiers.contract import Incoming
from kvprefetch.tiers.redis import RedisTier

SIZES = (737_280, 1_474_560)  # bytes of a block: 32 tokens of SmolLM2-135M in float16 and float32
BLOCKS = 64
ROUNDS = 9
CONNECTIONS = (50, 4)


def redis_reads(results: Results) -> None:
    """A row for every size of block; the figure is the worst of them. Raises Absent."""
    results.figures["redis_read_over_benchmark"] = redis_read(results.rows)


def redis_read(rows: list[dict[str, Any]]) -> float:
    """Add a row for every size of block; returns the worst ratio of ours to `redis-benchmark`. Raises Absent."""
    ratios = []
    for block_bytes in SIZES:
        row = {"section": "redis", **measure(block_bytes)}
        print(row, flush=True)
        rows.append(row)
        ratios.append(float(row["read_over_benchmark"]))
    return min(ratios)


def measure(block_bytes: int, rounds: int = ROUNDS) -> dict[str, Any]:
    """One size of block. Figures are medians over the rounds."""
    rates: dict[str, list[float]] = {"ours": [], **{f"benchmark_{n}": [] for n in CONNECTIONS}}
    with _serving() as port:
        tier = RedisTier(RedisSettings(url=f"redis://127.0.0.1:{port}", timeout_s=10.0), "0" * 16, block_bytes)
        keys = _fill(tier)
        _benchmark(port, "set", block_bytes, CONNECTIONS[-1], 10 * BLOCKS)
        into = [memoryview(bytearray(block_bytes)) for _ in keys]
        for turn in range(-1, rounds):
            found = {"ours": _ours(tier, keys, into)}
            for connections in CONNECTIONS:
                found[f"benchmark_{connections}"] = _benchmark(port, "get", block_bytes, connections, 8 * BLOCKS)
            if turn >= 0:  # the first round warms up
                for name, rate in found.items():
                    rates[name].append(rate)
        tier.close()
    return _row(block_bytes, rates)


def _row(block_bytes: int, rates: dict[str, list[float]]) -> dict[str, Any]:
    row: dict[str, Any] = {"block_bytes": block_bytes, "blocks": BLOCKS, "rounds": len(rates["ours"])}
    row |= {f"{name}_gb_per_s": round(median(found) / 1e9, 3) for name, found in rates.items()}
    others = [rates[f"benchmark_{n}"] for n in CONNECTIONS]
    faster = [max(pair) for pair in zip(*others, strict=True)]
    row["read_over_benchmark"] = round(median(a / b for a, b in zip(rates["ours"], faster, strict=True)), 4)
    usual = rates[f"benchmark_{CONNECTIONS[0]}"]
    row["read_over_usual_benchmark"] = round(median(a / b for a, b in zip(rates["ours"], usual, strict=True)), 4)
    return row


def _fill(tier: RedisTier) -> list[bytes]:
    blocks = []
    for n in range(BLOCKS):
        data = os.urandom(tier.block_bytes)
        blocks.append(Incoming(sha256(b"block %d" % n).digest(), b"", "bench", memoryview(data), checksum(data)))
    if tier.store(blocks) != BLOCKS:
        raise RuntimeError("Redis does not take the blocks")
    return [block.key for block in blocks]


def _ours(tier: RedisTier, keys: Sequence[bytes], into: Sequence[memoryview]) -> float:
    """Bytes a second."""
    times = 4
    began = time.perf_counter()
    for _ in range(times):
        if tier.load(keys, into) != len(keys):
            raise RuntimeError("blocks are missing")
    return times * len(keys) * tier.block_bytes / (time.perf_counter() - began)


def _benchmark(port: int, test: str, value_bytes: int, connections: int, requests: int) -> float:
    """Bytes a second, as `redis-benchmark` has it."""
    program = shutil.which("redis-benchmark")
    if program is None:
        raise Absent("there is no redis-benchmark on the PATH (Debian: apt-get install redis-tools)")
    options = {"-p": port, "-t": test, "-d": value_bytes, "-c": connections, "-n": requests, "-r": BLOCKS}
    words = [str(part) for option in options.items() for part in option]
    said = subprocess.run([program, *words, "--csv"], capture_output=True, text=True, check=True, timeout=300).stdout
    line = next(line for line in said.splitlines() if line.lower().startswith(f'"{test}"'))
    return float(line.split(",")[1].strip('"')) * value_bytes


@contextmanager
def _serving() -> Iterator[int]:
    """The port of a server of our own, empty and without persistence. Raises Absent."""
    program = shutil.which("redis-server")
    if program is None:
        raise Absent("there is no redis-server on the PATH (Debian: apt-get install redis-server)")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    with tempfile.TemporaryDirectory() as folder:
        options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", folder]
        server = subprocess.Popen([program, *options], stdout=subprocess.DEVNULL)
        try:
            _await_port(port)
            yield port
        finally:
            server.kill()
            server.wait()


def _await_port(port: int) -> None:
    end = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.02)
