"""The picture of `flood.py`: every question's TTFT over time, with the flood shaded."""

from pathlib import Path

from flood_drive import Scene
from flood_node import ANN


def plot(fair: Scene, alone: Scene, path: Path) -> None:
    """Write it as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained", sharey=True)
    titles = ("two tenants: the asking one is guaranteed its part", "one tenant for both: nothing is fair")
    for axis, scene, title in zip(axes, (fair, alone), titles, strict=True):
        begin = scene.asked[0].at
        axis.axvspan(*(each - begin for each in scene.flooded), color="#d9662b", alpha=0.15, label="flood")
        if scene.changed is not None:
            label = "kvprefetch tenants set"
            axis.axvline(scene.changed[0] - begin, color="#404040", linestyle="--", linewidth=1, label=label)
        asked = [each for each in scene.asked if each.who == ANN and not each.failed and each.context]
        times = [each.at - begin for each in asked]
        axis.plot(times, [each.ttft_s for each in asked], "o", ms=3, color="#5b8db8", label="its questions")
        axis.set_yscale("log")
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("seconds", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("time to first token, s", fontsize=8)
    axes[0].legend(fontsize=7, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
