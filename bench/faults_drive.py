"""What cases do with nodes: share a document, order a halt, wait until a service and its workers know each other."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import grpc
import httpx
from faults_case import Case
from faults_node import Node, Worker
from faults_process import Process, until

HALT_S = 20.0  # within which a process must come to the step at which it was ordered to halt


def joined(node: Node, workers: int | None = None) -> None:
    """Wait until the service has all live workers of the node, or so many."""
    wanted = workers if workers is not None else sum(worker.process.is_running for worker in node.workers)

    def there() -> bool:
        try:
            return len(node.stats()["service"]["workers"]) >= wanted
        except grpc.RpcError:
            return False

    until(there, f"not all of {wanted} workers have registered at {node.name}")


def shared(case: Case, writer: Worker, reader: Worker, patience_s: float = 15.0) -> bool:
    """Ask the reader for fresh documents that the writer has computed, until it finds one; whether it did."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        prompt = case.documents.next()
        case.ask(writer, prompt)
        time.sleep(0.1)  # it is written behind
        if case.ask(reader, prompt):
            return True
    case.complain(f"{reader.name} finds nothing that {writer.name} has computed")
    return False


def known(case: Case, writer: Worker, count: int, wait_s: float = 0.3) -> list[list[int]]:
    """Documents that the writer has computed and, most likely, written to the arena."""
    prompts = [case.documents.next() for _ in range(count)]
    for prompt in prompts:
        case.ask(writer, prompt)
    time.sleep(wait_s)
    return prompts


def ask_all(case: Case, workers: Sequence[Worker], rounds: int, prompts: Sequence[list[int]] = ()) -> None:
    """So many fresh documents for each worker, and the given ones for the last of them, one after the other."""
    rest = list(prompts)
    for _ in range(rounds):
        for worker in workers:
            case.ask(worker)
        if rest:
            case.ask(workers[-1], rest.pop())


@contextmanager
def halted(case: Case, orders: Path, process: Process, step: str, drive: Callable[[], object]) -> Iterator[bool]:
    """Have a process halt at `step` while `drive` (in a thread) makes it come there; whether it did."""
    orders.write_text(step, encoding="utf-8")
    thread = threading.Thread(target=drive, daemon=True)
    thread.start()
    deadline = time.monotonic() + HALT_S
    while not process.is_frozen and process.is_running and time.monotonic() < deadline:
        time.sleep(0.002)
    halts = process.is_frozen
    if not halts:
        orders.unlink(missing_ok=True)
        case.complain(f"it never came to the step {step!r}")
    try:
        yield halts
    finally:
        if process.is_running and process.is_frozen:
            process.resume()
        thread.join(30.0)
        if thread.is_alive():
            case.complain(f"who was answered at the step {step!r} is not answered any more")


def answer_of(worker: Worker, prompt: list[int], answers: list[str]) -> Callable[[], None]:
    """Something that asks `worker` once and keeps the answer; one that was killed answers nothing."""

    def ask() -> None:
        with httpx.Client(timeout=60) as http:
            try:
                answers.append(worker.ask(prompt, http=http)[0])
            except httpx.HTTPError:
                return

    return ask
