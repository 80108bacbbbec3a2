"""A flood beside a protected tenant at two real workers and their service: its TTFT before, during and after.

    python bench/flood.py --json bench/results/flood.json --picture bench/results/flood.png
    python bench/flood.py --interactive --json bench/results/flood-interactive.json

SmolLM2-135M on CPU workers, in pools too small for both. Half-way through the flood the operator gives the protected
tenant another guarantee by `kvprefetch tenants set`. At the end the service accounts for every slot and each worker for
every page. Beside it the same flood under the tenant's own credential: nothing is fair between a tenant and itself.
It takes about 5 minutes.

With `--interactive`, in about 6: an interactive tenant's prompts alone, beside a batch tenant's queue of long ones, and
all of them through one queue in order of arrival. Prefill goes by chunks of 64 tokens: the default, 256, takes one core
half a second.
"""

import argparse
import sys
from pathlib import Path
from statistics import median

from flood_drive import PHASES, Driver, Load, Scene
from flood_interactive import Beside, interactive
from flood_node import ANN, FLOOD, Cluster, Sizes
from flood_plot import plot
from results_format import Results, hardware
from ttft_models import Texts, cpu_model

from kvprefetch.demo.model import find_model
from kvprefetch.engines.load import LoadedModel
from kvprefetch.sim.report import quantile

ALONE = "one tenant for both"


def main() -> None:
    """Run both, print a row for each phase, and write what is wanted."""
    options = _options()
    print(hardware())
    loaded = cpu_model(options.model, "float32")
    config = loaded.model.config
    heads = config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
    sizes = Sizes(token_bytes=2 * 4 * config.num_hidden_layers * heads)
    results = Results("flood", seed=0)
    if options.interactive:
        interactive(str(find_model(options.model)), Texts(loaded, 0), sizes, Beside(), results)
    else:
        _flood(str(find_model(options.model)), loaded, sizes, options, results)
    for name, value in sorted(results.figures.items()):
        print(f"{name:<44}{value:>10.3f}")
    if options.json:
        results.write(options.json)
    if results.figures.get("failed") or results.figures.get("failed_one_tenant"):
        sys.exit("requests failed")


def _flood(model: str, loaded: LoadedModel, sizes: Sizes, options: argparse.Namespace, results: Results) -> None:
    load = Load(phases_s=(options.phase, 2 * options.phase, options.phase))
    scenes = {}
    for name, credential in (("two tenants", FLOOD), (ALONE, ANN)):
        scenes[name] = scene = _run(model, sizes, Texts(loaded, 0), load, credential)
        for phase in PHASES:
            results.rows.append(row := {"sharing": name, **_row(scene, phase)})
            print(row)
        results.figures.update(_figures(scene, "" if credential == FLOOD else "_one_tenant"))
        for failed in scene.failed[:3]:
            print(failed)
    if options.picture:
        plot(scenes["two tenants"], scenes[ALONE], options.picture)


def _run(model: str, sizes: Sizes, texts: Texts, load: Load, credential: str) -> Scene:
    with Cluster(model, sizes) as cluster:
        scene = Driver(cluster, texts, load, credential).run(
            lambda: cluster.operate("tenants", "set", ANN, "--guarantee", "70%")
        )
        cluster.prove()
    return scene


def _row(scene: Scene, phase: str) -> dict[str, float | str]:
    times = sorted(scene.ttfts(phase))
    return {
        "phase": phase,
        "questions": len(times),
        "ttft_p50_s": round(median(times), 4),
        "ttft_p99_s": round(quantile(times, 0.99), 4),
        "reused": round(scene.reused(phase), 4),
        "flood_prompts": len(scene.of(FLOOD, phase)),
    }


def _figures(scene: Scene, ending: str) -> dict[str, float]:
    before, during, after = (sorted(scene.ttfts(phase)) for phase in PHASES)
    figures = {
        "during_over_before_p50": median(during) / median(before),
        "during_over_before_p99": quantile(during, 0.99) / quantile(before, 0.99),
        "after_over_before_p50": median(after) / median(before),
        "reused_before": scene.reused("before"),
        "reused_during": scene.reused("during"),
        "failed": float(len(scene.failed)),
        "evictions": scene.evictions,
    }
    return {f"{name}{ending}": value for name, value in figures.items()}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--picture", type=Path, help="write the chart here, a PNG")
    parser.add_argument("--interactive", action="store_true", help="short prompts beside a queue of long ones, instead")
    parser.add_argument("--model", help="folder or name (default: SmolLM2-135M-Instruct)")
    parser.add_argument(
        "--phase", type=float, default=25.0, help="seconds before and after; the flood lasts twice so long"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
