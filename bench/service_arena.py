"""Arena → device pool on a CPU, beside plain `memcpy` of the same bytes: what verifying and the reader's protocol cost.

Both are timed in turns in one run, in memory that was touched before. The load is the worker's own, `Host.load` into
the pages of a `DevicePool`; `memcpy` is `ctypes.memmove`, block by block out of the same slots into the same pages, and
`memcpy_whole` one call for as many bytes between two ordinary buffers.
"""

import ctypes
import os
import random
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from results_format import Results

from kvprefetch.tiers.arena import ArenaFile
from kvprefetch.tiers.checksum import checksum
from kvprefetch.tiers.contract import Incoming
from kvprefetch.tiers.device import DevicePool, PageShape
from kvprefetch.tiers.host import HostTier
from kvprefetch.tiers.mapped import address_of
from kvprefetch.worker.host import Found, Host

SHAPES = {
    "SmolLM2-135M, bfloat16": PageShape(30, 3, 64, 32, torch.bfloat16),
    "SmolLM2-135M, float32": PageShape(30, 3, 64, 32, torch.float32),
    "Llama-3.1-8B, bfloat16": PageShape(32, 8, 128, 32, torch.bfloat16),
}
TOTAL_BYTES = 256 * 2**20  # far more than any cache holds
_WAYS = ("memcpy", "memcpy_whole", "load", "load_checksum")


def arena_rates(folder: Path, results: Results, rounds: int = 15) -> None:
    """A row for every size of block; the figures are the worst of them."""
    for name, shape in SHAPES.items():
        row = measure(folder, shape, TOTAL_BYTES // shape.bytes, rounds)
        results.rows.append({"section": "arena", "blocks_of": name, **row})
        print(results.rows[-1], flush=True)
    rows = [row for row in results.rows if row["section"] == "arena"]
    results.figures["arena_over_memcpy"] = min(row["load_over_memcpy"] for row in rows)
    results.figures["arena_over_memcpy_checksum"] = min(row["load_checksum_over_memcpy"] for row in rows)


def measure(folder: Path, shape: PageShape, blocks: int, rounds: int) -> dict[str, Any]:
    """One size of block. Ratios are medians over the rounds, each of which runs all ways, beginning with another."""
    tier = HostTier(ArenaFile.create(folder / "copies.arena", "bench", shape.bytes, blocks), time.monotonic)
    try:
        keys = _fill(tier, blocks)
        pool = DevicePool(shape, blocks, torch.device("cpu"))
        pool.tensor.zero_()  # its memory is there from now on
        ways = _ways(
            ArenaFile.attach(folder / "copies.arena", "bench"), pool, keys, tier.longest(b"".join(keys)).numbers()
        )
        seconds: dict[str, list[float]] = {way: [] for way in _WAYS}
        for turn in range(-1, rounds):
            for at in range(len(_WAYS)):
                way = _WAYS[(turn + at) % len(_WAYS)]
                began = time.perf_counter()
                ways[way]()
                if turn >= 0:  # the first round warms up
                    seconds[way].append(time.perf_counter() - began)
    finally:
        tier.close()
        (folder / "copies.arena").unlink()
    return _row(shape.bytes, blocks, seconds)


def _fill(tier: HostTier, blocks: int) -> list[bytes]:
    """A sequence of random blocks; its keys."""
    keys = [secrets.token_bytes(32) for _ in range(blocks)]
    for at, key in enumerate(keys):
        data = memoryview(bytearray(os.urandom(tier.block_bytes)))
        parent = keys[at - 1] if at else b""
        if tier.store([Incoming(key, parent, "bench", data, checksum(data))]) != 1:
            raise RuntimeError("the arena does not take its own number of blocks")
    return keys


def _ways(arena: ArenaFile, pool: DevicePool, keys: list[bytes], slots: list[int]) -> dict[str, Callable[[], None]]:
    """The copies to be timed. Pages lie in another order than slots, as they do in a pool that was used."""
    host = Host(None, pool, time.monotonic, lambda found: None)  # type: ignore[arg-type]  # nothing is looked up
    pages = random.Random(0).sample(range(pool.pages), pool.pages)
    size = arena.block_bytes
    moves = [
        (address_of(host.page(page)), address_of(arena.slot(slot)), size)
        for page, slot in zip(pages, slots, strict=True)
    ]
    source, target = (torch.ones(size * len(pages), dtype=torch.uint8) for _ in range(2))

    def memcpy() -> None:
        for to, out_of, count in moves:
            ctypes.memmove(to, out_of, count)

    def memcpy_whole() -> None:
        ctypes.memmove(target.data_ptr(), source.data_ptr(), size * len(pages))

    def load(verify: bool) -> None:
        host.verify = verify
        if host.load(Found(keys, slots, arena=arena), 0, pages) != len(pages):
            raise RuntimeError("a block was not as it was stored")

    return {
        "memcpy": memcpy,
        "memcpy_whole": memcpy_whole,
        "load": lambda: load(False),
        "load_checksum": lambda: load(True),
    }


def _row(block_bytes: int, blocks: int, seconds: dict[str, list[float]]) -> dict[str, Any]:
    total = block_bytes * blocks
    row: dict[str, Any] = {"block_bytes": block_bytes, "blocks": blocks, "rounds": len(seconds["memcpy"])}
    row |= {f"{way}_gb_per_s": round(total / median(times) / 1e9, 2) for way, times in seconds.items()}
    for way in ("load", "load_checksum"):
        for other in ("memcpy", "memcpy_whole"):
            ratios = [a / b for a, b in zip(seconds[other], seconds[way], strict=True)]
            row[f"{way}_over_{other}"] = round(median(ratios), 4)
    return row
