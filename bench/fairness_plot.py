"""The picture of `fairness.py`: what a guarantee costs while nobody floods, and what it keeps while somebody does."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from fairness_figures import GUARANTEES
from fairness_policies import LRU, OURS, OURS_BY_INDEX
from fairness_runs import MEMORY, QUIET

SHOWN = {OURS: ("recency", "#d9662b"), OURS_BY_INDEX: ("value index", "#5b8db8")}
BESIDE = {"maxmin": ("plain max-min", "s"), "static": ("hard partitions", "D")}
Row = dict[str, Any]


def plot(rows: Sequence[Row], path: Path) -> None:
    """Write the trade-off as a PNG: medians over seeds. Nothing is written before it was measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    replayed = [row for row in rows if "scene" in row]
    drawn = [row for row in replayed if row["policy"] == f"{OURS_BY_INDEX}:{GUARANTEES[-1]}"]
    if not drawn:
        return
    kept = [row for row in replayed if _place(row) == _place(drawn[0])]
    figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.6), layout="constrained")
    for policy, (words, colour) in SHOWN.items():
        for axis, values in zip(axes, _curves(kept, policy), strict=True):
            axis.plot([100 * guarantee for guarantee in GUARANTEES], values, "o-", color=colour, label=words, ms=4)
    for policy, (words, marker) in BESIDE.items():
        for axis, value in zip(axes, _measured(kept, policy), strict=True):
            axis.plot([100], [value], marker, color="#909090", label=words, ms=5)
    for axis, value in zip(axes, _measured(kept, LRU), strict=True):
        axis.axhline(value, color="#404040", linewidth=1, linestyle="--", label="global LRU")
    titles = ("GPU hit ÷ global LRU's, no flood", "neighbours' GPU hit kept under a flood", "Jain's index, no flood")
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("guarantee, % of an equal share", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(y=0.15)
    axes[0].legend(fontsize=7, frameon=False)
    figure.suptitle(_title(drawn), fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _title(rows: Sequence[Row]) -> str:
    seeds, first = len({row["seed"] for row in rows}), rows[0]
    pressure = median(row["pressure"] for row in rows)
    title = f"{first['trace']} dealt to {first['tenants']} tenants, working set {pressure:.1f} × the pool"
    return f"{title}, median of {seeds} seeds" if seeds > 1 else title


def _place(row: Row) -> tuple[str, int]:
    return row["trace"], row["tenants"]


def _curves(rows: Sequence[Row], policy: str) -> list[list[float]]:
    points = [_measured(rows, f"{policy}:{guarantee}") for guarantee in GUARANTEES]
    return [list(values) for values in zip(*points, strict=True)]


def _measured(rows: Sequence[Row], policy: str) -> tuple[float, float, float]:
    """GPU hit ÷ LRU's; the share of it kept under a flood; Jain's index."""
    quiet, flooded, lru = _by_seed(rows, policy, QUIET), _by_seed(rows, policy, MEMORY), _by_seed(rows, LRU, QUIET)
    return (
        median(quiet[seed]["gpu_hit"] / lru[seed]["gpu_hit"] for seed in quiet),
        median(flooded[seed]["flooded_gpu_hit"] / quiet[seed]["flooded_gpu_hit"] for seed in quiet),
        median(row["jain"] for row in quiet.values()),
    )


def _by_seed(rows: Sequence[Row], policy: str, scene: str) -> dict[int, Row]:
    return {row["seed"]: row for row in rows if row["policy"] == policy and row["scene"] == scene}
