"""A few faults of the campaign (`bench/faults.py`), each a story: what breaks, nobody is answered wrongly, nothing
stays held, and a counter says why. Real processes, real signals; how late answers are is the campaign's to measure."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from faults_arena import Bits, flip_and_read
from faults_case import Campaign, Case
from faults_drive import ask_all, halted, joined, known, shared
from faults_malformed import over_grpc, over_http
from faults_node import Node, Worker, write_model
from faults_process import until
from faults_proxy import Proxy, Weather
from faults_services import halt_service
from faults_workers import halt_worker, held

from kvprefetch.tiers.slots import SlotState


@dataclass
class Stage:
    campaign: Campaign
    node: Node
    one: Worker
    two: Worker  # which can be made to halt, and whose line to the service is `proxy`
    proxy: Proxy

    @contextmanager
    def case(self, *names: str) -> Iterator[Case]:
        """What happens in it is wrong for nobody, leaves nothing behind, and is named by one of these counters."""
        with self.campaign.case("", "", [self.node], names) as case:
            yield case
        row = self.campaign.rows[-1]
        assert "problems" not in row, row
        assert (row["wrong"], row["leases"], row["pages"]) == (0, 0, 0), row
        assert row["requests"] > 0
        assert row["counter"], row


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("faults")
    model = write_model(folder / "model")
    alone, node = Node(folder / "alone", model, "alone"), Node(folder / "node", model, "node")
    proxy = Proxy(node.port)
    try:
        cold = alone.start_worker("cold", address="none")
        node.begin_serving(halting=True)
        one = node.start_worker("one")
        two = node.start_worker("two", address=f"127.0.0.1:{proxy.port}", halting=True)
        for worker in (cold, one, two):
            assert worker.url
        joined(node)
        yield Stage(Campaign(folder, cold, 0, is_quick=True), node, one, two, proxy)
    finally:
        node.close()
        alone.close()
        proxy.close()


@pytest.mark.parametrize(("step", "is_killed"), [("leasing", False), ("heading", True), ("sealing", True)])
def test_a_service_that_stands_still_or_is_killed_half_way_costs_its_blocks_and_nothing_else(
    stage: Stage, step: str, is_killed: bool
) -> None:
    with stage.case(r"lookup_missed.*\{(timed_out|unavailable)\}", r"arena_read.*\{unavailable\}") as case:
        halt_service(case, stage.node, stage.one, stage.two, step, is_killed=is_killed)


@pytest.mark.parametrize("step", ["writing", "loading"])
def test_a_worker_that_stands_still_half_way_harms_nobody_and_goes_on(stage: Stage, step: str) -> None:
    with stage.case(r"service\.silent") as case:
        halt_worker(case, stage.node, stage.one, stage.one, stage.two, step)


def test_a_worker_that_wakes_up_and_writes_on_after_the_service_was_killed_spoils_nothing(stage: Stage) -> None:
    node, one, two = stage.node, stage.one, stage.two
    with stage.case("readmitted_returned") as case:
        assert node.service is not None
        with halted(case, two.orders, two.process, "writing", lambda: case.ask(two)):
            node.service.kill()
            node.serve(halting=True)
            joined(node, 1)
            assert held(node)["quarantined_orphaned"] > 0
            known(case, one, 4)
        joined(node)
        case.asked.seconds.clear()  # who was stopped was late
        shared(case, two, one)


def test_bits_that_flip_in_the_arena_are_found_out(stage: Stage) -> None:
    (path,) = (stage.node.folder / "arena").glob("*.arena")
    bits = Bits(path, 0)
    with stage.case(r"arena_read_total\{corrupt\}") as case:
        flip_and_read(case, stage.one, stage.two, lambda: bits.flip(bits.in_headers(bits.slots(SlotState.SEALED))))
    with stage.case(r"arena_read_total\{corrupt\}") as case:
        flip_and_read(case, stage.one, stage.two, lambda: bits.flip(bits.in_blocks(bits.slots(SlotState.SEALED))))


def test_a_line_that_is_silent_and_one_that_breaks_cost_a_moment(stage: Stage) -> None:
    for weather in (Weather(is_held=True), Weather(cut_after=200)):
        with stage.case(r"two\..*arena_read_total\{(timed_out|unavailable)\}") as case:
            shared(case, stage.one, stage.two)
            stage.proxy.weather = weather
            if weather.cut_after:
                stage.proxy.cut()
            ask_all(case, [stage.two], 3)
            stage.proxy.clear()
            joined(stage.node)
            shared(case, stage.one, stage.two)


def test_malformed_requests_are_refused_and_harm_nobody(stage: Stage) -> None:
    with stage.case(r"service\.refused") as case:
        over_grpc(case, stage.node, 60, [stage.one, stage.two])
    with stage.case(r"http_requests_total\{[^}]*4\d\d\}") as case:
        over_http(case, stage.one, 60, [stage.one, stage.two])


def test_a_killed_workers_death_frees_what_it_held(stage: Stage) -> None:
    """The last story: it is not started again."""
    node, one, two = stage.node, stage.one, stage.two
    with stage.case("_died", r"\.died$") as case:
        with halted(case, two.orders, two.process, "writing", lambda: _ask_in_vain(two, case.documents.next())):
            until(lambda: held(node)["reservations"] > 0, "it writes to nothing", 10)
            two.process.kill()
            ask_all(case, [one], 3)
        node.end_worker(two)


def _ask_in_vain(worker: Worker, prompt: list[int]) -> None:
    import httpx

    with httpx.Client() as http, pytest.raises(httpx.HTTPError):
        worker.ask(prompt, http=http)


def test_nothing_was_logged_that_nobody_expected(stage: Stage) -> None:
    logs: list[Path] = sorted(stage.node.folder.glob("*.log"))
    assert logs
    for log in logs:
        text = log.read_text(encoding="utf-8", errors="replace")
        assert text.count("Traceback") == text.count("\nh11._util.LocalProtocolError"), log  # uvicorn's own, on garbage
