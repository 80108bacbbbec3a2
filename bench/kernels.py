"""Paged copies against torch's index operations and the driver's own copies, across fragment sizes.

    python bench/kernels.py --json bench/results/kernels.json
    compute-sanitizer --tool memcheck python -m pytest tests/kernels -k "not compile"  # and racecheck

Without a CUDA device host to host alone is measured. A fraction is the bytes moved per second (within one memory
read and written, over the bus once) over what large copies in the same direction reach on this machine in this run.
Calls are queued one behind the other, with their lists prepared, over 2 GiB of pages taken in random order: past any
cache. Every method must have moved the right bytes before it is timed, and `tests/kernels` must be green first. Ends
with the table that belongs into `kvprefetch/ops/copy.py`, then the figures of compaction (see `compaction.py`).
"""

import argparse
import random
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from compaction import compaction
from kernels_beside import beside_products
from kernels_timing import peaks, seconds_each, side_by_side
from kvprefetch_kernels.copy import copy_pages_reference, prepare_copy
from kvprefetch_kernels.pages import Pages, describe
from results_format import Results, hardware

from kvprefetch.ops import copy as ops
from kvprefetch.ops.driver import prepare_by_driver

KIB = 1024
FRAGMENTS = tuple(KIB * n for n in (2, 4, 8, 16, 28, 64, 256, 2048))
DIRECTIONS = {"h2h": ("cpu", "cpu"), "d2d": ("cuda", "cuda"), "h2d": ("cpu", "cuda"), "d2h": ("cuda", "cpu")}
POOL = 2**30  # bytes on each side
LISTS = 4  # page lists that the timed calls take in turn; together they are the whole pool
CAPS = (4, 8, 12)
OURS = {"h2h": "index", "d2d": "kernel", "h2d": "kernel_12_sms", "d2h": "kernel_12_sms"}
Prepare = Callable[[Pages, Pages, list[int], list[int]], Callable[[], None]]
METHODS: dict[str, Prepare] = {
    "kernel": prepare_copy,
    **{f"kernel_{cap}_sms": partial(prepare_copy, max_sms=cap) for cap in CAPS},
    "index": lambda *four: partial(copy_pages_reference, *four),
    "batch": partial(prepare_by_driver, batched=True),
    "runs": partial(prepare_by_driver, batched=False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    tests = Path(__file__).parents[1] / "tests" / "kernels"
    if subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", str(tests)], check=False).returncode:
        sys.exit("the kernels' tests fail: no speed is reported")
    print(hardware())
    results, draw, best = Results("kernels", options.seed), random.Random(options.seed), peaks()
    print({name: f"{rate / 1e9:.1f} GB/s" for name, rate in best.items()}, flush=True)
    if "h2h" in best:
        print("no CUDA device here: host to host alone is measured")
    for name in best:
        for fragment in FRAGMENTS:
            row = fractions(name, fragment, best[name], draw)
            results.rows.append(row)
            print(row, flush=True)
            if name != "both":
                results.figures[f"{name}_fraction_{fragment}"] = row[OURS[name]]
    results.figures["dispatch_worst_ratio"] = max(row["best_over_ops"] for row in results.rows)
    print("measured table:", crossings(results.rows))
    if torch.cuda.is_available():
        measure_more(results, best, draw, options.seed)
    print(results.figures)
    if options.json:
        results.write(options.json)


def measure_more(results: Results, best: dict[str, float], draw: random.Random, seed: int) -> None:
    """Copies beside a matrix product, and compaction."""
    beside = beside_products(best["h2d"], draw, CAPS)
    results.rows += beside
    results.figures["matmul_loss"] = next(row["matmul_loss"] for row in beside if row["sms"] == CAPS[-1])
    rows, figures = compaction(torch.device("cuda"), seed)
    results.rows += rows
    results.figures |= figures


def fractions(name: str, fragment: int, peak: float, draw: random.Random) -> dict[str, Any]:
    """Each method's share of the peak; how far what `ops` picks is from the best of them."""
    count = POOL // fragment // LISTS
    ways = [DIRECTIONS[name]] if name in DIRECTIONS else [DIRECTIONS["h2d"], DIRECTIONS["d2h"]]
    pools = [(pool(source, LISTS * count, fragment), pool(target, LISTS * count, fragment)) for source, target in ways]
    lists = [lists_of(LISTS * count, count, draw) for _ in pools]
    moved = count * fragment * (1 if name in ("h2d", "d2h") else 2)
    row: dict[str, Any] = {"direction": name, "fragment": fragment, "peak_gb_s": round(peak / 1e9, 1)}
    for method, prepare in METHODS.items():
        if name == "h2h" and method not in ("index", "runs"):
            continue
        if name == "both" and method == "index":
            continue  # it waits for the device, so there is no side by side
        for sides, order in zip(pools, lists, strict=True):
            prove(method, prepare, *sides, *order[0])
        calls = [[prepare(*sides, *one) for one in order] for sides, order in zip(pools, lists, strict=True)]
        queued = calls[0] if len(calls) == 1 else [side_by_side(*pair) for pair in zip(*calls, strict=True)]
        rounds = 2 if method in ("index", "runs") else 7
        row[method] = round(moved / seconds_each(queued, rounds) / peak, 4)
    chosen = ops.method(*pools[0], *lists[0][0])
    if chosen == "kernel" and name != "d2d":
        chosen = f"kernel_{ops.BUS_SMS}_sms"
    row["ops"] = chosen
    row["best_over_ops"] = round(max(row[method] for method in METHODS if method in row) / row[chosen], 4)
    return row


def pool(device: str, pages: int, fragment: int) -> Pages:
    pinned = device == "cpu" and torch.cuda.is_available()
    return describe(torch.empty((pages, fragment), dtype=torch.uint8, device=device, pin_memory=pinned))


def lists_of(pages: int, count: int, draw: random.Random) -> list[tuple[list[int], list[int]]]:
    """All pages in random order, cut into pairs of source and target lists."""
    taken, given = (draw.sample(range(pages), pages) for _ in range(2))
    return [(taken[at : at + count], given[at : at + count]) for at in range(0, pages, count)]


def prove(method: str, prepare: Prepare, source: Pages, target: Pages, taken: list[int], given: list[int]) -> None:
    """Exit unless the method does what it should, on random bytes into poison."""
    for plane in source.planes:
        plane.random_(0, 256)
    for plane in target.planes:
        plane.fill_(255)
    prepare(source, target, taken, given)()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    (found,), (expected,) = target.planes, source.planes
    if not torch.equal(found[given].cpu(), expected[taken].cpu()):
        sys.exit(f"{method} moved other bytes than it should: no times are reported")


def crossings(rows: list[dict[str, Any]]) -> dict[str, int]:
    """For each direction the largest fragment up to which our method is no slower than the driver's at every size."""
    table = {}
    for name in dict.fromkeys(row["direction"] for row in rows if row["direction"] in OURS):
        mine, ours = [row for row in rows if row["direction"] == name], OURS[name]
        theirs = "runs" if name == "h2h" else "batch"
        behind = min((row["fragment"] for row in mine if row[ours] < row[theirs]), default=2**40)
        table[name] = max((row["fragment"] for row in mine if row["fragment"] < behind), default=0)
    return table


if __name__ == "__main__":
    main()
