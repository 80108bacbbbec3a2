"""Tenants that share memory and engine: what fairness protects, and what it costs.

    python bench/fairness.py DATA --json bench/results/fairness.json --picture bench/results/fairness.png

DATA is a folder of JSON lines files (`.jsonl` or `.jsonl.gz`), told by the keys of their first lines: agent sessions of
kv-cache-tester (`id`, `block_size`, `requests`) and clients' rates (`windows` of [s, requests/s, …]); Mooncake's
requests (`timestamp`, `hash_ids`) where there are any. Sessions are dealt to K tenants who come at the rates of
clients, 16 alive on average; pools are those of `policies.py`, an 8B model on one H200 with 880k tokens of KV on the
GPU and 8 × as many on the host. A flood of unique 65,536-token prompts comes from a third of the run to its half:
with an engine of its own, so that only memory is contended, or on the tenants' own. Everyone, the flood too, has an
equal guarantee. Who has which session is drawn: figures are medians over the seeds, rows are single runs.

Figures end in the number of tenants (without it: the worst of them) and, of baselines, in the policy's name.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import fairness_figures as sections
import isolation
from fairness_hints import false_hint_gain
from fairness_plot import plot
from fairness_pool import measure
from fairness_runs import ENGINE, MEMORY, QUIET, Runner, Task, Traces, find_traces
from policies_runs import stem
from results_format import Results, hardware

from kvprefetch.errors import KVPrefetchError


def main() -> None:
    """Run all sections; what a section found is written before the next one begins."""
    options = _options()
    print(hardware())
    results = Results("fairness", seed=options.seeds[0])
    try:
        traces = find_traces(options.data)
        runner = Runner(options.processes, results)
        if options.policies:
            compare(runner, traces, options)
        else:
            run(runner, traces, options)
        runner.write(options.json)
        runner.close()
    except KVPrefetchError as error:
        sys.exit(f"bench/fairness.py: {error}")
    print()
    for name, value in sorted(results.figures.items()):
        print(f"{name:<60}{value:>12.4f}")


def run(runner: Runner, traces: Traces, options: argparse.Namespace) -> None:
    """All sections, the ones that goals are set for first."""
    for figures in _sections(runner, traces, options):
        runner.results.figures.update(figures)
        runner.results.figures.update(sections.worst_over_tenants(runner.results.figures, options.tenants))
        if options.picture:
            plot(runner.results.rows, options.picture)
        runner.write(options.json)


def _sections(runner: Runner, traces: Traces, options: argparse.Namespace) -> Iterator[sections.Figures]:
    seeds, hours = options.seeds, options.hours
    yield pool(options.quick) | false_hint_gain()
    yield sections.short_requests(runner, seeds)
    for tenants in options.tenants:
        settings = sections.settings_of(traces, traces.sessions, tenants, seeds, hours)
        yield sections.memory(runner, settings)
        yield sections.engine(runner, settings)
    yield sections.curve(runner, sections.settings_of(traces, traces.sessions, options.curve, seeds, hours))
    if traces.requests:
        settings = sections.settings_of(traces, traces.requests, options.curve, seeds, hours)
        found = sections.memory(runner, settings) | sections.engine(runner, settings)
        yield {f"{name}_{stem(traces.requests)}": value for name, value in found.items()}
    yield attacks(runner, options)


def pool(quick: bool) -> sections.Figures:
    """What an eviction takes, and what a block weighs."""
    cost = measure(100_000, 1_000, 500) if quick else measure()
    print(cost)
    return {
        "evict_us": cost.evict_us,
        "make_room_us": cost.make_room_us,
        "bytes_per_block": cost.bytes_per_block,
    }


def attacks(runner: Runner, options: argparse.Namespace) -> sections.Figures:
    """What an attacker learns of another tenant's prompts: `isolation.py`, whose failures are told by its figures."""
    fewer = max(options.probes // 25, 1)
    rows = isolation.measured(options.probes, fewer, options.seeds[0])
    runner.results.rows += [{"section": "isolation", **row} for row in rows]
    return isolation.figures(rows)


def compare(runner: Runner, traces: Traces, options: argparse.Namespace) -> None:
    """Only these policies, in all scenes."""
    scenes = ((QUIET, 0.0), (MEMORY, sections.MEMORY_RATE), *((ENGINE, rate) for rate in sections.ENGINE_RATES))
    for tenants in options.tenants:
        settings = sections.settings_of(traces, traces.sessions, tenants, options.seeds, options.hours)
        tasks = [Task(each, policy, *scene) for each in settings for policy in options.policies for scene in scenes]
        runner.run(f"{tenants} tenants", tasks)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the traces")
    parser.add_argument("--json", type=Path, help="write the results here, after every section")
    parser.add_argument("--picture", type=Path, help="write the chart here, a PNG")
    parser.add_argument("--seeds", type=_numbers, default=[0, 1, 2], help="of what is drawn (default 0,1,2)")
    parser.add_argument("--tenants", "--k", type=_numbers, default=[4, 16, 64], help="how many (default 4,16,64)")
    parser.add_argument("--hours", type=float, default=24.0, help="of each run, virtual (default 24)")
    parser.add_argument("--policies", type=_names, default=[], help="compare these alone; NAME:F guarantees F")
    parser.add_argument("--probes", type=int, default=10_000, help="an attacker's, per surface (default 10000)")
    parser.add_argument("--quick", action="store_true", help="one seed, 16 tenants, a small pool, 400 probes at most")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="at once (default: one per core)")
    options = parser.parse_args()
    if options.quick:
        options.seeds = options.seeds[:1]
        options.probes = min(options.probes, 400)
        options.tenants = [16] if 16 in options.tenants else options.tenants[:1]
    options.curve = 16 if 16 in options.tenants else options.tenants[0]
    return options


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _names(text: str) -> list[str]:
    return text.split(",")


if __name__ == "__main__":
    main()
