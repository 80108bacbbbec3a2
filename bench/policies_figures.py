"""The sections of `policies.py`: which runs each takes, and the figures that it yields."""

from collections.abc import Callable, Sequence
from itertools import count, product
from pathlib import Path
from statistics import median

from policies_runs import NAVIGATION, REQUESTS, SESSIONS, Report, Runner, Task, gpu_share, machine_of, per_useful, stem

from kvprefetch.sim.arrivals import Signals
from kvprefetch.sim.machine import Machine

NEEDED = ("reactive", "by-index", "belady", "kvprefetch-inferred", "kvprefetch", "kvprefetch:1.4", "oracle:5")
FRONTIER = (*NEEDED, "kvprefetch:1.8", "gpu-lru", "ttl:300", "pause", "next-turn", "trigger")
NAVIGATORS = ("reactive", "kvprefetch", "oracle")
PRECISIONS, RECALLS = (0.0, 0.2, 0.5, 0.9, 1.0), (0.0, 0.3, 0.9, 1.0)
POOLS, LINKS = (880_000, 3_000_000), (20.0, 55.0)
QUICK_PRECISIONS, QUICK_RECALLS = (0.0, 0.9), (0.3, 1.0)
OVERLOADED = 0.8
"""Of the time from the first arrival to the last, spent in prefill: from there on a worker is overloaded."""
Figures = dict[str, float]
_MOST_WORKERS = 64


def sessions(runner: Runner, path: Path, seeds: Sequence[int], policies: Sequence[str]) -> tuple[Figures, float]:
    """Gains between reactive and the oracle on returns, and by-index ÷ reactive in GPU share (median over seeds)."""
    tasks = [Task(path, SESSIONS, policy, seed) for seed, policy in product(seeds, policies)]
    reports = _keyed(tasks, runner.run("sessions", tasks))

    def gain(policy: str) -> float:
        def of(seed: int) -> float:
            ours, lru, best = (_return5(reports[name, seed]) for name in (policy, "reactive", "oracle:5"))
            return share(lru - ours, lru - best)

        return median(map(of, seeds))

    def moved(policy: str) -> float:
        return median(per_useful(reports[policy, seed]) for seed in seeds)

    figures = {
        "return5_gain_share": gain("kvprefetch"),
        "moved_per_useful": moved("kvprefetch"),
        "return5_gain_share_budget_1.4": gain("kvprefetch:1.4"),
        "moved_per_useful_budget_1.4": moved("kvprefetch:1.4"),
        "inferred_gain_share": gain("kvprefetch-inferred"),
        "inferred_moved_per_useful": moved("kvprefetch-inferred"),
    }
    figures = {f"{name}_{stem(path)}": value for name, value in figures.items()}
    kept, versus = eviction(lambda policy, seed: reports[policy, seed], seeds)
    return figures | {f"belady_gap_closed_{stem(path)}": kept}, versus


def eviction(report: Callable[[str, int], Report], seeds: Sequence[int]) -> tuple[float, float]:
    """How much of the way from LRU to Belady the index goes in GPU share, and its share ÷ LRU's: medians."""
    closed, versus = [], []
    for seed in seeds:
        ours, lru, best = (gpu_share(report(policy, seed)) for policy in ("by-index", "reactive", "belady"))
        closed.append(share(ours - lru, best - lru))
        versus.append(ours / lru if lru else 1.0)
    return median(closed), median(versus)


def requests(runner: Runner, path: Path, seed: int) -> tuple[Figures, float]:
    """The same of eviction, for requests with a clock of their own: nothing is drawn, so one run a policy."""
    workers, lru = enough_workers(runner, path, seed)
    tasks = [Task(path, REQUESTS, policy, seed, workers=workers) for policy in ("by-index", "belady")]
    reports = _keyed(tasks, runner.run("requests", tasks)) | {("reactive", seed): lru}
    closed, versus = eviction(lambda policy, seed: reports[policy, seed], [seed])
    return {f"belady_gap_closed_{stem(path)}": closed, f"workers_{stem(path)}": workers}, versus


