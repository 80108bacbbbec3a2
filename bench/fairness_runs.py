"""One policy among tenants on one drawn trace, and many of them on all cores; the parts of `fairness.py` that run."""

import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from fairness_policies import maker_of
from policies_runs import CONCURRENCY, REQUESTS, SESSIONS, machine_of, stem, traces_of
from results_format import Results

from kvprefetch.errors import TraceError
from kvprefetch.sim.formats import read_trace, rows_of
from kvprefetch.sim.report import summary
from kvprefetch.sim.tenants import Dealing, Flood, Profile, deal, read_profiles
from kvprefetch.sim.together import Found, Together, Worst, between, gpu_hit, hit, jain, worst_window

Report = dict[str, Any]
QUIET, MEMORY, ENGINE = "quiet", "memory", "engine"
KEPT = 0.25
"""Of the sessions of a trace of requests: so many as one worker can serve."""


@dataclass(frozen=True)
class Traces:
    """The files of a folder that the bench reads."""

    rates: Path
    sessions: Path
    requests: Path | None

    def kind_of(self, path: Path) -> str:
        """Its format."""
        return SESSIONS if path == self.sessions else REQUESTS


@dataclass(frozen=True)
class Setting:
    """One drawn trace. The flood, where there is one, comes from a third of the run to its half."""

    path: Path
    kind: str
    rates: Path
    tenants: int
    seed: int
    horizon_s: float

    @property
    def flooded(self) -> tuple[float, float]:
        """When the flood begins and ends."""
        return self.horizon_s / 3, self.horizon_s / 2


@dataclass(frozen=True)
class Task:
    """What one run is made of. `scene`: no flood; one with an engine of its own; or one on the tenants' engine."""

    setting: Setting
    policy: str
    scene: str = QUIET
    rate: float = 0.0  # of the flood, per second


def find_traces(folder: Path) -> Traces:
    """What is in the folder, told by the keys of first lines. Raises TraceError for what is missing."""
    found = traces_of(folder)
    rates = [path for path in sorted(folder.glob("*.jsonl*")) if "windows" in next(iter(rows_of(path)), {})]
    if not rates:
        raise TraceError(f"no file in {folder} holds clients' rates: lines with `windows`")
    if not found[SESSIONS]:
        raise TraceError(f"no file in {folder} has the format of {SESSIONS}")
    sessions = sorted(found[SESSIONS], key=lambda path: (stem(path) != "agent_sessions", path))[0]
    requests = sorted(found[REQUESTS], key=lambda path: ("conversation" not in stem(path), path))
    return Traces(rates[0], sessions, requests[0] if requests else None)


@lru_cache(maxsize=1)
def _read(path: Path, kind: str, rates: Path) -> tuple[Any, list[Profile]]:
    return read_trace(path, kind, 1), read_profiles(rates)


@lru_cache(maxsize=1)
def together_of(setting: Setting) -> Together:
    """The tenants' trace, and what follows from it alone."""
    trace, profiles = _read(setting.path, setting.kind, setting.rates)
    dealing = Dealing(setting.tenants, CONCURRENCY, setting.horizon_s, setting.seed, KEPT)
    return Together(deal(trace, profiles, dealing), machine_of())


def run_task(task: Task) -> Report:
    """The report of one run: of all of it, and (`flooded_`) of the time in which a flood comes, if one does."""
    began = time.perf_counter()
    setting, together = task.setting, together_of(task.setting)
    start, end = setting.flooded
    flood = Flood(task.rate, start, end).requests(together.machine.block_tokens, setting.seed) if task.rate else []
    sharing, make = maker_of(task.policy, [*together.tenants, Flood.tenant])
    found = together.serve(make, flood, apart=task.scene == MEMORY)
    block, shares = together.machine.block_tokens, sharing.shares
    gpu_blocks, host_blocks = together.machine.gpu_tokens // block, together.machine.host_tokens // block
    worst = worst_window(found, lambda tenant: shares.guaranteed(tenant, gpu_blocks))
    with_host = worst_window(found, lambda tenant: shares.guaranteed(tenant, host_blocks), with_host=True)
    flooded = {f"flooded_{name}": value for name, value in _measured(between(found, start, end)).items()}
    report = _measured(found) | flooded | _named("worst", worst) | _named("worst_host", with_host)
    return report | {"pressure": together.pressure, "wall_s": time.perf_counter() - began}


def _measured(found: Sequence[Found]) -> Report:
    ttft = summary(each.live.ttft_s for each in found)
    return {
        "requests": len(found),
        "gpu_hit": gpu_hit(found),
        "hit": hit(found),
        "jain": jain(found),
        "ttft_p50_s": ttft["p50"],
        "ttft_p99_s": ttft["p99"],
    }


def _named(word: str, worst: Worst) -> Report:
    return {f"{word}_{name}": value for name, value in asdict(worst).items()}


class Runner:
    """Runs tasks on so many processes, prints each as it ends, and keeps its row in `results`."""

    def __init__(self, processes: int, results: Results) -> None:
        self.results, self.began = results, time.perf_counter()
        self._known: dict[Task, Report] = {}  # what two sections need is run once
        self._pool = multiprocessing.Pool(processes) if processes > 1 else None

    def run(self, section: str, tasks: Sequence[Task]) -> dict[Task, Report]:
        """The reports of `tasks`."""
        fresh = [task for task in dict.fromkeys(tasks) if task not in self._known]
        if fresh:
            print(f"\n{section}\n{_HEADER}")
        for task, report in zip(fresh, (self._pool.imap if self._pool else map)(run_task, fresh), strict=True):
            self._known[task] = report
            row = _row(section, task, report)
            print(_line(row), flush=True)
            self.results.rows.append(row)
        return {task: self._known[task] for task in tasks}

    def write(self, path: Path | None) -> None:
        """The results so far, where a file is wanted."""
        self.results.figures["wall_s"] = time.perf_counter() - self.began
        if path:
            self.results.write(path)

    def close(self) -> None:
        """End the processes."""
        if self._pool:
            self._pool.close()
            self._pool.join()


def _row(section: str, task: Task, report: Report) -> Report:
    row = {
        "section": section,
        "trace": stem(task.setting.path),
        "tenants": task.setting.tenants,
        "seed": task.setting.seed,
        "policy": task.policy,
        "scene": task.scene,
        "flood_per_s": task.rate,
        **report,
    }
    return {key: round(value, 6) if isinstance(value, float) else value for key, value in row.items()}


_HEADER = (
    f"{'trace':<30}{'K':>3}{'seed':>5} {'policy':<18}{'flood':<12}{'gpu':>7}{'+host':>7}{'Jain':>7}{'worst':>8}"
    f"{'below':>12}{'p99 s':>9} |{'while gpu':>10}{'+host':>7}{'p99 s':>10}{'wall':>6}"
)


def _line(row: Report) -> str:
    flood = f"{row['scene']} {row['flood_per_s']}" if row["flood_per_s"] else "none"
    below = f"{row['worst_below']}/{row['worst_windows']}"
    return (
        f"{row['trace']:<30}{row['tenants']:>3}{row['seed']:>5} {row['policy']:<18}{flood:<12}{row['gpu_hit']:>7.3f}"
        f"{row['hit']:>7.3f}{row['jain']:>7.3f}{row['worst_points']:>8.1f}{below:>12}{row['ttft_p99_s']:>9.1f} |"
        f"{row['flooded_gpu_hit']:>10.3f}{row['flooded_hit']:>7.3f}{row['flooded_ttft_p99_s']:>10.2f}"
        f"{row['wall_s']:>6.1f}"
    )
