"""Preloads of two workers behind one service, whose sessions' requests go to a random worker, or always to the same.

    python bench/routing.py --json bench/results/routing.json       # 4 minutes on 2 cores

Sessions take turns. Each turn adds a document to the conversation; with hints, `kvprefetch.connect` says so while the
user reads, and the service decides which worker makes it warm, and whether for that worker's own pool (`device`) or
for whoever gets the request (`host`, the arena). Then the question comes, through the worker's HTTP endpoint. A
placement is right if the request came to the worker that the preload had been given to.
"""

import argparse
import random
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from results_format import Results, hardware
from service_lookup import percentile
from service_node import Node, wait_until
from service_workers import SETTINGS, Asker
from ttft_models import Texts, cpu_model

import kvprefetch
from kvprefetch.client.connect import Connection
from kvprefetch.client.handle import Prefetch
from kvprefetch.demo.model import find_model
from kvprefetch.errors import UnknownModel

SESSIONS, TURNS = 8, 5  # the first turn is no follow-up
DOCUMENT, QUESTION = 256, 31  # tokens
READING_S = 5.0  # for all sessions together: eight documents on two workers
ROUTINGS = ("sticky", "random")


@dataclass
class Given:
    """One hint, and where the service wanted it."""

    handle: Prefetch
    place: str  # "device" or "host"


@dataclass
class FollowUp:
    """One question behind a document that the worker may or may not have ready."""

    ttft_s: float
    cached: float  # of the context's tokens, how many were found ready
    given: Given | None = None
    is_right: bool = False


@dataclass
class Session:
    """One user's conversation, as tokens."""

    name: str
    home: int  # the worker that it sticks to
    said: list[int] = field(default_factory=list)


class Routed:
    """Runs one arm: a routing, with or without hints."""

    def __init__(self, askers: list[Asker], names: list[str], kv: Connection, texts: Texts) -> None:
        self.askers, self.names, self.kv, self.texts = askers, names, kv, texts

    def run(self, routing: str, *, with_hints: bool, seed: int) -> list[FollowUp]:
        """All turns of all sessions; the follow-ups."""
        draw = random.Random(seed)
        sessions = [Session(f"{routing}-{with_hints}-{number}", number % 2) for number in range(SESSIONS)]
        found = []
        for turn in range(TURNS):
            given: dict[str, Given] = {}
            for session in sessions:
                session.said += self.texts.context(DOCUMENT)
                if with_hints and turn:
                    given[session.name] = self._hint(session)
            if given:
                time.sleep(READING_S)
            for session in draw.sample(sessions, SESSIONS):
                worker = session.home if routing == "sticky" else draw.randrange(2)
                answer = self._ask(session, worker, given.get(session.name))
                if turn:
                    found.append(answer)
        for session in sessions:
            self.kv.signal("session_ended", session=session.name)
        return found

    def _hint(self, session: Session) -> Given:
        before = self._placed()
        context = self.kv.context(token_ids=session.said)
        handle = self.kv.prefetch(context, session=session.name, probability=0.9, expected_in_s=READING_S)
        wait_until(lambda: handle.number != 0, "the service does not take a hint", 10)
        wait_until(lambda: self._placed() != before, "the service gives a hint to no worker", 10)
        after = self._placed()
        return Given(handle, next(place for place in after if after[place] != before.get(place, 0)))

    def _placed(self) -> dict[str, int]:
        tenants = self.kv.stats()["tenants"]
        placed: dict[str, int] = tenants.get("default", {}).get("hints", {}).get("placed", {})
        return placed

    def _ask(self, session: Session, worker: int, given: Given | None) -> FollowUp:
        context = len(session.said)
        session.said += self.texts.suffix(QUESTION)
        asked = self.askers[worker].ask(session.said, session.name, max_tokens=1)
        is_right = given is not None and given.handle.worker == self.names[worker]
        return FollowUp(asked.ttft_s, asked.cached / context, given, is_right)


