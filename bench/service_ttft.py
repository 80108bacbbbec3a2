"""The TTFT bench with a service in between: a worker of this process, linked to a real service, runs its cases.

What it computes is written to the arena meanwhile. So a preload of a context that was answered before comes out of the
arena (`loaded`); that of a new one is computed (`computed`), as in the earlier bench. Questions are shorter than a
block: a longer one would be found in the arena, too, when it is asked again.
"""

import time
from statistics import median
from typing import Any

from results_format import Results
from service_node import Node, wait_until
from ttft import Bench
from ttft_live import live_harm
from ttft_models import Texts

from kvprefetch.client.channel import open_channel
from kvprefetch.engines.engine import open_engine
from kvprefetch.engines.load import LoadedModel
from kvprefetch.inprocess import Local
from kvprefetch.settings import EngineSettings, PoolSettings, Settings, SpeculationSettings
from kvprefetch.worker.link import Link

CONTEXT, QUESTION = 1_024, 31


class Settled(Local):
    """It forgets its blocks when they are all written to the arena; while they are, they are in use."""

    def clear(self) -> None:
        def is_empty() -> bool:
            if self.stats()["node"]["queued"]:
                return False
            super(Settled, self).clear()
            return bool(self.stats()["pool"]["resident"] == 0)

        wait_until(is_empty, "what was computed is not written to the arena", 30)


def ttft_with_service(loaded: LoadedModel, texts: Texts, results: Results, repeats: int = 5, live: int = 32) -> None:
    """Rows as in the TTFT bench, and one with their ratios."""
    believing = SpeculationSettings(budget_tokens=1e12)  # so that wrong hints do all the harm they can
    settings = Settings(PoolSettings(size="1GiB", block_tokens=32), EngineSettings(chunk_tokens=256), believing)
    with Node("3GiB") as node, node.serve():
        channel = open_channel(node.address)
        try:
            engine = open_engine(loaded, settings)
            link = Link(channel, engine.pool, time.monotonic, verify=True)
            with Settled(engine, settings, link) as kv:
                wait_until(lambda: link.stats()["connected"], "the worker does not find its service")
                _measure(kv, texts, results, repeats, live)
        finally:
            channel.close()


def _measure(kv: Local, texts: Texts, results: Results, repeats: int, live: int) -> None:
    bench = Bench(kv, texts, Results("ttft", results.seed), repeats)
    bench._ask(texts.context(300))
    samples = [bench._sample(CONTEXT, QUESTION) | _computed(bench) for _ in range(repeats)]
    row: dict[str, Any] = {"dtype": bench.dtype, "context": CONTEXT, "suffix": QUESTION, "n": repeats}
    row |= {f"{name}_s": round(median(sample[name] for sample in samples), 4) for name in samples[0]}
    for name, one, other in (
        ("computed_over_resident", "computed", "computed_resident"),
        ("loaded_over_resident", "preloaded", "resident"),
        ("wrong_over_resident", "preloaded_wrong_hints", "resident"),
    ):
        row[name] = round(median(sample[one] / sample[other] for sample in samples), 4)
    harm = live_harm(kv, texts, live)
    node = kv.stats()["node"]
    kv.check()
    worst = {name: max(each[name] for each in harm) for name in ("ratio_p50", "ratio_p95")}
    row |= {f"live_ttft_wrong_hints_{name}": value for name, value in worst.items()}
    row |= {"arena_read": node["read"], "arena_written": node["written"]}
    for each in (*harm, row):
        results.rows.append({"section": "earlier benches with a service", **each})
        print(results.rows[-1], flush=True)


def _computed(bench: Bench) -> dict[str, float]:
    """A context that nobody has seen: its preload is computed, not loaded."""
    kv, texts = bench.kv, bench.texts
    context = texts.context(CONTEXT)
    kv.clear()
    bench._preload(context)
    computed, _ = bench._ask(context + texts.suffix(QUESTION))
    resident, _ = bench._ask(context + texts.suffix(QUESTION))
    return {"computed": computed, "computed_resident": resident}
