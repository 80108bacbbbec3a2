"""One policy replayed on one trace, and many of them on all cores; the parts of `policies.py` that run things."""

import copy
import multiprocessing
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from predict import FORMATS as EVENTS
from results_format import Results

from kvprefetch.errors import TraceError
from kvprefetch.sim.arrivals import Signals, place
from kvprefetch.sim.events import read_events
from kvprefetch.sim.formats import read_trace, rows_of
from kvprefetch.sim.machine import Machine
from kvprefetch.sim.navigate import NavigationReplay
from kvprefetch.sim.replay import Experiment, Replay
from kvprefetch.sim.visits import place_visits

SESSIONS, REQUESTS, NAVIGATION = "kv-cache-tester", "mooncake", "navigation"
FORMATS = {
    SESSIONS: [{"id", "block_size", "requests"}],
    REQUESTS: [{"timestamp", "hash_ids"}],
    NAVIGATION: list(EVENTS.values()),
}
"""The keys that a format's first line has (one of these sets)."""
CONCURRENCY = 16.0
HOST_RATIO = 8
Report = dict[str, Any]


def machine_of(gpu_tokens: int = 880_000, reload_gbps: float = 55.0) -> Machine:
    """An 8B model on one H200, with `gpu_tokens` of KV on the GPU and eight times as much on the host."""
    return Machine(gpu_tokens=gpu_tokens, host_tokens=HOST_RATIO * gpu_tokens, reload_gbps=reload_gbps)


@dataclass(frozen=True)
class Task:
    """What one run is made of."""

    path: Path
    kind: str
    policy: str
    seed: int = 0
    machine: Machine = field(default_factory=machine_of)
    workers: int = 1
    signals: Signals = field(default_factory=Signals)

    @property
    def trace(self) -> str:
        """The file's stem, which figures carry."""
        return stem(self.path)


def stem(path: Path) -> str:
    """The file's name without its endings."""
    return path.name.partition(".")[0]


def traces_of(folder: Path) -> dict[str, list[Path]]:
    """The folder's files by format, told by the keys of their first line. Raises TraceError if there is none."""
    if not folder.is_dir():
        raise TraceError(f"there is no folder {folder}: give the traces' folder")
    found: dict[str, list[Path]] = {kind: [] for kind in FORMATS}
    for path in sorted(folder.glob("*.jsonl*")):
        keys = next(iter(rows_of(path)), {}).keys()
        for kind, choices in FORMATS.items():
            if any(needed <= keys for needed in choices):
                found[kind].append(path)
                break
    if not any(found.values()):
        raise TraceError(f"no file in {folder} has the format of {', '.join(FORMATS)}: give the traces' folder")
    return found


