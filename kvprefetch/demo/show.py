"""Show the demo's report: a table for the terminal, a chart for everybody else."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

_COLOURS = {"cold": "#b0b0b0", "reactive": "#5b8db8", "preloaded": "#d9662b"}


def print_report(report: dict[str, Any], console: Console) -> None:
    """The turns, the medians, and what speculation cost."""
    console.print(f"{report['model']} · {report['device']} · {report['dtype']} · {report['backend']}")
    table = Table(title="Time to first token, in seconds", title_justify="left", padding=0)
    for name in ("question", "file"):
        table.add_column(name, no_wrap=True)
    for name in ("tokens", "cold", "reactive", "preloaded", "reused", "same"):
        table.add_column(name, justify="right")
    for turn in report["turns"]:
        times = (f"{turn[f'ttft_{way}_s']:.2f}" for way in _COLOURS)
        same = "yes" if turn["identical"] else "[bold red]NO"
        found = f"{turn['reused_tokens']}"
        table.add_row(turn["kind"], turn["file"], f"{turn['context_tokens']}", *times, found, same)
    table.add_section()
    middle = report["median"]
    table.add_row("median", "", "", *(f"[bold]{middle[way]:.2f}" for way in _COLOURS), "", "")
    console.print(table)
    spent = report["prefetch"]
    gain = middle["cold"] / middle["preloaded"]
    console.print(
        f"Preloaded answers begin {gain:.0f} x sooner than cold ones, at the median; one whose context was simply "
        f"resident begins after {middle['resident']:.2f} s."
    )
    console.print(
        f"What it cost: {spent['issued']} preloads, {spent['seconds']:.1f} s of otherwise idle time, "
        f"{spent['tokens_computed']} tokens computed ahead: {spent['tokens_used']} used, "
        f"{spent['tokens_wasted']} wasted (files nobody asked about, answers nobody followed up)."
    )


def plot_report(report: dict[str, Any], path: Path) -> None:
    """Write the chart as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    turns = report["turns"]
    figure, axes = plt.subplots(figsize=(9, 4.2), layout="constrained")
    for offset, (way, colour) in enumerate(_COLOURS.items()):
        heights = [turn[f"ttft_{way}_s"] for turn in turns]
        places = [index + (offset - 1) * 0.27 for index in range(len(turns))]
        bars = axes.bar(places, heights, 0.25, label=way, color=colour)
        axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=1)
    labels = [f"{turn['kind']}\n{turn['file']}\n{turn['context_tokens']} tokens" for turn in turns]
    axes.set_xticks(range(len(turns)), labels, fontsize=8)
    axes.set_ylabel("seconds to the first token")
    axes.set_title(
        f"The same questions three ways, the same tokens · {report['model']}, {report['device']}", fontsize=10
    )
    axes.legend(frameon=False, ncols=3, loc="upper right")
    axes.margins(y=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
