"""What packing pages to fp8 for transit does to the model's next-token distribution.

    python bench/fp8_quality.py --json bench/results/fp8_quality.json

A context is prefilled in bf16; its pages are packed, and unpacked into others; real text is then fed on, token by
token, behind both. The same in float32 is the truth that both are compared with, so that what fp8 costs stands
beside what bf16 costs; law 1 allows 1.5 times the logit error of bf16. SmolLM2 and texts from the standard
library; runs on a CPU in minutes.
"""

import argparse
from pathlib import Path
from statistics import mean

import torch
from results_format import Results, hardware
from ttft_models import Texts, cpu_model

from kvprefetch.engines.batch import Row
from kvprefetch.engines.engine import TransformersEngine, open_engine
from kvprefetch.ops.fp8 import pack_pages, unpack_pages
from kvprefetch.settings import EngineSettings, PoolSettings, Settings

BLOCK, CHUNK = 32, 256
CONTEXTS = (512, 2048)
FED = 48  # tokens fed on behind each context
TEXTS = 6
POOL = "1GiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--model", help="folder, GGUF file or hub id (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--texts", type=int, default=TEXTS, help=f"contexts of each size (default {TEXTS})")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(hardware())
    exact, engine = (open_in(dtype, options.model) for dtype in ("float32", "bfloat16"))
    texts, results = Texts(engine.loaded, options.seed), Results("fp8_quality", options.seed)
    for context in CONTEXTS:
        drawn = [texts.context(context + FED + 1) for _ in range(options.texts)]
        row, figures = measure(exact, engine, drawn, context)
        results.rows.append(row)
        results.figures |= figures
        print(row, flush=True)
    print(results.figures)
    if options.json:
        results.write(options.json)


def open_in(dtype: str, model: str | None) -> TransformersEngine:
    settings = Settings(
        pool=PoolSettings(size=POOL, block_tokens=BLOCK),
        engine=EngineSettings(device="cpu", dtype=dtype, chunk_tokens=CHUNK),
    )
    return open_engine(cpu_model(model, dtype), settings)


def measure(
    exact: TransformersEngine, engine: TransformersEngine, texts: list[list[int]], context: int
) -> tuple[dict[str, float], dict[str, float]]:
    """A row and its figures, over all texts and fed tokens. Divergences are from float32, in nats."""
    blocks, all_blocks = context // BLOCK, -(-(context + FED) // BLOCK)
    pages, others = list(range(all_blocks)), list(range(all_blocks, 2 * all_blocks))
    parts = [part for layer in range(engine.shape.layers) for part in engine.pool.layer(layer)]
    logits: dict[str, list[torch.Tensor]] = {"float32": [], "bf16": [], "fp8": []}
    ratio = 0.0
    for text in texts:
        for one in (exact, engine):
            prefill(one, text[:context], pages)
        packed = pack_pages(parts, pages[:blocks])
        unpack_pages(packed, parts, others[:blocks])
        ratio = packed.nbytes / (blocks * engine.shape.bytes)
        logits["float32"].append(feed(exact, text, context, pages))
        logits["bf16"].append(feed(engine, text, context, pages))
        logits["fp8"].append(feed(engine, text, context, others))
    found = {name: torch.cat(each) for name, each in logits.items()}
    truth = torch.tensor([token for text in texts for token in text[context + 1 : context + 1 + FED]])
    row = {"context": context, "tokens": len(truth), "bytes_ratio": round(ratio, 4)}
    for name in ("bf16", "fp8"):
        row |= {
            f"{key}_{name}": round(value, 5) for key, value in compared(found["float32"], found[name], truth).items()
        }
    error = row["logit_error_fp8"] / row["logit_error_bf16"]
    return row, {
        "bytes_ratio": ratio,
        f"logit_error_ratio_{context}": error,
        f"top1_agreement_fp8_{context}": row["top1_agreement_fp8"],
        f"top1_agreement_bf16_{context}": row["top1_agreement_bf16"],
        f"kl_mean_fp8_{context}": row["kl_mean_fp8"],
        f"kl_mean_bf16_{context}": row["kl_mean_bf16"],
        f"loss_change_fp8_{context}": row["loss_change_fp8"],
    }


def compared(exact: torch.Tensor, found: torch.Tensor, truth: torch.Tensor) -> dict[str, float]:
    """Logits `[tokens, vocabulary]` against the exact ones; loss is that of the text's real next token."""
    right, seen = exact.log_softmax(-1), found.log_softmax(-1)
    divergence = (right.exp() * (right - seen)).sum(1)
    losses = [float(-log.gather(1, truth[:, None]).mean()) for log in (right, seen)]
    return {
        "logit_error": float((found - exact).square().mean().sqrt()),
        "kl_mean": mean(divergence.tolist()),
        "kl_p99": float(divergence.quantile(0.99)),
        "top1_agreement": float((exact.argmax(1) == found.argmax(1)).float().mean()),
        "loss_change": losses[1] - losses[0],
    }


def prefill(engine: TransformersEngine, tokens: list[int], pages: list[int]) -> None:
    for start in range(0, len(tokens), CHUNK):
        engine.forward([Row(tokens[start : start + CHUNK], start, pages, wants_logits=False)])


def feed(engine: TransformersEngine, text: list[int], context: int, pages: list[int]) -> torch.Tensor:
    """Logits after each fed token: float32 `[FED, vocabulary]`."""
    rows = [Row([text[at]], at, pages) for at in range(context, context + FED)]
    return torch.cat([engine.forward([row]).float() for row in rows])


if __name__ == "__main__":
    main()
