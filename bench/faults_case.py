"""One case of the fault campaign: requests, each beside its cold run, while something is broken; then the books.

Promises
- An answer is wrong unless it equals, token by token, the answer of a worker that shares nothing, computed before it
  from an empty cache. That cold run is timed too, a moment before and under the same conditions. A request is late if
  it takes longer than the 99th percentile of the campaign's cold runs + 50 ms: of those made one at a time, if it was
  itself, else of those made several at a time.
- A fault has a name if a counter grew that one of the case's patterns matches: of the service (`node.…`, Admin.Stats)
  or of a worker (`one.…`, /metrics). What is wrong with a case goes into its row; nothing here ends the campaign.
"""

import random
import re
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
from faults_node import VOCABULARY, Node, Worker, flat
from faults_process import waited_s

TOKENS = 576  # of a document: 36 blocks
GRACE_S = 0.05
SETTLE_S = 10.0  # after which nothing may be held any more
_LEASES = re.compile(r"\.leases$|\.reservations$|kvprefetch_arena_leases")
_PAGES = re.compile(r"\.quarantined|pool_pages\{(in_flight|quarantined)\}")


@dataclass
class Asked:
    """What a case has seen."""

    cold: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    whom: list[str] = field(default_factory=list)  # asked, with how long after the case began
    cached: list[int] = field(default_factory=list)
    wrong: int = 0
    refused: list[str] = field(default_factory=list)  # requests that failed: counted as wrong
    complaints: list[str] = field(default_factory=list)

    is_crowded: bool = False  # requests were made several at a time


class Documents:
    """Prompts that nobody has seen before, the same for the same seed. Thread-safe."""

    def __init__(self, seed: int) -> None:
        self._random, self._lock = random.Random(seed), threading.Lock()

    def next(self, tokens: int = TOKENS) -> list[int]:
        """A fresh one."""
        with self._lock:
            return [self._random.randrange(2, VOCABULARY) for _ in range(tokens)]


class Case:
    """A case under way. Thread-safe."""

    def __init__(self, cold: Worker, documents: Documents, fault: str, step: str) -> None:
        self.cold, self.documents, self.fault, self.step = cold, documents, fault, step
        self.asked, self._began = Asked(), time.perf_counter()
        self.seen: dict[str, float] = {}
        self._answers: dict[tuple[int, ...], str] = {}
        self._lock = threading.Lock()

    def ask(self, worker: Worker, prompt: list[int] | None = None, http: "Pair | None" = None) -> int:
        """Ask a worker, beside the cold run of the same prompt; the tokens that were found ready."""
        prompt = prompt if prompt is not None else self.documents.next()
        expected = self._cold(prompt, http)
        waited, began = waited_s(worker.process.pid), time.perf_counter()
        try:
            answer, cached = worker.ask(prompt, http=http.warm if http else None)
        except httpx.HTTPError as error:
            with self._lock:
                self.asked.refused.append(f"{worker.name}: {error!r}")
            return 0
        seconds = time.perf_counter() - began
        waited = waited_s(worker.process.pid) - waited
        with self._lock:
            self.asked.seconds.append(seconds)
            self.asked.whom.append(
                f"{worker.name} at {began - self._began:.2f} s, {cached} cached: {seconds:.3f} s, of which it waited "
                f"{waited:.3f} s for a processor"
            )
            self.asked.cached.append(cached)
            self.asked.wrong += answer != expected
        return cached

    def is_right(self, prompt: list[int], answer: str) -> None:
        """Judge an answer that was got in another way, whose time does not count."""
        self.asked.wrong += answer != self._cold(prompt, None)

    def look(self, nodes: Sequence[Node]) -> None:
        """While something stands still: what is shown now counts as what has grown."""
        self.seen |= figures(nodes)

    def complain(self, complaint: str) -> None:
        """Something that has no figure of its own is not as it should be."""
        self.asked.complaints.append(complaint)

    @contextmanager
    def load(self, workers: Sequence[Worker], threads: int = 2) -> Iterator[None]:
        """Requests go on and on meanwhile: fresh documents, and every other one again at another worker."""
        over = threading.Event()
        self.asked.is_crowded = True

        def run(number: int) -> None:
            with Pair() as pair:
                turn = number
                while not over.is_set():
                    prompt = self.documents.next()
                    self.ask(workers[turn % len(workers)], prompt, pair)
                    if turn % 2 and not over.is_set():
                        self.ask(workers[(turn + 1) % len(workers)], prompt, pair)
                    turn += 1

        crew = [threading.Thread(target=run, args=(number,)) for number in range(threads)]
        for thread in crew:
            thread.start()
        try:
            yield
        finally:
            over.set()
            for thread in crew:
                thread.join()

    def _cold(self, prompt: list[int], http: "Pair | None") -> str:
        key = tuple(prompt)
        known = self._answers.get(key)
        if known is not None:
            return known
        began = time.perf_counter()
        answer, cached = self.cold.ask(prompt, http=http.cold if http else None)
        seconds = time.perf_counter() - began
        assert not cached, "a cold run was not cold"
        with self._lock:
            self.asked.cold.append(seconds)
            self._answers[key] = answer
        return answer


class Pair:
    """Connections of one thread, to the worker under test and to the cold one."""

    def __enter__(self) -> "Pair":
        self.warm, self.cold = httpx.Client(timeout=60), httpx.Client(timeout=60)
        return self

    def __exit__(self, *exception: object) -> None:
        self.warm.close()
        self.cold.close()


