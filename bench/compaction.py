"""Compaction of a half-empty, scattered pool: how fast, what offloading costs before and after, what is given back.

    python bench/compaction.py --json bench/results/compaction.json          # on a CPU; `kernels.py` does it on a GPU

Block-major and layer-major pools, packed only and laid out in sequence order. The fraction is of what one large
copy reaches in the same memory in this run, bytes read and written. Offloading copies whole sequences to (pinned)
host memory, one copy for each run of neighbouring pages in each plane, and by whatever `ops` picks. Bytes given
back are counted by the device's or the system's own figures. Contents are compared before any time is reported.
"""

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from kvprefetch_kernels.checksum import checksum_pages_reference
from kvprefetch_kernels.pages import Pages, describe
from results_format import Results, hardware

from kvprefetch.cache.compact import Phase, ordering, packing, runs
from kvprefetch.ops.copy import copy_pages, method
from kvprefetch.ops.driver import copy_by_driver
from kvprefetch.tiers.segments import Segments, open_segments

BLOCK, HEADS, DIM = 32, 8, 128  # of Llama-3.1-8B: 128 KiB a layer and page
SEQUENCE = 64  # pages: 2,048 tokens
OFFLOADED = 4  # sequences
REPEATS = 5


@dataclass(frozen=True)
class Scattered:
    """A pool over memory of its own, half of its pages live, and where its sequences lie."""

    memory: Segments
    pool: Pages
    sequences: list[list[int]]

    @property
    def live(self) -> list[int]:
        return [page for sequence in self.sequences for page in sequence]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(hardware())
    results = Results("compaction", options.seed)
    results.rows, results.figures = compaction(torch.device(options.device), options.seed)
    print(results.figures)
    if options.json:
        results.write(options.json)


