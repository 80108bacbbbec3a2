"""The service is stopped and killed at every step of what it does, and restarted under load."""

import time

from faults_case import Campaign, Case
from faults_drive import ask_all, halted, joined, known, shared
from faults_halting import SERVICE_STEPS
from faults_node import Node, Worker

_GONE = (r"arena_read_total\{(unavailable|timed_out)\}", r"lookup_missed.*\{(unavailable|timed_out)\}")
_READING = ("leasing", "releasing")


def run(campaign: Campaign, node: Node, one: Worker, two: Worker) -> None:
    """All cases. The node's service is started here, and left running."""
    steps = SERVICE_STEPS if not campaign.is_quick else ("leasing", "heading", "sealing")
    for step in steps:
        _restart(node)
        with campaign.case("service SIGSTOP", step, [node], _GONE) as case:
            halt_service(case, node, one, two, step, is_killed=False)
        with campaign.case("service SIGKILL", step, [node], _GONE) as case:
            halt_service(case, node, one, two, step, is_killed=True)
    _restart(node)
    restarts = 2 if campaign.is_quick else 4
    with campaign.case("service killed and restarted under load", "any", [node], _GONE) as case:
        with case.load([one, two]):
            for _ in range(restarts):
                time.sleep(1.0)
                assert node.service is not None
                node.service.kill()
                time.sleep(0.7)
                node.serve(halting=True)
                joined(node)
        shared(case, one, two)
    with campaign.case("service drained and restarted under load", "any", [node], _GONE) as case:
        with case.load([one, two]):
            for _ in range(2):
                time.sleep(0.7)
                assert node.service is not None
                status = node.service.stop()
                if status != 0:
                    case.complain(f"a drained service ended with {status}")
                time.sleep(0.5)
                node.serve(halting=True)
                joined(node)
        shared(case, one, two)


def halt_service(case: Case, node: Node, one: Worker, two: Worker, step: str, *, is_killed: bool) -> None:
    """The service halts at a step, is killed there or goes on, and all is as before."""
    shared(case, one, two)
    prompts = known(case, one, 4)
    process = node.service
    assert process is not None
    if step == "registering":
        node.orders.write_text(step, encoding="utf-8")
        process.kill()
        process = node.begin_serving(halting=True)
        drive = lambda: None  # noqa: E731 – the workers come by themselves
    elif step in _READING:
        drive = lambda: _one(case, two, prompts.pop())  # noqa: E731
    else:
        drive = lambda: _one(case, one, case.documents.next())  # noqa: E731
    with halted(case, node.orders, process, step, drive):
        ask_all(case, [one, two], 4, prompts)
        if is_killed:
            process.kill()
            ask_all(case, [one, two], 2, prompts)
    if is_killed:
        node.serve(halting=True)
    joined(node)
    shared(case, one, two)
    shared(case, two, one)


def _one(case: Case, worker: Worker, prompt: list[int]) -> None:
    case.ask(worker, prompt)


def _restart(node: Node) -> None:
    """A service that runs and can be halted."""
    if node.service is None or not node.service.is_running:
        node.serve(halting=True)
    joined(node)