class Campaign:
    """All cases; fills `rows`. `nodes`: those whose services and workers are looked at after each."""

    def __init__(self, folder: Path, cold: Worker, seed: int, *, is_quick: bool = False) -> None:
        self.folder, self.cold, self.is_quick = folder, cold, is_quick
        self.documents = Documents(seed)
        self.rows: list[dict[str, Any]] = []
        self._asked: list[Asked] = []  # by the cases in `rows`
        self.memory_growth_mb = 0.0

    @contextmanager
    def case(self, fault: str, step: str, nodes: Sequence[Node], names: Sequence[str]) -> Iterator[Case]:
        """A case; when its block ends the fault must be healed. `names`: patterns of the counters that name it."""
        began, case = time.monotonic(), Case(self.cold, self.documents, fault, step)
        before = figures(nodes)
        try:
            yield case
        except (AssertionError, httpx.HTTPError, grpc.RpcError, OSError) as error:
            case.complain(f"the case itself broke: {error!r}"[:600])
        leases, pages = leaks(nodes, case)
        grown = growth(before, case.seen) | growth(before, figures(nodes))
        named = {name: grown[name] for pattern in names for name in sorted(grown) if re.search(pattern, name)}
        self._add(case, leases, pages, named, grown, time.monotonic() - began)

    def _add(
        self, case: Case, leases: float, pages: float, named: dict[str, float], grown: dict[str, float], took: float
    ) -> None:
        asked = case.asked
        row: dict[str, Any] = {
            "fault": case.fault,
            "step": case.step,
            "requests": len(asked.seconds),
            "cached": sum(count > 0 for count in asked.cached),
            "slowest": round(max(asked.seconds, default=0.0), 4),
            "slowest_cold": round(max(asked.cold, default=0.0), 4),
            "wrong": asked.wrong + len(asked.refused),
            "leases": leases,
            "pages": pages,
            "counter": next((f"{name} +{value:g}" for name, value in named.items()), ""),
            "seconds": round(took, 1),
        }
        problems = asked.refused[:3] + asked.complaints[:3]
        if problems:
            row["problems"] = problems
        if not named:
            row["grown"] = {name: value for name, value in sorted(grown.items()) if not re.search("seconds|_sum", name)}
        self.rows.append(row)
        self._asked.append(asked)
        print(row, flush=True)

    def judge(self) -> None:
        """Say which requests were late, now that all cold runs are there."""
        for is_crowded in (False, True):
            pairs = [(r, a) for r, a in zip(self.rows, self._asked, strict=True) if a.is_crowded == is_crowded]
            cold = [seconds for _, asked in pairs for seconds in asked.cold]
            if not cold:
                continue
            bound = float(np.quantile(cold, 0.99)) + GRACE_S
            for row, asked in pairs:
                late = [whom for whom, took in zip(asked.whom, asked.seconds, strict=True) if took > bound]
                row |= {"bound": round(bound, 4), "late": len(late)}
                if late:
                    row["late_ones"] = late[:5]

    def figures(self) -> dict[str, float]:
        """The named ones, of all cases. What is complained of counts as unnamed."""
        rows = self.rows
        return {
            "cases": len(rows),
            "wrong_tokens": sum(row["wrong"] for row in rows),
            "late_requests": sum(row.get("late", 0) for row in rows),
            "leaked_leases": sum(row["leases"] for row in rows),
            "leaked_pages": sum(row["pages"] for row in rows),
            "unnamed_reasons": sum(not row["counter"] or "problems" in row for row in rows),
            "memory_growth_mb": self.memory_growth_mb,
        }


def figures(nodes: Sequence[Node]) -> dict[str, float]:
    """Of all services and workers that answer."""
    found: dict[str, float] = {}
    for node in nodes:
        if node.service is not None and node.service.is_running and not node.service.is_frozen:
            stats = node.stats()
            found |= flat(stats, node.name)
            found[f"{node.name}.run"] = float(int(stats["run"][:8], 16))
        for worker in node.workers:
            if worker.process.is_running and not worker.process.is_frozen:
                found |= {f"{worker.name}.{name}": value for name, value in worker.metrics().items()}
    return found


def growth(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """What became more. The figures of a service that was restarted begin anew."""
    grown = {}
    for name, value in after.items():
        run = f"{name.partition('.')[0]}.run"
        base = before.get(name, 0.0) if before.get(run) == after.get(run) else 0.0
        if value > base and name != run:
            grown[name] = value - base
    return grown


def leaks(nodes: Sequence[Node], case: Case) -> tuple[float, float]:
    """Leases and pages that are still held 10 s after; looks until there are none."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        leases, pages, failed = _held(nodes)
        if not (leases or pages or failed) or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    if failed:
        case.complain(failed)
    return leases, pages + bool(failed)


def _held(nodes: Sequence[Node]) -> tuple[float, float, str]:
    try:
        for node in nodes:
            if node.service is not None and node.service.is_running:
                node.stats(check=True)
        found = figures(nodes)
    except grpc.RpcError as error:
        return 0.0, 0.0, f"{error.code().name}: {error.details()}"
    leases = sum(value for name, value in found.items() if _LEASES.search(name))
    pages = sum(value for name, value in found.items() if _PAGES.search(name))
    return leases, pages, ""
