"""Two tenants at two workers: one comes back to its documents all the time, the other floods for a while.

Before, during and after: ann asks short questions about a few documents; in the middle the flood sends long prompts
that nobody has seen, several at once at every worker. Half-way through the flood the operator gives ann another
guarantee, by the command line. The phase of a request is the one in which it began; the flood ends when its last
request has its answer.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random

from flood_node import ANN, FLOOD, Asked, Asker, Cluster
from ttft_models import Texts

PHASES = ("before", "during", "after")
Work = Callable[[threading.Event], None]
"""It ends when the event is set."""


@dataclass(frozen=True)
class Load:
    """What is asked; lengths in tokens, times in seconds."""

    phases_s: tuple[float, float, float] = (25.0, 50.0, 25.0)
    documents: int = 4  # of ann's at each worker
    document: int = 256
    question: int = 31
    pause_s: float = 8.0  # between two questions about a document, on average
    floods: int = 3  # prompts at once at each worker
    flood: tuple[int, int] = (256, 512)  # the shortest and the longest of them


@dataclass(frozen=True)
class Scene:
    """What happened; times in seconds of `time.monotonic`."""

    asked: list[Asked]
    flooded: tuple[float, float]  # when the flood began and had ended
    changed: tuple[float, float] | None  # when the operator's command began and had ended
    evictions: float  # blocks that the workers evicted during the flood

    def of(self, who: str, phase: str) -> list[Asked]:
        """Its requests that began in the phase."""
        return [each for each in self.asked if each.who == who and self.phase(each) == phase]

    def phase(self, asked: Asked) -> str:
        """In which it began."""
        begins, ends = self.flooded
        return PHASES[(asked.at >= begins) + (asked.at >= ends)]

    def ttfts(self, phase: str) -> list[float]:
        """Ann's, in seconds; a request that failed has none."""
        return [each.ttft_s for each in self.of(ANN, phase) if not each.failed]

    def reused(self, phase: str) -> float:
        """Share of the tokens of ann's documents that were found."""
        asked = self.of(ANN, phase)
        return sum(each.cached for each in asked) / sum(each.context for each in asked)

    @property
    def failed(self) -> list[str]:
        """Why requests failed."""
        return [f"{each.who}: {each.failed}" for each in self.asked if each.failed]


class Driver:
    """Asks in threads, each with a client of its own. `credential`: whose the flood comes with."""

    def __init__(self, cluster: Cluster, texts: Texts, load: Load, credential: str = FLOOD) -> None:
        self.cluster, self.texts, self.load, self.credential = cluster, texts, load, credential
        self.asked: list[Asked] = []

    def run(self, change: Callable[[], object] | None = None) -> Scene:
        """The three phases; `change` is called half-way through the flood, and what it raises is raised."""
        before_s, during_s, after_s = self.load.phases_s
        workers, changed = range(len(self.cluster.urls)), None
        talks = [self._talk(worker, number) for worker in workers for number in range(self.load.documents)]
        with _threads(talks):
            time.sleep(before_s)
            begins, evicted = time.monotonic(), self.cluster.evictions()
            with _threads([self._flood(worker) for worker in workers for _ in range(self.load.floods)]):
                time.sleep(during_s / 2)
                if change is not None:
                    at = time.monotonic()
                    change()
                    changed = at, time.monotonic()
                time.sleep(max(begins + during_s - time.monotonic(), 0.0))
            ends, evicted = time.monotonic(), self.cluster.evictions() - evicted
            time.sleep(after_s)
        return Scene(sorted(self.asked, key=lambda each: each.at), (begins, ends), changed, evicted)

    # -- within ----------------------------------------------------------------------------------------
    def _talk(self, worker: int, number: int) -> Work:
        """Questions about one of ann's documents, which has been asked about once."""
        load, random = self.load, Random(f"{worker} {number}")
        asker, document = Asker(self.cluster.urls[worker], ANN, worker), self.texts.context(load.document)
        session = f"document {worker} {number}"
        asker.ask(document + self.texts.suffix(load.question), session=session)

        def talk(stop: threading.Event) -> None:
            while not stop.wait(load.pause_s * random.uniform(0.5, 1.5)):
                question = self.texts.suffix(load.question)
                self.asked.append(asker.ask(document + question, load.document, session=session))

        return talk

    def _flood(self, worker: int) -> Work:
        """Prompts that nobody has seen, one after the other."""
        asker = Asker(self.cluster.urls[worker], FLOOD, worker, self.credential)

        def flood(stop: threading.Event) -> None:
            while not stop.is_set():
                prompt = self.texts.context(self.texts.random.randint(*self.load.flood))
                self.asked.append(asker.ask(prompt))

        return flood


@contextmanager
def _threads(works: list[Work]) -> Iterator[None]:
    """Each in a thread, until the block ends; then what they have begun is waited for."""
    stop = threading.Event()
    threads = [threading.Thread(target=work, args=(stop,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
