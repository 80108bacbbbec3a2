"""What must survive when the service goes, comes back as another one, or is fed nonsense."""

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from processes import until
from service_thread import ServiceThread, attached, written
from workers import cold_answer, text

import kvprefetch
from kvprefetch.engines.engine import TransformersEngine
from kvprefetch.inprocess import Local
from kvprefetch.v1 import hints_pb2
from kvprefetch.worker.link import Link
from kvprefetch.worker.station import Station

Open = Callable[..., TransformersEngine]


@pytest.fixture
def service(tmp_path: Path) -> Iterator[ServiceThread]:
    service = ServiceThread(tmp_path)
    yield service
    service.end()


def station(kv: Local) -> Station:
    assert kv.core.station is not None
    return kv.core.station


def link(kv: Local) -> Link:
    assert kv.core.link is not None
    return kv.core.link


def ask(kv: Local, prompt: list[int], session: str = "") -> list[int]:
    return kv.generate(token_ids=prompt, max_tokens=4, ignore_eos=True, session=session).result().tokens


def break_stream(kv: Local) -> None:
    """The stream breaks, the service lives on."""
    station(kv)._call.cancel()
    until(lambda: not station(kv).is_connected, "it does not break")


def test_a_long_session_name_stops_nobodys_blocks(open_tiny: Open, service: ServiceThread) -> None:
    with attached(open_tiny(), service) as kv:
        ask(kv, text(1, 200), "s" * 400)
        ask(kv.as_tenant("bob"), text(2, 200), "ok")
        written(kv, service)
        assert link(kv).stats()["written"]["written"] >= 24


def test_a_context_that_cannot_be_read_fails_alone(open_tiny: Open, service: ServiceThread) -> None:
    with attached(open_tiny(), service) as kv, kvprefetch.connect(service.address) as client:
        nested = hints_pb2.Context(messages=b"[" * 100_000)
        call = station(kv)._call
        hint = client.prefetch(client.context(token_ids=text(1, 50)), session="s")
        client._signals.put(hints_pb2.SignalRequest(kind="k", session="s", contexts=[nested]))
        assert hint.wait(30).outcome is kvprefetch.Outcome.WARM
        until(lambda: service.server.book.tenants["default"].stats()["outcomes"]["FAILED"] == 1, "it does not fail")
        assert station(kv)._call is call  # the stream is the same


def test_a_hint_that_is_open_when_the_stream_breaks_is_not_withdrawn(open_tiny: Open, service: ServiceThread) -> None:
    with attached(open_tiny(), service) as kv, kvprefetch.connect(service.address) as client:
        hint = client.prefetch(client.context(token_ids=text(1, 200)), probability=0.0, expected_in_s=100.0)
        until(lambda: len(station(kv).assigned) == 1, "it is not given")
        for _ in range(3):
            (before,) = station(kv).assigned._given.values()
            moved = service.server.book.counts["moved"]
            if moved:
                break  # the second time it is FAILED, and says so
            break_stream(kv)
            until(lambda b=before: b not in station(kv).assigned._given.values(), "it is not given up")  # type: ignore[misc]
            until(lambda: len(station(kv).assigned) == 1, "it is not given again")
        assert hint.outcome is None


def test_a_use_that_happens_without_a_stream_is_told_afterwards(open_tiny: Open, service: ServiceThread) -> None:
    prompt = text(1, 200)
    with attached(open_tiny(), service) as kv, kvprefetch.connect(service.address) as client:
        hint = client.prefetch(client.context(token_ids=prompt), session="s")
        assert hint.wait(30).outcome is kvprefetch.Outcome.WARM
        break_stream(kv)
        ask(kv, prompt, "s")
        until(lambda: hint.use is kvprefetch.Use.USED, "its use is lost", 20)


def test_a_worker_whose_arena_was_replaced_by_a_larger_one_reads_nothing_of_the_old(
    open_tiny: Open, tmp_path: Path
) -> None:
    service = ServiceThread(tmp_path, arena="1MiB")
    prompts = [text(n, 400) for n in range(20)]
    cold = [cold_answer(open_tiny(), prompt) for prompt in prompts]
    with attached(open_tiny(), service) as one, attached(open_tiny(), service) as two:
        service.end()
        shutil.rmtree(tmp_path / "arena")
        service.settings = replace(service.settings, arena=replace(service.settings.arena, size="8MiB"))
        attach = link(one).registered

        def late(*arguments: object) -> None:  # mapping a large arena takes a while
            time.sleep(2)
            attach(*arguments)  # type: ignore[arg-type]

        link(one).registered = late  # type: ignore[method-assign]
        service.begin()
        until(lambda: station(two).is_connected, "it does not come back", 20)
        assert [ask(two, prompt) for prompt in prompts] == cold
        written(two, service)
        until(lambda: len(service.server.core.registry.workers()) == 2, "the other does not come back", 20)
        assert [ask(one, prompt) for prompt in reversed(prompts)] == cold[::-1]
        until(lambda: station(one).is_connected, "it is not connected", 20)
        assert [ask(one, prompt) for prompt in prompts] == cold
        assert service.stats()["host"].get("corrupt", 0) == 0
    service.end()


def test_leases_are_given_back_whatever_happens_meanwhile(open_tiny: Open, service: ServiceThread) -> None:
    with attached(open_tiny(), service) as one, attached(open_tiny(), service) as two:
        ask(one, text(1, 200))
        written(one, service)
        for number in range(5):
            ask(two, text(1, 200) + text(number, 30))
            two.clear()
            break_stream(two)
            until(lambda: station(two).is_connected, "it does not come back", 20)
        until(lambda: service.stats()["held"]["leases"] == 0, "leases leak")
        assert not link(two).host.leases