def run_task(task: Task) -> Report:
    """The report of one run, with `span_s`, the time between the first and last arrival, and `peak_rss_mib`."""
    report = _run(task)
    return {**report, "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def _run(task: Task) -> Report:
    if task.kind == NAVIGATION:
        return _navigation(task.path, task.seed, task.machine, task.signals).run(task.policy)
    base, span = _replay(task.path, task.kind, task.seed, task.machine, task.workers)
    replay = copy.copy(base)  # what it has computed of the trace holds for any signals
    replay.experiment = replace(base.experiment, signals=task.signals)
    return {**replay.run(task.policy), "span_s": span}


@lru_cache(maxsize=1)
def _replay(path: Path, kind: str, seed: int, machine: Machine, workers: int) -> tuple[Replay, float]:
    trace = place(read_trace(path, kind, 1), CONCURRENCY, seed)
    times = [request.at for session in trace.sessions for request in session]
    return Replay(trace, Experiment(machine, workers, seed=seed)), max(times) - min(times)


@lru_cache(maxsize=1)
def _navigation(path: Path, seed: int, machine: Machine, signals: Signals) -> NavigationReplay:
    visits = place_visits(read_events(path), CONCURRENCY, seed)
    return NavigationReplay(visits, Experiment(machine, 1, signals, seed))


class Runner:
    """Runs tasks on so many processes, prints each as it ends, and keeps its row in `results`."""

    def __init__(self, processes: int, results: Results) -> None:
        self.processes, self.results, self.began = max(processes, 1), results, time.perf_counter()
        self.peak_rss_mib = 0.0  # of the largest process
        self._known: dict[Task, Report] = {}  # what two sections need is run once
        self._pool = multiprocessing.Pool(processes) if processes > 1 else None

    def run(self, section: str, tasks: Sequence[Task]) -> list[Report]:
        """The reports of `tasks`, in their order."""
        if tasks:
            print(f"\n{section}\n{_HEADER}")
        fresh = [task for task in tasks if task not in self._known]
        ran = (self._pool.imap if self._pool else map)(run_task, fresh)
        for task in tasks:
            report = self._known[task] = self._known.get(task) or next(ran)
            row = row_of(section, task, report)
            print(_line(task, row), flush=True)
            self.results.rows.append(row)
            self.peak_rss_mib = max(self.peak_rss_mib, report["peak_rss_mib"])
        return [self._known[task] for task in tasks]

    def write(self, path: Path | None) -> None:
        """The results so far, where a file is wanted."""
        self.results.figures["wall_s"] = time.perf_counter() - self.began
        self.results.figures["peak_rss_mib"] = self.peak_rss_mib
        if path:
            self.results.write(path)

    def close(self) -> None:
        """End the processes."""
        if self._pool:
            self._pool.close()
            self._pool.join()


def per_useful(report: Report) -> float:
    """Tokens moved per useful token; 0 where nothing was useful."""
    prefetch = report["prefetch"]
    return float(prefetch["moved_tokens"] / prefetch["useful_tokens"]) if prefetch["useful_tokens"] else 0.0


def gpu_share(report: Report) -> float:
    """The share of the reusable prefix tokens of follow-ups that was found on the GPU."""
    found = report["prefix_tokens"]
    return float(found["gpu"] / max(sum(found.values()), 1))


def row_of(section: str, task: Task, report: Report) -> dict[str, Any]:
    """What is kept of one run."""
    times, prefetch = report["ttft_s"], report["prefetch"]
    total = max(sum(report["prefix_tokens"].values()), 1)
    row = {
        "section": section,
        "trace": task.trace,
        "policy": task.policy,
        "seed": task.seed,
        "gpu_tokens": task.machine.gpu_tokens,
        "reload_gbps": task.machine.reload_gbps,
        "workers": task.workers,
        "precision": task.signals.precision,
        "recall": task.signals.recall,
        "ttft_mean_s": times["all"]["mean"],
        "ttft_p95_s": times["all"]["p95"],
        "follow_up_p50_s": times["follow_up"]["p50"],
        "follow_up_p99_s": times["follow_up"]["p99"],
        "return5_p50_s": times["return_5min"]["p50"],
        "return5_p99_s": times["return_5min"]["p99"],
        "gpu_share": gpu_share(report),
        "recomputed_share": report["prefix_tokens"]["recomputed"] / total,
        "moved_tokens": prefetch["moved_tokens"],
        "moved_per_useful": per_useful(report),
        "late_share": prefetch["late_share"],
        "speculative_gpu_s": prefetch["gpu_seconds"],  # 0 in replays of sessions: there speculation only moves
        "gpu_s": report["gpu_seconds"],
        "wall_s": report["wall_s"],
    }
    if "computed_tokens" in prefetch:
        row |= {key: prefetch[key] for key in ("computed_tokens", "computed_useful_tokens")}
    return {key: round(value, 6) if isinstance(value, float) else value for key, value in row.items()}


_HEADER = (
    f"{'trace':<32}{'policy':<20}{'seed':>5}{'GPU':>8}{'GB/s':>6}{'prec':>6}{'recall':>7}{'mean':>9}"
    f"{'follow-up':>10}{'p99':>9}{'>5 min':>8}{'gpu':>7}{'moved':>7}{'wall':>6}"
)


def _line(task: Task, row: dict[str, Any]) -> str:
    pool = f"{task.workers}×" if task.workers > 1 else ""
    pool += f"{row['gpu_tokens'] / 1e6:.2g}M"
    return (
        f"{row['trace']:<32}{row['policy']:<20}{row['seed']:>5}{pool:>8}{row['reload_gbps']:>6.0f}"
        f"{row['precision']:>6.1f}{row['recall']:>7.1f}{row['ttft_mean_s']:>9.3f}{row['follow_up_p50_s']:>10.3f}"
        f"{row['follow_up_p99_s']:>9.3f}{row['return5_p50_s']:>8.3f}{row['gpu_share']:>7.1%}"
        f"{row['moved_per_useful']:>7.2f}{row['wall_s']:>6.1f}"
    )
