"""Time to first token: cold, resident, preloaded, and preloaded among wrong hints; live harm; overhead.

    python bench/ttft.py --json bench/results/ttft.json             # SmolLM2 on the CPU, about 35 minutes
    python bench/ttft.py --device cuda --json bench/results/ttft-gpu.json

All columns of a row are measured in one run, one after the other, on the same contexts. Times are reported
only if the tokens agree: in float32 preloaded answers equal cold ones, in bf16 they equal resident hits.
"""

import argparse
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch
from results_format import Results, hardware
from ttft_live import live_harm
from ttft_models import Texts, card_floor_s, cpu_model, gpu_model
from ttft_overhead import overhead_ms

from kvprefetch.engines.engine import open_engine
from kvprefetch.engines.load import LoadedModel
from kvprefetch.inprocess import Local
from kvprefetch.outcomes import Outcome
from kvprefetch.settings import EngineSettings, PoolSettings, Settings, SpeculationSettings

SUFFIXES = (32, 128)
WRONG_HINTS = 4
CHECKED_TOKENS = 8


class Bench:
    """One model, measured; fills `rows` and `figures`."""

    def __init__(self, kv: Local, texts: Texts, results: Results, repeats: int) -> None:
        self.kv, self.texts, self.results, self.repeats = kv, texts, results, repeats
        self.dtype = str(kv.engine.shape.dtype).removeprefix("torch.")

    def contexts(self, sizes: list[int]) -> list[dict[str, Any]]:
        """A row for every context and suffix size, each the median over the repeats."""
        rows = []
        for size in sizes:
            for suffix in SUFFIXES:
                short = suffix == SUFFIXES[0]
                # a short answer's time is noisier and costs less to take again
                n = self.repeats * min(3, max(sizes) // size) if short else self.repeats
                samples = [self._sample(size, suffix) for _ in range(n)]
                row: dict[str, Any] = {"dtype": self.dtype, "context": size, "suffix": suffix, "n": n}
                row |= {f"{name}_s": round(median(s[name] for s in samples), 4) for name in samples[0]}
                ratios = [s["preloaded"] / s["resident"] for s in samples]
                row["preloaded_over_resident"] = round(median(ratios), 4)
                wrong = [s["preloaded_wrong_hints"] / s["resident"] for s in samples]
                row["wrong_over_resident"] = round(median(wrong), 4)
                row["cold_over_preloaded"] = round(median(s["cold"] / s["preloaded"] for s in samples), 2)
                print(row, flush=True)
                rows.append(row)
        self.results.rows += rows
        return rows

    def _sample(self, size: int, suffix: int) -> dict[str, float]:
        """One context, seen in every column; the pool is emptied before each that must not find it."""
        kv, context = self.kv, self.texts.context(size)
        first, other = self.texts.suffix(suffix), self.texts.suffix(suffix)
        kv.clear()
        cold, cold_tokens = self._ask(context + first)
        kv.clear()
        before = kv.stats()["prefetch"]["seconds"]
        self._preload(context)
        preload_s = kv.stats()["prefetch"]["seconds"] - before
        preloaded, preloaded_tokens = self._ask(context + first)
        resident, _ = self._ask(context + other)
        kv.clear()
        preloaded_wrong, _ = self._among_wrong_hints(context, first)
        self._agree(context, first, cold_tokens, preloaded_tokens)
        return {
            "cold": cold,
            "resident": resident,
            "preloaded": preloaded,
            "preloaded_wrong_hints": preloaded_wrong,
            "preload": preload_s,
        }

    def _agree(self, context: list[int], suffix: list[int], cold: list[int], preloaded: list[int]) -> None:
        expected = cold
        if self.dtype != "float32":  # chunk shapes change the numerics: compare on the same chunk grid (law 1)
            self.kv.clear()
            self._ask(context)
            _, expected = self._ask(context + suffix)
        if preloaded != expected:
            sys.exit(f"{self.dtype}: a preloaded answer differs: {preloaded} against {expected}; no times reported")

    def _among_wrong_hints(self, context: list[int], suffix: list[int]) -> tuple[float, list[int]]:
        """The right hint among others that nobody will follow; those left are still worked on when asked."""
        wrong = [
            self.kv.prefetch(self.kv.context(token_ids=self.texts.context(len(context))), probability=0.5)
            for _ in range(WRONG_HINTS)
        ]
        self._preload(context)
        measured = self._ask(context + suffix)
        for handle in wrong:
            handle.cancel()
        return measured

    def _preload(self, context: list[int]) -> None:
        result = self.kv.prefetch(self.kv.context(token_ids=context), probability=0.9).wait(600)
        if result.outcome is not Outcome.WARM:
            sys.exit(f"a preload ended {result}; is the pool too small?")

    def _ask(self, prompt: list[int]) -> tuple[float, list[int]]:
        done = self.kv.generate(token_ids=prompt, max_tokens=CHECKED_TOKENS, ignore_eos=True).result()
        assert done.ttft_s is not None
        return done.ttft_s, done.tokens


def measure(loaded: LoadedModel, sizes: list[int], options: argparse.Namespace, results: Results) -> None:
    """All measurements of one model."""
    engine = EngineSettings(chunk_tokens=options.chunk)
    # every hint is believed, so that the wrong ones do all the harm they can
    believing = SpeculationSettings(budget_tokens=1e12)
    settings = Settings(PoolSettings(size=options.pool, block_tokens=options.block), engine, believing)
    texts = Texts(loaded, options.seed)
    with Local(open_engine(loaded, settings), settings) as kv:
        bench = Bench(kv, texts, results, options.repeats)
        bench._ask(texts.context(300))  # the first forwards of a process are slower
        rows = bench.contexts(sizes)
        harm = live_harm(kv, texts, options.live)
        kv.check()
        overhead = overhead_ms(kv)
        if loaded.device.type == "cuda":
            per_token = kv.engine.shape.bytes // kv.engine.block_tokens
            for row in rows:
                row["floor_s"] = card_floor_s(loaded, row["context"], row["suffix"], per_token)
    for row in harm:
        print(row, flush=True)
    results.rows += harm
    _figures(results, rows, harm, overhead)


def _figures(results: Results, rows: list[dict[str, Any]], harm: list[dict[str, Any]], overhead: float) -> None:
    """The named figures: of several dtypes the worst counts."""

    def worst(name: str, value: float, pick: Any = max) -> None:
        results.figures[name] = pick(results.figures.get(name, value), value)

    for row in rows:
        if row["suffix"] == SUFFIXES[0]:
            worst(f"preloaded_over_resident_p50_{row['context']}", row["preloaded_over_resident"])
            worst(f"cold_over_preloaded_p50_{row['context']}", row["cold_over_preloaded"], min)
            if "floor_s" in row:
                worst(f"resident_over_floor_{row['context']}", row["resident_s"] / row["floor_s"])
    for row in harm:
        worst("live_ttft_wrong_hints_ratio_p50", row["ratio_p50"])
        worst("live_ttft_wrong_hints_ratio_p95", row["ratio_p95"])
    worst("overhead_ms_4096", overhead)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", help="on the CPU, instead of SmolLM2: a folder, GGUF file or hub id")
    parser.add_argument("--contexts", help="tokens, comma-separated (default: by device)")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="on the CPU (default: %(default)s)")
    parser.add_argument(
        "--repeats", type=int, default=5, help="of each row, up to 3 x for shorter contexts (default: %(default)s)"
    )
    parser.add_argument("--live", type=int, default=64, help="live requests of each kind (default: %(default)s)")
    parser.add_argument("--pool", help="size of the page pool (default: 3GiB on the CPU, 60%% on a GPU)")
    parser.add_argument("--block", type=int, help="tokens of a block (default: 32; 256 on a GPU, read in place)")
    parser.add_argument("--chunk", type=int, help="tokens of a prefill chunk (default: 256; 2048 on a GPU)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    gpu = options.device == "cuda"
    if gpu and not torch.cuda.is_available():
        sys.exit("no CUDA device here: nothing was measured")
    options.pool = options.pool or ("60%" if gpu else "3GiB")
    options.block = options.block or (256 if gpu else 32)
    options.chunk = options.chunk or (2048 if gpu else 256)
    default_sizes = "8192,32768,131072" if gpu else "512,1024,2048,4096"
    sizes = [int(size) for size in (options.contexts or default_sizes).split(",")]
    print(hardware())
    results = Results("ttft", options.seed)
    for dtype in ("bfloat16",) if gpu else options.dtypes.split(","):
        measure(gpu_model() if gpu else cpu_model(options.model, dtype), sizes, options, results)
    print(results.figures)
    if options.json:
        results.write(options.json)


if __name__ == "__main__":
    main()
