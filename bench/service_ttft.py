"""The TTFT bench with a service in between: a worker of this process, linked to a real service, runs its cases.

What it computes is written to the arena meanwhile, and a preload of what the pool has lost comes out of the arena.
"""

import time
from typing import Any

from results_format import Results
from service_node import Node, wait_until
from ttft import SUFFIXES, Bench
from ttft_live import live_harm
from ttft_models import Texts

from kvprefetch.client.channel import open_channel
from kvprefetch.engines.engine import open_engine
from kvprefetch.engines.load import LoadedModel
from kvprefetch.inprocess import Local
from kvprefetch.settings import EngineSettings, PoolSettings, Settings, SpeculationSettings
from kvprefetch.worker.link import Link

CONTEXT = 1_024


class Settled(Local):
    """Emptied, its pool is empty: blocks that are being written to the arena just now stay at first."""

    def clear(self) -> None:
        def is_empty() -> bool:
            super(Settled, self).clear()
            return bool(self.stats()["pool"]["resident"] == 0)

        wait_until(is_empty, "the pool cannot be emptied", 30)


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
    mine = Results("ttft", results.seed)
    bench = Bench(kv, texts, mine, repeats)
    bench._ask(texts.context(300))
    rows = bench.contexts([CONTEXT])
    harm = live_harm(kv, texts, live)
    node = kv.stats()["node"]
    kv.check()
    for row in harm:
        print(row, flush=True)
    results.rows += [{"section": "earlier benches with a service", **row} for row in (*rows, *harm)]
    short = next(row for row in rows if row["suffix"] == SUFFIXES[0])
    summary: dict[str, Any] = {
        "section": "earlier benches with a service, in short",
        "preloaded_over_resident_p50_1024": short["preloaded_over_resident"],
        "wrong_over_resident_p50_1024": short["wrong_over_resident"],
        "live_ttft_wrong_hints_ratio_p50": max(row["ratio_p50"] for row in harm),
        "live_ttft_wrong_hints_ratio_p95": max(row["ratio_p95"] for row in harm),
        "arena_read": node["read"],
        "arena_written": node["written"],
    }
    results.rows.append(summary)
    print(summary, flush=True)
