"""Ten thousand requests, and neither the service nor the worker is larger afterwards.

Counted is private memory; the arena and the weights' file are mapped. The first fifth fills caches that are bounded
(the pool, the arena, remembered keys), so growth is measured from there on. Some requests are malformed, and some are
given up by who asked.
"""

import threading
from contextlib import suppress

import httpx
from faults_case import Campaign, Case
from faults_node import VOCABULARY, Node, Worker
from faults_process import resident_mb

_THREADS = 3
_TOKENS = 64


def run(campaign: Campaign, node: Node, one: Worker, two: Worker) -> float:
    """MiB that the service, or a worker, has grown by, whichever is more."""
    count = 500 if campaign.is_quick else 10_000
    with campaign.case("none", f"{count} requests", [node], (r"http_requests_total",)) as case:
        assert node.service is not None
        pids = {"service": node.service.pid, "one": one.process.pid, "two": two.process.pid}
        _ask(campaign, [one, two], count // 5)
        before = {name: resident_mb(pid) for name, pid in pids.items()}
        _ask(campaign, [one, two], count - count // 5)
        after = {name: resident_mb(pid) for name, pid in pids.items()}
        _close(case, [one, two])
    grown = {name: round(after[name] - before[name], 2) for name in pids}
    campaign.rows[-1] |= {"requests": count, "grown_mb": grown, "resident_mb": {n: round(v) for n, v in after.items()}}
    return max(grown.values())


def _ask(campaign: Campaign, workers: list[Worker], count: int) -> None:
    """By several threads; a third of the documents are asked again elsewhere."""
    left, lock = [count], threading.Lock()

    def run(number: int) -> None:
        with httpx.Client(timeout=60) as http:
            turn = number
            while True:
                with lock:
                    if left[0] <= 0:
                        return
                    left[0] -= 1
                turn += 1
                prompt = campaign.documents.next(_TOKENS)
                worker = workers[turn % len(workers)]
                if turn % 50 == 0:
                    http.post(f"{worker.url}/v1/completions", json={"prompt": "x" * VOCABULARY, "n": 7})
                elif turn % 51 == 0:
                    with suppress(httpx.TimeoutException):
                        worker.ask(prompt, tokens=64, timeout_s=0.02)
                else:
                    worker.ask(prompt, tokens=1, http=http)
                    if turn % 3 == 0:
                        workers[(turn + 1) % len(workers)].ask(prompt, tokens=1, http=http)

    crew = [threading.Thread(target=run, args=(number,)) for number in range(_THREADS)]
    for thread in crew:
        thread.start()
    for thread in crew:
        thread.join()


def _close(case: Case, workers: list[Worker]) -> None:
    """What they answer now is as right as ever."""
    for worker in workers:
        case.ask(worker)
