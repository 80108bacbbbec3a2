"""The sections of `fairness.py`: which runs each takes, and the figures that it yields: medians over seeds.

A figure without a number of tenants is the worst of those numbers; one that ends in a policy's name is a baseline's.
"""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import median

from fairness_interactive import interactive
from fairness_policies import BASELINES, BY_INDEX, FIFO, LRU, OURS, OURS_BY_INDEX
from fairness_runs import ENGINE, MEMORY, QUIET, Report, Runner, Setting, Task, Traces
from policies_runs import stem

Figures = dict[str, float]
Reports = dict[Task, Report]
MEMORY_RATE, ENGINE_RATES = 0.5, (0.1, 0.5)
GUARANTEES = (0.0, 0.25, 0.5, 0.75, 1.0)
SCENES = ((QUIET, 0.0), (MEMORY, MEMORY_RATE))
REQUESTS_S = 3600.0
CURVE = "the trade-off"


def settings_of(traces: Traces, path: Path, tenants: int, seeds: Sequence[int], hours: float) -> list[Setting]:
    """One for each seed. A trace of requests has its own length."""
    kind = traces.kind_of(path)
    horizon = hours * 3600 if path == traces.sessions else REQUESTS_S
    return [Setting(path, kind, traces.rates, tenants, seed, horizon) for seed in seeds]


def memory(runner: Runner, settings: Sequence[Setting]) -> Figures:
    """Everyone without a flood, and beside one that shares memory alone."""
    tenants = settings[0].tenants
    policies = (LRU, BY_INDEX, *BASELINES, OURS, OURS_BY_INDEX)
    tasks = [Task(setting, policy, *scene) for setting, policy, scene in product(settings, policies, SCENES)]
    reports = runner.run(f"{tenants} tenants of {stem(settings[0].path)}: memory", tasks)
    found: Figures = {"pressure": median(report["pressure"] for report in reports.values())}
    for policy in policies:
        values = _kept(reports, policy, settings) | _worst(reports, policy, settings)
        found |= {name + _ending(policy): value for name, value in values.items()}
    found["total_hit_over_lru_value"] = found[f"total_hit_over_lru_{OURS_BY_INDEX}"]
    return {f"{name}_k{tenants}": value for name, value in found.items()}


def _kept(reports: Reports, policy: str, settings: Sequence[Setting]) -> Figures:
    """What a flood leaves, and what everyone has without one."""

    def over(name: str, scene: str, other: str, other_scene: str = QUIET) -> float:
        def ratio(setting: Setting) -> float:
            below = _of(reports, setting, other, other_scene)[name]
            return float(_of(reports, setting, policy, scene)[name] / below) if below else 1.0

        return median(map(ratio, settings))

    return {
        "flood_gpu_hit_kept": over("flooded_gpu_hit", MEMORY, policy),
        "flood_hit_kept": over("flooded_hit", MEMORY, policy),
        "flood_gpu_hit_over_lru": over("flooded_gpu_hit", MEMORY, LRU),
        "flood_hit_over_lru": over("flooded_hit", MEMORY, LRU),
        "total_hit_over_lru": over("gpu_hit", QUIET, LRU),
        "total_any_hit_over_lru": over("hit", QUIET, LRU),
        "quiet_p99_over_lru": over("ttft_p99_s", QUIET, LRU),
        "jain": median(_of(reports, setting, policy, QUIET)["jain"] for setting in settings),
    }


def _worst(reports: Reports, policy: str, settings: Sequence[Setting]) -> Figures:
    """Of all windows of all runs, with a flood and without."""
    runs = [_of(reports, setting, policy, scene) for setting, (scene, _) in product(settings, SCENES)]
    windows = sum(run["worst_windows"] for run in runs)
    return {
        "worst_tenant_points": min(run["worst_points"] for run in runs),
        "worst_tenant_host_points": min(run["worst_host_points"] for run in runs),
        "windows_below_share": sum(run["worst_below"] for run in runs) / max(windows, 1),
    }


