"""The picture of `policies.py`: where the policies stand between a reactive cache and an oracle."""

from collections.abc import Sequence
from math import inf
from pathlib import Path
from statistics import median
from typing import Any

SHOWN = {
    "gpu-lru": "GPU cache only",
    "ttl:300": "keep for 5 min",
    "reactive": "reactive host reload",
    "next-turn": "always bring back",
    "belady": "Belady's eviction",
    "trigger": "believe every signal",
    "kvprefetch-inferred": "kvprefetch, no signals",
    "kvprefetch:1.4": "kvprefetch, budget 1.4",
    "kvprefetch:1.8": "kvprefetch, budget 1.8",
    "kvprefetch": "kvprefetch, default",
    "oracle:5": "oracle, 5 s ahead",
}
"""From top to bottom, and in words."""
_OTHERS, _OURS, _KNOWS_ALL = "#b0b0b0", "#d9662b", "#5b8db8"
_FAR = 1.5
"""Bars end at so many times the reactive one, and say how long they would be."""


def plot(rows: Sequence[dict[str, Any]], trace: str, path: Path) -> None:
    """Write the chart of the trace's runs as a PNG: medians over seeds, with their range."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    kept = [row for row in rows if row["section"] == "sessions" and row["trace"] == trace]
    seeds = len({row["seed"] for row in kept})
    figure, (times, moves) = plt.subplots(
        1, 2, figsize=(9, 4.2), sharey=True, layout="constrained", width_ratios=(3, 2)
    )
    reactive, oracle = (median(_values(kept, policy, "return5_p50_s")) for policy in ("reactive", "oracle:5"))
    times.axvspan(oracle, reactive, color="#5b8db8", alpha=0.1, linewidth=0, zorder=0)
    _bars(times, kept, "return5_p50_s", "{:.2f}", _FAR * reactive)
    _bars(moves, kept, "moved_per_useful", "{:.1f}")
    times.set_yticks(range(len(SHOWN)), SHOWN.values(), fontsize=8)
    times.invert_yaxis()
    times.set_xlabel(
        "seconds to the first token: median of returns after > 5 min\n(shaded: from reactive to oracle)", fontsize=8
    )
    moves.set_xlabel("tokens moved ahead of requests\nper token of them that was used", fontsize=8)
    for axes in (times, moves):
        axes.tick_params(axis="x", labelsize=8)
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.12, y=0.03)
    title = f"Between a reactive cache and an oracle · {trace} replayed, 8B on one H200"
    figure.suptitle(f"{title}, median of {seeds} seeds" if seeds > 1 else title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _bars(axes: Any, rows: Sequence[dict[str, Any]], name: str, words: str, most: float = inf) -> None:
    for place, policy in enumerate(SHOWN):
        values = _values(rows, policy, name)
        middle = median(values)
        colour = _OURS if policy.startswith("kvprefetch") else _KNOWS_ALL if policy == "oracle:5" else _OTHERS
        text = words.format(middle) if middle else "moves nothing"
        if middle > most:
            axes.barh(place, most, 0.72, color=colour)
            axes.annotate(f"{text} →", (most, place), (-6, 0), textcoords="offset points", ha="right", **_LABEL)
            continue
        axes.barh(place, middle, 0.72, color=colour)
        axes.hlines(place, min(values), max(values), color="#303030", linewidth=1)
        axes.annotate(text, (max(values), place), (5, 0), textcoords="offset points", **_LABEL)


_LABEL = {"va": "center", "fontsize": 7}


def _values(rows: Sequence[dict[str, Any]], policy: str, name: str) -> list[float]:
    return [row[name] for row in rows if row["policy"] == policy]