def row_of(routing: str, with_hints: bool, found: list[FollowUp]) -> dict[str, Any]:
    """One arm, in figures."""
    times = [each.ttft_s for each in found]
    row: dict[str, Any] = {"routing": routing, "hints": with_hints, "follow_ups": len(found)}
    row |= {"ttft_p50_s": percentile(times, 50), "ttft_p95_s": percentile(times, 95)}
    row["cached_share"] = round(mean(each.cached for each in found), 4)
    given = [each for each in found if each.given is not None]
    if not given:
        return row
    for place in ("device", "host"):
        there = [each for each in given if each.given is not None and each.given.place == place]
        row[f"placed_{place}"] = len(there)
        if there:
            row[f"{place}_right"] = round(mean(each.is_right for each in there), 4)
            row[f"{place}_ttft_p50_s"] = percentile([each.ttft_s for each in there], 50)
    for is_right in (True, False):
        which = [each.ttft_s for each in given if each.is_right is is_right]
        if which:
            row[f"ttft_p50_{'right' if is_right else 'elsewhere'}_s"] = percentile(which, 50)
    uses = [each.given.handle.use for each in given if each.given is not None]
    row["uses"] = {use.name: uses.count(use) for use in set(uses) if use is not None}
    return row


def measure(model: str, texts: Texts, results: Results) -> None:
    """All arms, and the figures."""
    with ExitStack() as stack:
        node = stack.enter_context(Node("3GiB", SETTINGS.replace('"1GiB"', '"2GiB"')))
        service = stack.enter_context(node.serve())
        workers = [stack.enter_context(node.start_worker(model, threads=1)) for _ in range(2)]
        askers = [Asker(worker) for worker in workers]
        names = [f"{asker.model}@{worker.process.pid}" for asker, worker in zip(askers, workers, strict=True)]
        for asker in askers:
            asker.ask(texts.context(300))  # the first forwards of a process are slower
        for turn, routing in enumerate(ROUTINGS):
            if turn:  # what was learnt of one routing says nothing of another
                service.stop()
                service = stack.enter_context(node.serve())
            with kvprefetch.connect(node.address) as kv:
                _wait_registered(kv, 2)
                routed = Routed(askers, names, kv, texts)
                for with_hints in (False, True):
                    found = routed.run(routing, with_hints=with_hints, seed=results.seed)
                    row = row_of(routing, with_hints, found)
                    print(row, flush=True)
                    results.rows.append(row)
    _figures(results)


def _wait_registered(kv: Connection, workers: int) -> None:
    wait_until(lambda: kv.stats()["watched"] >= workers, "the workers do not register", 30)
    time.sleep(1.5)  # their streams are open, and have said how busy they are


def _figures(results: Results) -> None:
    arms = {(row["routing"], row["hints"]): row for row in results.rows}
    for routing in ROUTINGS:
        without, with_hints = arms[routing, False], arms[routing, True]
        for name in ("p50", "p95"):
            results.figures[f"hints_over_none_{name}_{routing}"] = (
                with_hints[f"ttft_{name}_s"] / without[f"ttft_{name}_s"]
            )
        placed = with_hints["placed_device"] + with_hints["placed_host"]
        results.figures[f"placed_device_share_{routing}"] = with_hints["placed_device"] / placed
        results.figures[f"device_right_{routing}"] = with_hints.get("device_right", 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", help="instead of SmolLM2: a folder, GGUF file or hub id")
    options = parser.parse_args()
    print(hardware())
    try:
        source = find_model(options.model)
    except UnknownModel as error:
        sys.exit(f"nothing was measured: {error}")
    results = Results("routing", options.seed)
    measure(source, Texts(cpu_model(source, "float32"), options.seed), results)
    print(results.figures)
    if options.json:
        results.write(options.json)


if __name__ == "__main__":
    main()
