"""The cache service: look-ups, copies out of the arena, reads from other nodes and Redis, two workers, earlier benches.

    python bench/service.py --json bench/results/service.json       # 7 minutes on 2 cores

All processes are real ones, started here, on this machine alone. What cannot be measured for want of something (a
`redis-benchmark`, a model) is said and left out; its figure is missing then.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from results_format import Results, hardware
from service_arena import arena_rates
from service_lookup import look_ups
from service_node import Absent
from service_read import node_reads
from service_redis import redis_reads
from service_ttft import ttft_with_service
from service_workers import two_workers
from ttft_models import Texts, cpu_model

from kvprefetch.demo.model import find_model
from kvprefetch.errors import UnknownModel

SECTIONS = ("look-ups", "arena", "nodes", "redis", "workers", "earlier")
_GOALS = {
    "lookup_2048_ms_p50": "≤ 1",
    "lookup_2048_ms_p99": "≤ 5",
    "arena_over_memcpy": "≥ 0.8",
    "arena_over_memcpy_checksum": "≥ 0.5",
    "node_read_over_socket": "≥ 0.55",
    "redis_read_over_benchmark": "≥ 0.7",
    "second_worker_over_cold_2048": "≤ 0.15",
}


def run(sections: list[str], model: str | None, results: Results) -> None:
    """Measure these sections, one after the other."""
    work: dict[str, Callable[[], None]] = {
        "look-ups": lambda: look_ups(results, results.seed),
        "arena": lambda: _in_shared_memory(lambda folder: arena_rates(folder, results)),
        "nodes": lambda: node_reads(results, results.seed),
        "redis": lambda: redis_reads(results),
    }
    for name in SECTIONS:
        if name in work and name in sections:
            _section(name, work[name], results)
    if {"workers", "earlier"} & set(sections):
        _section("models", lambda: _with_model(sections, model, results), results)


def _with_model(sections: list[str], model: str | None, results: Results) -> None:
    try:
        source = find_model(model)
    except UnknownModel as error:
        raise Absent(str(error)) from error
    loaded = cpu_model(source, "float32")
    texts = Texts(loaded, results.seed)
    if "workers" in sections:
        _section("workers", lambda: two_workers(source, texts, results), results)
    if "earlier" in sections:
        _section("earlier", lambda: ttft_with_service(loaded, texts, results), results)


def _section(name: str, work: Callable[[], None], results: Results) -> None:
    print(f"-- {name}", flush=True)
    began, others = time.monotonic(), _others_s()
    note: dict[str, Any] = {"section": "conditions", "of": name}
    try:
        work()
    except Absent as error:
        print(f"{name}: not measured: {error}", flush=True)
        note["not_measured"] = str(error)
    seconds = time.monotonic() - began
    share = max(_others_s() - others, 0.0) / (seconds * (os.cpu_count() or 1))
    print(f"-- {name}: {seconds:.0f} s, in which others used {share:.0%} of the processors", flush=True)
    results.rows.append({**note, "seconds": round(seconds, 1), "others_share_of_processors": round(share, 3)})


def _others_s() -> float:
    """Seconds of all processors that were used by none of ours; ours count once they have ended."""
    used = psutil.cpu_times()
    return float(sum(used) - used.idle - getattr(used, "iowait", 0.0) - sum(os.times()[:4]))


def _in_shared_memory(work: Callable[[Path], None]) -> None:
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="kvprefetch-bench-", dir=shared if shared.is_dir() else None) as folder:
        work(Path(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", help="instead of SmolLM2: a folder, GGUF file or hub id")
    parser.add_argument("--only", help=f"some of {','.join(SECTIONS)}")
    options = parser.parse_args()
    sections = options.only.split(",") if options.only else list(SECTIONS)
    if unknown := set(sections) - set(SECTIONS):
        sys.exit(f"--only {','.join(sorted(unknown))}: there is {','.join(SECTIONS)}")
    print(hardware())
    results = Results("service", options.seed)
    run(sections, options.model, results)
    for name, goal in _GOALS.items():
        found = results.figures.get(name)
        print(f"{name:32} {'not measured' if found is None else f'{found:.4f}':>12}   asked: {goal}")
    if options.json:
        results.write(options.json)


if __name__ == "__main__":
    main()
