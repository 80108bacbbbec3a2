"""An interactive tenant's short prompts beside a batch tenant's queue of long ones, on one real worker.

Nothing is found in a cache: every prompt is new, so what counts is who is computed first. FIFO is the same requests
through one queue at the client, in order of arrival, one at a time: the worker has no such order.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import Any

from flood_node import ANN, FLOOD, Asked, Asker, Cluster, Sizes
from results_format import Results
from service_lookup import percentile
from ttft_models import Texts


@dataclass(frozen=True)
class Beside:
    """What is asked; lengths in tokens, times in seconds."""

    tokens: int = 512
    requests: int = 40
    pause_s: float = 2.0  # between two, on average: it uses less than half of the engine
    batch_tokens: int = 2_048
    queued: int = 4  # of the batch, all the time
    fifo_requests: int = 10
    threads: int = 2


class Bench:
    """One worker, and both tenants' clients."""

    def __init__(self, cluster: Cluster, texts: Texts, beside: Beside) -> None:
        self.url, self.texts, self.beside = cluster.urls[0], texts, beside
        self.asker = Asker(self.url, ANN, 0)
        self.batch: list[Asked] = []

    def alone(self) -> list[Asked]:
        """The interactive tenant's requests, with pauses."""
        return [self._one() for _ in range(self.beside.requests)]

    @contextmanager
    def queue(self) -> Iterator[None]:
        """The batch tenant asks, so many at once."""
        stop = threading.Event()

        def ask(asker: Asker) -> None:
            while not stop.is_set():
                self.batch.append(asker.ask(self.texts.context(self.beside.batch_tokens)))

        askers = [Asker(self.url, FLOOD, 0) for _ in range(self.beside.queued)]
        threads = [threading.Thread(target=ask, args=(asker,), daemon=True) for asker in askers]
        for thread in threads:
            thread.start()
        try:
            time.sleep(self.beside.pause_s)
            yield
        finally:
            stop.set()
            for thread in threads:
                thread.join()

    def fifo(self) -> list[float]:
        """TTFT through one queue, from arrival on."""
        asker, arrivals, found = Asker(self.url, FLOOD, 0), SimpleQueue[float | None](), list[float]()
        for _ in range(self.beside.queued):
            arrivals.put(None)
        arrivals.put(time.monotonic())
        while len(found) < self.beside.fifo_requests:
            arrived = arrivals.get()
            if arrived is None:
                arrivals.put(None)  # another one comes
                self.batch.append(asker.ask(self.texts.context(self.beside.batch_tokens)))
            else:
                asked = self._ask()
                found.append(asked.at + asked.ttft_s - arrived)
                arrivals.put(asked.ended)
                self.batch.append(asked)
        return found

    def _one(self) -> Asked:
        time.sleep(self.beside.pause_s * self.texts.random.uniform(0.5, 1.5))
        return self._ask()

    def _ask(self) -> Asked:
        return self.asker.ask(self.texts.context(self.beside.tokens))


def interactive(model: str, texts: Texts, sizes: Sizes, beside: Beside, results: Results) -> None:
    """Three rows and the two figures. Raises RuntimeError where a request failed or a book is wrong."""
    pool = (beside.queued + 1) * beside.batch_tokens + beside.tokens
    sizes = replace(sizes, pool=pool, arena=pool // 2, threads=beside.threads)
    with Cluster(model, sizes, workers=1) as cluster:
        bench = Bench(cluster, texts, beside)
        bench.asker.ask(texts.context(300))  # the first forwards of a process are slower
        alone = bench.alone()
        with bench.queue():
            queued = bench.alone()
        fifo = bench.fifo()
        cluster.prove()
    failed = [each.failed for each in (*alone, *queued, *bench.batch) if each.failed]
    if failed:
        raise RuntimeError(f"{len(failed)} requests failed: {failed[:3]}")
    about: dict[str, Any] = {"section": "interactive", "tokens": beside.tokens, "batch_tokens": beside.batch_tokens}
    times = {"alone": [each.ttft_s for each in alone], "queued": [each.ttft_s for each in queued], "fifo": fifo}
    for name, values in times.items():
        row = {**about, "order": name, "n": len(values), **{f"p{x}_s": percentile(values, x) for x in (50, 99)}}
        results.rows.append(row)
        print(row, flush=True)
    for percent in (50, 99):
        base = percentile(times["alone"], percent)
        results.figures[f"interactive_p{percent}_ratio_worker"] = percentile(times["queued"], percent) / base
        results.figures[f"interactive_p{percent}_ratio_fifo"] = percentile(times["fifo"], percent) / base
