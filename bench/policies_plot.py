"""The picture of `policies.py`: where the policies stand between a reactive cache and an oracle."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

SHOWN = {
    "gpu-lru": "GPU cache only",
    "reactive": "reactive host reload",
    "ttl:300": "keep for 5 min",
    "next-turn": "always bring back",
    "belady": "Belady's eviction",
    "trigger": "believe every signal",
    "kvprefetch-inferred": "kvprefetch, no signals",
    "kvprefetch:1.4": "kvprefetch, budget 1.4",
    "kvprefetch:1.8": "kvprefetch, budget 1.8",
    "kvprefetch": "kvprefetch",
    "oracle:5": "oracle, 5 s ahead",
}
"""From top to bottom, and in words."""
_OTHERS, _OURS, _KNOWS_ALL = "#b0b0b0", "#d9662b", "#5b8db8"


def plot(rows: Sequence[dict[str, Any]], trace: str, path: Path) -> None:
    """Write the chart of the trace's runs as a PNG: medians over seeds, with their range."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    kept = [row for row in rows if row["section"] == "sessions" and row["trace"] == trace]
    figure, (times, moves) = plt.subplots(
        1, 2, figsize=(9, 4.2), sharey=True, layout="constrained", width_ratios=(3, 2)
    )
    _bars(times, kept, "return5_p50_s", "{:.2f}")
    _bars(moves, kept, "moved_per_useful", "{:.1f}")
    for policy in ("reactive", "oracle:5"):
        at = median(_values(kept, policy, "return5_p50_s"))
        times.axvline(at, color="#606060", linewidth=0.8, linestyle=":", zorder=0)
    times.set_yticks(range(len(SHOWN)), SHOWN.values(), fontsize=8)
    times.invert_yaxis()
    times.set_xlabel("seconds to the first token, median return after > 5 min", fontsize=8)
    moves.set_xlabel("tokens moved per useful token", fontsize=8)
    for axes in (times, moves):
        axes.tick_params(axis="x", labelsize=8)
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.12, y=0.03)
    seeds = len({row["seed"] for row in kept})
    figure.suptitle(
        f"Between a reactive cache and an oracle · {trace}, replayed: 8B on one H200, median of {seeds} seeds",
        fontsize=10,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _bars(axes: Any, rows: Sequence[dict[str, Any]], name: str, words: str) -> None:
    for place, policy in enumerate(SHOWN):
        values = _values(rows, policy, name)
        middle = median(values)
        colour = _OURS if policy.startswith("kvprefetch") else _KNOWS_ALL if policy == "oracle:5" else _OTHERS
        axes.barh(place, middle, 0.72, color=colour)
        axes.hlines(place, min(values), max(values), color="#303030", linewidth=1)
        text = words.format(middle) if middle else "moves nothing"
        axes.annotate(text, (max(values), place), (4, 0), textcoords="offset points", va="center", fontsize=7)


def _values(rows: Sequence[dict[str, Any]], policy: str, name: str) -> list[float]:
    return [row[name] for row in rows if row["policy"] == policy]
