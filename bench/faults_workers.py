"""Workers are stopped and killed at every step of reserving, writing, committing and loading."""

import time
from collections.abc import Callable
from contextlib import suppress

from faults_case import Campaign, Case
from faults_drive import answer_of, ask_all, halted, joined, known, shared
from faults_halting import WORKER_STEPS
from faults_node import Node, Worker
from faults_process import until
from faults_proxy import Proxy

_WRITING = ("reserved", "writing", "written", "committed")
_RESERVED = ("reserved", "writing", "written")
_HELD = (
    r"service\.silent",
    r"held\.",
    r"not_reserved",
    r"reserved\.present",
    r"misses\.in_flight",
    r"arena_written_total\{present\}",
)
_DIED = (r"_died", r"\.died$")
_BACK = (r"readmitted_returned", r"quarantined", r"returned")


def run(campaign: Campaign, node: Node, one: Worker, two: Worker) -> None:
    """All cases. The node's service runs."""
    steps = WORKER_STEPS if not campaign.is_quick else ("writing", "loading")
    victims = {step: node.start_worker(f"victim-{at}", halting=True) for at, step in enumerate(steps)}
    proxy = Proxy(node.port)
    stale = node.start_worker("stale", address=f"127.0.0.1:{proxy.port}", halting=True)
    for worker in (*victims.values(), stale):
        assert worker.url
    joined(node)
    for step, victim in victims.items():
        with campaign.case("worker SIGSTOP", step, [node], _HELD) as case:
            halt_worker(case, node, one, two, victim, step)
        with campaign.case("worker SIGKILL", step, [node], _DIED) as case:
            halt_worker(case, node, one, two, victim, step, is_killed=True)
        node.end_worker(victim)
    try:
        _stale(campaign, node, one, two, stale, proxy)
    finally:
        node.end_worker(stale)
        proxy.close()


def halt_worker(
    case: Case, node: Node, one: Worker, two: Worker, victim: Worker, step: str, *, is_killed: bool = False
) -> None:
    """A worker halts at a step, is killed there or goes on, and all is as before for the others."""
    shared(case, one, two)
    (prompt,) = [case.documents.next()] if step in _WRITING else known(case, one, 1)
    answers: list[str] = []
    with halted(case, victim.orders, victim.process, step, answer_of(victim, prompt, answers)):
        what = "reservations" if step in _RESERVED else "leases"
        if step != "committed" and not _settles(lambda: held(node)[what] == 1):
            case.complain(f"a worker that stands still has {held(node)[what]} {what}")
        case.ask(one, prompt)  # what the halted one is writing, or reading
        ask_all(case, [one, two], 4, [prompt])
        _settles(lambda: node.stats()["service"]["silent"] > 0)
        case.look([node])
        if is_killed:
            victim.process.kill()
            ask_all(case, [one, two], 2)
    for answer in answers:
        case.is_right(prompt, answer)
    if not is_killed and not answers:
        case.complain("a worker that was continued has not answered")
    if not is_killed:
        shared(case, victim, two) and shared(case, one, victim)
    shared(case, one, two)


def _stale(campaign: Campaign, node: Node, one: Worker, two: Worker, stale: Worker, proxy: Proxy) -> None:
    """A worker stands still in the midst of writing, while others need its slots; then it goes on writing."""
    with campaign.case("worker SIGSTOP, its line cut", "writing", [node], _BACK) as case:
        shared(case, stale, two)
        prompt, answers = case.documents.next(), list[str]()
        with halted(case, stale.orders, stale.process, "writing", answer_of(stale, prompt, answers)):
            proxy.cut()
            until(lambda: held(node)["quarantined_vanished"] > 0, "a vanished worker's slots are not quarantined", 10)
            _fill(case, one, two)
        joined(node)
        _after(case, stale, two, prompt, answers)
    for how in ("killed", "stopped"):
        with campaign.case(f"worker SIGSTOP, service {how} and restarted", "writing", [node], _BACK) as case:
            shared(case, stale, two)
            prompt, answers = case.documents.next(), list[str]()
            with halted(case, stale.orders, stale.process, "writing", answer_of(stale, prompt, answers)):
                assert node.service is not None
                if how == "killed":
                    node.service.kill()
                elif node.service.stop() != 0:
                    case.complain("a service whose worker stands still does not end in order")
                node.serve(halting=True)
                joined(node, 2)
                ask_all(case, [one], 1)
                if not held(node)["quarantined_orphaned"]:
                    case.complain("what a worker that stands still was writing to is not quarantined after a restart")
                _fill(case, one, two)
            joined(node)
            _after(case, stale, two, prompt, answers)
    with campaign.case("worker and service SIGKILL", "writing", [node], (*_DIED, r"arena_read_total")) as case:
        with halted(case, stale.orders, stale.process, "writing", answer_of(stale, case.documents.next(), [])):
            assert node.service is not None
            node.service.kill()
            stale.process.kill()
            ask_all(case, [one, two], 3)
        node.serve(halting=True)
        joined(node)
        _fill(case, one, two)
        shared(case, one, two)


def _fill(case: Case, one: Worker, two: Worker) -> None:
    """More than the arena holds, so that every slot that may be is used again; most of it asked twice."""
    for _ in range(3):
        prompts = known(case, one, 6)
        for prompt in prompts:
            case.ask(two, prompt)


def _after(case: Case, stale: Worker, two: Worker, prompt: list[int], answers: list[str]) -> None:
    for answer in answers:
        case.is_right(prompt, answer)
    case.ask(two, prompt)
    time.sleep(0.3)
    shared(case, stale, two)
    shared(case, two, stale)


def _settles(holds: Callable[[], bool]) -> bool:
    """Whether it comes to hold: others may be writing and reading at the same moment."""
    with suppress(AssertionError):
        until(holds, "", 3.0)
    return holds()


def held(node: Node) -> dict[str, int]:
    """Over all namespaces."""
    total: dict[str, int] = {}
    for namespace in node.stats()["namespaces"].values():
        for name, count in namespace["held"].items():
            total[name] = total.get(name, 0) + count
    return total