def compaction(device: torch.device, seed: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rows for both layouts and both plans; the figures are those of the layer-major pool laid out in order."""
    layers, pages = (32, 2048) if device.type == "cuda" else (8, 1024)
    rows = []
    for layout in ("block-major", "layer-major"):
        for order in (False, True):
            samples = [_measure(layout, layers, pages, device, order=order, seed=seed + n) for n in range(REPEATS)]
            row: dict[str, Any] = {"layout": layout, "plan": "ordered" if order else "packed"}
            row |= {name: _typical([sample[name] for sample in samples]) for name in samples[0]}
            rows.append(row)
            print(row, flush=True)
    hard = rows[-1]
    return rows, {
        "compaction_fraction": hard["fraction"],
        "descriptors_per_1k_tokens_before": hard["descriptors_per_1k_tokens_before"],
        "descriptors_per_1k_tokens_after": hard["descriptors_per_1k_tokens_after"],
        "offload_time_ratio": hard["offload_time_ratio"],
        "offload_time_ratio_ops": hard["offload_time_ratio_ops"],
        "bytes_given_back_share": hard["bytes_given_back"] / hard["pool_bytes"],
    }


def _typical(values: list[Any]) -> Any:
    return values[0] if isinstance(values[0], str) else round(median(values), 4)


def _measure(layout: str, layers: int, pages: int, device: torch.device, *, order: bool, seed: int) -> dict[str, Any]:
    draw = random.Random(seed)
    scattered = _scatter(layout, layers, pages, device, draw)
    pool, sequences = scattered.pool, scattered.sequences
    before = checksum_pages_reference(pool, scattered.live[:SEQUENCE]).tolist()
    found = _offload(pool, sequences)
    peak = _peak(device)
    phases = ordering(sequences, [], pages) if order else packing(scattered.live, [])
    moved = sum(map(len, phases)) * pool.page_bytes
    seconds = _timed(device, lambda: _carry_out(pool, phases))
    laid_out = _followed(sequences, phases)
    after = [page for sequence in laid_out for page in sequence]
    if checksum_pages_reference(pool, after[:SEQUENCE]).tolist() != before:
        sys.exit("compaction changed a page: no times are reported")
    then = _offload(pool, laid_out)
    per_1k = len(pool.planes) / (len(after) * BLOCK / 1000)
    return {
        "pool_bytes": pool.page_bytes * pages,
        "moved_bytes": moved,
        "phases": len(phases),
        "fraction": 2 * moved / seconds / peak,
        "run_length_before": len(after) / sum(map(runs, sequences)),
        "run_length_after": len(after) / sum(map(runs, laid_out)),
        "descriptors_per_1k_tokens_before": sum(map(runs, sequences)) * per_1k,
        "descriptors_per_1k_tokens_after": sum(map(runs, laid_out)) * per_1k,
        "offload_s_before": found["runs"],
        "offload_s_after": then["runs"],
        "offload_time_ratio": then["runs"] / found["runs"],
        "ops_before": method(pool, _staging(pool), sequences[0], range(SEQUENCE)),
        "ops_after": method(pool, _staging(pool), laid_out[0], range(SEQUENCE)),
        "offload_time_ratio_ops": then["ops"] / found["ops"],
        "bytes_given_back": _give_back(scattered, max(after) + 1, pages, device),
    }


def _scatter(layout: str, layers: int, pages: int, device: torch.device, draw: random.Random) -> Scattered:
    fragment = BLOCK * HEADS * DIM * 2
    memory = open_segments(pages * layers * 2 * fragment, device)
    memory.raw.fill_(1)
    whole = memory.raw.view(pages, layers * 2 * fragment) if layout == "block-major" else None
    pool = describe(whole if whole is not None else list(memory.raw.view(layers * 2, pages, fragment)))
    taken = draw.sample(range(pages), pages // 2)
    for plane in pool.planes:
        plane[:, 0] = torch.arange(pages, device=device) % 251  # so that pages differ
    return Scattered(memory, pool, [taken[at : at + SEQUENCE] for at in range(0, len(taken), SEQUENCE)])


def _carry_out(pool: Pages, phases: Sequence[Phase]) -> None:
    for phase in phases:
        copy_pages(pool, pool, [source for source, _ in phase], [target for _, target in phase])


def _followed(sequences: Sequence[Sequence[int]], phases: Sequence[Phase]) -> list[list[int]]:
    """Where the sequences' pages are after the moves."""
    at = {page: page for sequence in sequences for page in sequence}
    for phase in phases:
        moves = dict(phase)
        at = {page: moves.get(now, now) for page, now in at.items()}
    return [[at[page] for page in sequence] for sequence in sequences]


def _staging(pool: Pages) -> Pages:
    pinned = pool.device.type == "cuda"
    return describe([torch.empty((SEQUENCE, pool.fragment), dtype=torch.uint8, pin_memory=pinned) for _ in pool.planes])


def _offload(pool: Pages, sequences: Sequence[Sequence[int]]) -> dict[str, float]:
    """Seconds to copy the first sequences out: by the driver run by run, and by what `ops` picks."""
    staging, places = _staging(pool), range(SEQUENCE)

    def by_runs() -> None:
        for sequence in sequences[:OFFLOADED]:
            copy_by_driver(pool, staging, sequence, places, batched=True)

    def by_ops() -> None:
        for sequence in sequences[:OFFLOADED]:
            copy_pages(pool, staging, sequence, places)

    seconds = {}
    for name, work in (("runs", by_runs), ("ops", by_ops)):
        work()
        seconds[name] = median(_timed(pool.device, work) for _ in range(5))
    return seconds


def _give_back(scattered: Scattered, first: int, pages: int, device: torch.device) -> int:
    """Release every plane's pages from `first` on; what the device or the system says that it got."""
    pool, start = scattered.pool, scattered.memory.raw.data_ptr()
    before = _free_bytes(device)
    for plane in pool.planes:
        at = plane.data_ptr() - start
        scattered.memory.release(at + first * plane.stride(0), at + pages * plane.stride(0))
    return _free_bytes(device) - before


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    return -int(psutil.Process().memory_info().rss)


def _peak(device: torch.device) -> float:
    """Bytes read and written per second by one large copy."""
    source, target = (torch.ones(2**28, dtype=torch.uint8, device=device) for _ in range(2))
    target.copy_(source)
    return 2 * source.nbytes / median(_timed(device, lambda: target.copy_(source)) for _ in range(5))


def _timed(device: torch.device, work: Callable[[], object]) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
