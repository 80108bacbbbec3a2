"""Tenants that share memory and engine: what fairness protects, and what it costs.

python bench/fairness.py DATA --json bench/results/fairness.json --picture bench/results/fairness.png
"""

import argparse
import os
import sys
from pathlib import Path

from fairness_runs import ENGINE, MEMORY, QUIET, Runner, Setting, Task, find_traces
from results_format import Results, hardware

from kvprefetch.errors import KVPrefetchError


def main() -> None:
    options = _options()
    print(hardware())
    results = Results("fairness", seed=options.seeds[0])
    try:
        traces = find_traces(options.data)
        runner = Runner(options.processes, results)
        for path in (traces.sessions, *([traces.requests] if options.all and traces.requests else [])):
            horizon = options.hours * 3600 if path == traces.sessions else 3600.0
            for k in options.k:
                settings = [
                    Setting(path, traces.kind_of(path), traces.rates, k, seed, horizon) for seed in options.seeds
                ]
                scenes = [(QUIET, 0.0), (MEMORY, 0.5), *([(ENGINE, 0.1), (ENGINE, 0.5)] if options.engine else [])]
                tasks = [Task(s, p, *scene) for s in settings for p in options.policies for scene in scenes]
                runner.run(f"K = {k}", tasks)
        runner.write(options.json)
        runner.close()
    except KVPrefetchError as error:
        sys.exit(f"bench/fairness.py: {error}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the traces")
    parser.add_argument("--json", type=Path, help="write the results here, after every section")
    parser.add_argument("--picture", type=Path, help="write the chart here, a PNG")
    parser.add_argument("--seeds", type=_numbers, default=[0, 1, 2], help="of what is drawn (default 0,1,2)")
    parser.add_argument("--k", type=_numbers, default=[4, 16, 64], help="tenants (default 4,16,64)")
    parser.add_argument("--policies", type=lambda text: text.split(","), default=["reactive", "maxmin", "static"])
    parser.add_argument("--hours", type=float, default=24.0, help="of each run, virtual (default 24)")
    parser.add_argument("--engine", action="store_true")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--quick", action="store_true", help="the first seed and 16 tenants alone")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="at once (default: one per core)")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.k = options.seeds[:1], [16] if 16 in options.k else options.k[:1]
    return options


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
