"""What wrong speculation does to live requests: the same requests with and without it, alternating in one run."""

import random
import time
from collections.abc import Callable
from statistics import quantiles
from typing import Any

from ttft_models import Texts

from kvprefetch.inprocess import Local
from kvprefetch.worker.hints import Prefetch

BLOCK = 16  # requests before the other side's turn
WRONG_TOKENS = 2048
Prompts = list[list[int]]


def live_harm(kv: Local, texts: Texts, requests: int) -> list[dict[str, Any]]:
    """TTFT of follow-ups (a resident context and 32 new tokens) and of fresh 128-token prompts, ratio on ÷ off.

    On: hints that nobody follows keep every idle moment busy. Both sides get prompts of the same sizes at the
    same random moments.
    """
    kinds: dict[str, Callable[[], Prompts]] = {
        "follow-up 1K + 32": lambda: _follow_ups(kv, texts),
        "fresh 128": lambda: [texts.context(128) for _ in range(BLOCK)],
    }
    rows = []
    for kind, draw in kinds.items():
        off: list[float] = []
        on: list[float] = []
        for turn in range(max(1, requests // BLOCK)):
            pauses = [texts.random.uniform(0.02, 0.5) for _ in range(BLOCK)]
            sides = [(off, False), (on, True)]
            for times, busy in sides if turn % 2 == 0 else reversed(sides):
                times += _serve(kv, texts, draw(), pauses, busy)
        rows.append(_row(kv, kind, off, on))
    return rows


def _follow_ups(kv: Local, texts: Texts) -> Prompts:
    context = texts.context(1024)
    kv.generate(token_ids=context + texts.suffix(32), max_tokens=1).result()
    return [context + texts.suffix(32) for _ in range(BLOCK)]


def _serve(kv: Local, texts: Texts, prompts: Prompts, pauses: list[float], busy: bool) -> list[float]:
    wrong: list[Prefetch] = []
    times = []
    for prompt, pause in zip(prompts, pauses, strict=True):
        if busy:
            context = kv.context(token_ids=texts.context(WRONG_TOKENS))
            wrong.append(kv.prefetch(context, probability=random.choice((0.5, 0.9))))
        time.sleep(pause)
        done = kv.generate(token_ids=prompt, max_tokens=1, ignore_eos=True).result()
        assert done.ttft_s is not None
        times.append(done.ttft_s)
    for handle in wrong:
        handle.cancel()
    kv.stats()  # returns after the cancellations
    return times


def _row(kv: Local, kind: str, off: list[float], on: list[float]) -> dict[str, Any]:
    row: dict[str, Any] = {"dtype": str(kv.engine.shape.dtype).removeprefix("torch."), "live": kind, "n": len(off)}
    for name, index in (("p50", 49), ("p95", 94)):
        without, with_wrong = (quantiles(times, n=100, method="inclusive")[index] for times in (off, on))
        row |= {
            f"off_{name}_s": round(without, 4),
            f"on_{name}_s": round(with_wrong, 4),
            f"ratio_{name}": round(with_wrong / without, 4),
        }
    return row