def enough_workers(runner: Runner, path: Path, seed: int) -> tuple[int, Report]:
    """The fewest workers that `reactive` does not overload, and its report with them."""
    for first in count(1, runner.processes):
        tasks = [Task(path, REQUESTS, "reactive", seed, workers=first + n) for n in range(runner.processes)]
        for task, report in zip(tasks, runner.run("requests: how many workers", tasks), strict=True):
            load = share(report["gpu_seconds"], task.workers * report["span_s"])
            print(f"  {task.workers} workers are busy {load:.0%} of the time")
            if load < OVERLOADED or task.workers >= _MOST_WORKERS:
                return task.workers, report
    raise AssertionError("count() does not end")


def navigation(runner: Runner, path: Path, seeds: Sequence[int]) -> Figures:
    """The gain in mean TTFT, what was computed per useful token, and the share of GPU seconds that was wasted."""
    tasks = [Task(path, NAVIGATION, policy, seed) for seed, policy in product(seeds, NAVIGATORS)]
    reports = _keyed(tasks, runner.run("navigation", tasks))

    def gain(seed: int) -> float:
        lru, ours, best = (float(reports[policy, seed]["ttft_s"]["all"]["mean"]) for policy in NAVIGATORS)
        return share(lru - ours, lru - best)

    ours = [reports["kvprefetch", seed] for seed in seeds]
    spent = [report["prefetch"] for report in ours]
    figures = {
        "navigation_gain_share": median(map(gain, seeds)),
        "navigation_computed_per_useful": median(
            share(s["computed_tokens"], s["computed_useful_tokens"]) for s in spent
        ),
        "speculative_waste": median(map(wasted, ours)),
    }
    return {f"{name}_{stem(path)}": value for name, value in figures.items()}


def wasted(report: Report) -> float:
    """GPU seconds of speculation, less the share of its tokens that were used, ÷ all GPU seconds."""
    spent = report["prefetch"]
    useless = 1 - share(spent["computed_useful_tokens"], spent["computed_tokens"])
    return share(spent["gpu_seconds"] * useless, report["gpu_seconds"])


def machines(quick: bool) -> list[Machine]:
    """The machines of the grid."""
    return [
        machine_of(gpu, link) for gpu, link in product(POOLS[:1] if quick else POOLS, LINKS[-1:] if quick else LINKS)
    ]


def grid(runner: Runner, path: Path, seed: int, machine: Machine, quick: bool) -> Figures:
    """The worst that kvprefetch does to follow-ups on this machine, whatever the signals are."""
    cells = list(product(QUICK_PRECISIONS, QUICK_RECALLS) if quick else product(PRECISIONS, RECALLS))
    silent = (1.0, 0.0)  # without recall there are no signals, whatever their precision
    cells = [cell for cell in cells if cell[1] > 0 or cell == silent]
    tasks = [Task(path, SESSIONS, "reactive", seed, machine)]
    tasks += [Task(path, SESSIONS, "kvprefetch", seed, machine, signals=Signals(r, p)) for p, r in cells]
    lru, *ours = (report["ttft_s"]["follow_up"] for report in runner.run("grid", tasks))
    return {
        f"worst_follow_up_{at}_ratio": max(share(found[at], lru[at]) if lru[at] else 1.0 for found in ours)
        for at in ("p50", "p99")
    }


def share(part: float, whole: float) -> float:
    """`part` ÷ `whole`; 0 of nothing."""
    return part / whole if abs(whole) > 1e-12 else 0.0


def _keyed(tasks: Sequence[Task], reports: Sequence[Report]) -> dict[tuple[str, int], Report]:
    return {(task.policy, task.seed): report for task, report in zip(tasks, reports, strict=True)}


def _return5(report: Report) -> float:
    return float(report["ttft_s"]["return_5min"]["p50"])
