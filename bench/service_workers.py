"""Two workers of one service: what the first computed, the second answers from; each in turn is the first.

Every context is asked about twice with the very same prompt, by the `openai` client, streaming: one worker answers
cold, then, when the blocks are in the arena, the other. The context ends where a block ends and the question is
shorter than a block, so that the second worker finds the context and computes the question. Another question about
it, to the first worker, says what a hit in a worker's own pool takes. Speed counts only if both answers are the same
and the second worker says that it found exactly the context.
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import httpx
from openai import OpenAI
from results_format import Results
from service_node import Node, Process, url_of, wait_until
from ttft_models import Texts

CONTEXT = 2_048
BLOCK = 32
QUESTION = BLOCK - 1
CHECKED_TOKENS = 8
THREADS = 2
SETTINGS = f"""
[engine]
device = "cpu"
dtype = "float32"
[pool]
block_tokens = {BLOCK}
size = "1GiB"
"""


@dataclass(frozen=True)
class Asked:
    """One answer."""

    ttft_s: float
    text: str
    cached: int  # tokens of the prompt that were found ready


class Asker:
    """The `openai` client of one worker."""

    def __init__(self, worker: Process) -> None:
        self.url = url_of(worker)
        self.api = OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=120)
        self.model = self.api.models.list().data[0].id

    def ask(self, prompt: Sequence[int], session: str = "", max_tokens: int = CHECKED_TOKENS) -> Asked:
        """Stream an answer to these tokens."""
        began, first, text, cached = time.perf_counter(), 0.0, "", 0
        stream = self.api.completions.create(
            model=self.model,
            prompt=list(prompt),
            max_tokens=max_tokens,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
            extra_headers={"x-kvprefetch-session": session} if session else {},
        )
        for chunk in stream:
            if chunk.choices:
                first = first or time.perf_counter()
                text += chunk.choices[0].text
            if chunk.usage is not None and chunk.usage.prompt_tokens_details is not None:
                cached = chunk.usage.prompt_tokens_details.cached_tokens or 0
        return Asked(first - began, text, cached)

    def metric(self, name: str) -> float:
        """One figure of the worker's /metrics; 0 where it has none yet."""
        text = httpx.get(self.url.removesuffix("/v1") + "/metrics", timeout=10).text
        return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name + " "))

    def written(self) -> float:
        """Blocks that it wrote to the arena."""
        return self.metric('kvprefetch_arena_written_total{what="written"}')


def two_workers(model: str, texts: Texts, results: Results, contexts: int = 8) -> None:
    """A row for every context, one of them all, and the figure. Raises RuntimeError where answers differ."""
    with ExitStack() as stack:
        node = stack.enter_context(Node("2GiB", SETTINGS))
        service = stack.enter_context(node.serve())
        workers = [stack.enter_context(node.start_worker(model, THREADS)) for _ in range(2)]
        askers = [Asker(worker) for worker in workers]
        for asker in askers:
            asker.ask(texts.context(300))  # the first forwards of a process are slower
        rows = [_one(askers[turn % 2], askers[1 - turn % 2], texts) for turn in range(contexts)]
        for process in (*workers, service):
            if process.stop() != 0:
                raise RuntimeError(f"{process.arguments} ended badly: " + "\n".join(process.lines[-20:]))
    row = {"section": "two workers", "model": Path(model).name, "dtype": "float32", **_row(rows)}
    results.rows += [{"section": "two workers, each context", **one} for one in rows] + [row]
    print(row, flush=True)
    results.figures["second_worker_over_cold_2048"] = row["second_over_cold"]


def _one(first: Asker, second: Asker, texts: Texts) -> dict[str, Any]:
    context, question, other = texts.context(CONTEXT), texts.suffix(QUESTION), texts.suffix(QUESTION)
    before = first.written()
    cold = first.ask(context + question)
    wait_until(
        lambda: first.written() >= before + CONTEXT // BLOCK, "what was computed is not written to the arena", 30
    )
    found = second.ask(context + question)
    resident = first.ask(context + other)
    if found.text != cold.text:
        raise RuntimeError(f"the second worker answers {found.text!r}, the first {cold.text!r}; no times reported")
    cached = (cold.cached, found.cached, resident.cached)
    if cached != (0, CONTEXT, CONTEXT):
        raise RuntimeError(f"found ready were {cached} tokens instead of {(0, CONTEXT, CONTEXT)}; no times reported")
    times = {"cold_s": cold.ttft_s, "second_s": found.ttft_s, "resident_s": resident.ttft_s}
    return {name: round(value, 4) for name, value in times.items()}


def _row(rows: list[dict[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {"context": CONTEXT, "question": QUESTION, "n": len(rows)}
    row |= {"answers_equal": True, "cached_tokens": CONTEXT}
    row |= {name: round(median(one[name] for one in rows), 4) for name in rows[0]}
    for name, other in (("second", "cold"), ("second", "resident"), ("resident", "cold")):
        ratios = [one[f"{name}_s"] / one[f"{other}_s"] for one in rows]
        row[f"{name}_over_{other}"] = round(median(ratios), 4)
    return row
