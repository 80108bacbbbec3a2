"""The policies side by side on replayed traces: how far kvprefetch comes from reactive towards what an oracle gains.

    python bench/policies.py DATA --json bench/results/policies.json --picture bench/results/policies.png

DATA is a folder of JSON lines files (`.jsonl` or `.jsonl.gz`); all of a known format are taken: agent sessions of
kv-cache-tester (`id`, `block_size`, `requests`), Mooncake's requests (`timestamp`, `hash_ids`), and navigation traces
(as for `predict.py`). The machine is an 8B model on one H200 with 880k tokens of KV on the GPU and 8 × as many on the
host; 16 sessions are alive on average, prefill takes turns in slices, and signals have recall .9, precision .9 and a
lead of 5 s. Arrivals and signals are drawn: figures are medians over the seeds, rows are single runs.

Figures end in the trace's name; without it, they are those of agent_sessions (or the first file of its format), and
for navigation and eviction the worst over traces. In replays of sessions speculation only moves what was computed
before, and takes no GPU time: `speculative_waste` is of navigation.
"""

import argparse
import os
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

from policies_figures import FRONTIER, NEEDED, Figures, grid, machines, navigation, requests, sessions
from policies_plot import plot
from policies_runs import NAVIGATION, REQUESTS, SESSIONS, Runner, stem, traces_of
from results_format import Results, hardware

from kvprefetch.errors import KVPrefetchError

MAIN = "agent_sessions"
"""The trace whose figures are given without its name, where there is one of that name."""
WORST: dict[str, Callable[[list[float]], float]] = {
    "navigation_gain_share": min,
    "navigation_computed_per_useful": max,
    "speculative_waste": max,
}


def main() -> None:
    """Run all sections; what a section found is written before the next one begins."""
    options = _options()
    print(hardware())
    results = Results("policies", seed=options.seeds[0])
    try:
        traces = traces_of(options.data)
        runner = Runner(options.processes, results)
        run(runner, traces, options)
        runner.close()
    except KVPrefetchError as error:
        sys.exit(f"bench/policies.py: {error}")
    print()
    for name, value in sorted(results.figures.items()):
        print(f"{name:<60}{value:>12.4f}")


def run(runner: Runner, traces: dict[str, list[Path]], options: argparse.Namespace) -> None:
    """All sections, the ones that goals are set for first."""
    figures, versus = runner.results.figures, dict[str, float]()

    def found(new: Figures, name: str = "", over_lru: float = 1.0) -> None:
        figures.update(new)
        if name:
            versus[name] = figures[f"by_index_over_lru_{name}"] = over_lru
            figures["worst_vs_lru"] = min(versus.values())
        figures.update(unsuffixed(figures, traces))
        runner.write(options.json)

    agents = in_order(traces[SESSIONS])
    for path in agents[:1]:
        found(*_named(path, sessions(runner, path, options.seeds, FRONTIER)))
        if options.picture:
            plot(runner.results.rows, stem(path), options.picture)
    for path in traces[NAVIGATION]:
        found(navigation(runner, path, options.seeds))
    for path in traces[REQUESTS]:
        found(*_named(path, requests(runner, path, options.seeds[0])))
    for path in agents[1:]:
        found(*_named(path, sessions(runner, path, options.seeds, NEEDED)))
    for path, machine in product(agents[:1], machines(options.quick)):
        worst = grid(runner, path, options.seeds[0], machine, options.quick)
        found({name: max(ratio, figures.get(name, 0.0)) for name, ratio in worst.items()})


def in_order(paths: list[Path]) -> list[Path]:
    """The trace whose figures come without its name first."""
    return sorted(paths, key=lambda path: (stem(path) != MAIN, path))


def unsuffixed(figures: Figures, traces: dict[str, list[Path]]) -> Figures:
    """The figures without a trace's name that follow from those with one."""
    found: Figures = {}
    for path in in_order(traces[SESSIONS])[:1]:
        ending = f"_{stem(path)}"
        found |= {
            name.removesuffix(ending): value
            for name, value in figures.items()
            if name.endswith(ending) and not name.startswith(("belady", "by_index"))
        }
    for name, worst in WORST.items():
        values = [figures[key] for key in (f"{name}_{stem(path)}" for path in traces[NAVIGATION]) if key in figures]
        if values:
            found[name] = worst(values)
    return found


def _named(path: Path, found: tuple[Figures, float]) -> tuple[Figures, str, float]:
    return found[0], stem(path), found[1]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the traces")
    parser.add_argument("--json", type=Path, help="write the results here, after every section")
    parser.add_argument("--picture", type=Path, help="write the chart here, a PNG")
    parser.add_argument("--seeds", type=_seeds, default=[0, 1, 2], help="of what is drawn (default 0,1,2)")
    parser.add_argument("--quick", action="store_true", help="the first seed alone, and a small grid")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="at once (default: one per core)")
    options = parser.parse_args()
    if options.quick:
        options.seeds = options.seeds[:1]
    return options


def _seeds(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