def engine(runner: Runner, settings: Sequence[Setting]) -> Figures:
    """Everyone beside a flood on the same engine: p99 TTFT with it ÷ without."""
    tenants = settings[0].tenants
    policies = (FIFO, LRU, *BASELINES, OURS)
    scenes = ((QUIET, 0.0), *((ENGINE, rate) for rate in ENGINE_RATES))
    tasks = [Task(setting, policy, *scene) for setting, policy, scene in product(settings, policies, scenes)]
    reports = runner.run(f"{tenants} tenants of {stem(settings[0].path)}: engine", tasks)
    found: Figures = {}
    for policy in policies:
        ratios = {rate: _slower(reports, policy, rate, settings) for rate in ENGINE_RATES}
        found |= {f"flood_p99_ratio_{rate}{_ending(policy)}": ratio for rate, ratio in ratios.items()}
        found[f"flood_p99_ratio{_ending(policy)}"] = max(ratios.values())
    return {f"{name}_k{tenants}": value for name, value in found.items()}


def _slower(reports: Reports, policy: str, rate: float, settings: Sequence[Setting]) -> float:
    def ratio(setting: Setting) -> float:
        flooded, quiet = reports[Task(setting, policy, ENGINE, rate)], reports[Task(setting, policy)]
        return float(flooded["flooded_ttft_p99_s"] / quiet["flooded_ttft_p99_s"])

    return median(map(ratio, settings))


def curve(runner: Runner, settings: Sequence[Setting]) -> Figures:
    """What guarantees from nothing to an equal share cost and keep."""
    policies = [f"{policy}:{guarantee}" for policy, guarantee in product((OURS, OURS_BY_INDEX), GUARANTEES)]
    tasks = [Task(setting, policy, *scene) for setting, policy, scene in product(settings, [LRU, *policies], SCENES)]
    reports = runner.run(CURVE, tasks)
    found: Figures = {}
    for policy in policies:
        kept = _kept(reports, policy, settings)
        found |= {f"curve_{name}_{policy}": kept[name] for name in ("total_hit_over_lru", "flood_gpu_hit_kept", "jain")}
    return found


def short_requests(runner: Runner, seeds: Sequence[int]) -> Figures:
    """The interactive tenant's p99 TTFT with a batch tenant's prompts queued ÷ alone."""
    policies = (FIFO, LRU, *BASELINES, OURS)
    runs = {seed: interactive(policies, seed) for seed in seeds}
    for seed, policy in product(seeds, policies):
        row = {name: round(value, 6) for name, value in runs[seed][policy].items()}
        print(f"interactive beside a batch, seed {seed}, {policy}: {row}")
        runner.results.rows.append({"section": "interactive", "policy": policy, "seed": seed, **row})
    return {
        f"interactive_p99_ratio{_ending(policy)}": median(runs[seed][policy]["ratio"] for seed in seeds)
        for policy in policies
    }


LOWEST = (
    "worst_tenant_points",
    "flood_gpu_hit_kept",
    "flood_hit_kept",
    "total_hit_over_lru",
    "total_hit_over_lru_value",
)
HIGHEST = ("flood_p99_ratio",)


def worst_over_tenants(figures: Figures, tenants: Sequence[int]) -> Figures:
    """The figures without a number of tenants."""
    found: Figures = {}
    for name, policy in product((*LOWEST, *HIGHEST), ("", *(_ending(each) for each in (FIFO, LRU, *BASELINES)))):
        values = [figures[key] for key in (f"{name}{policy}_k{k}" for k in tenants) if key in figures]
        if values:
            found[name + policy] = max(values) if name in HIGHEST else min(values)
    return found


def _of(reports: Reports, setting: Setting, policy: str, scene: str) -> Report:
    return reports[Task(setting, policy, scene, 0.0 if scene == QUIET else MEMORY_RATE)]


def _ending(policy: str) -> str:
    """What a policy's figures end in: ours, in nothing."""
    return "" if policy == OURS else f"_{policy}"
