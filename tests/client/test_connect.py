"""`kvprefetch.connect` against running services: hints, signals, restarts, refusals, the end."""

import inspect
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import until
from services import Service, TestWorker, calling, credential, running, small, with_credentials

import kvprefetch
from kvprefetch import (
    Connection,
    InvalidRequest,
    LimitExceeded,
    Outcome,
    ServiceUnavailable,
    Unauthenticated,
    Use,
)
from kvprefetch.client import signals
from kvprefetch.v1 import outcomes_pb2 as words
from kvprefetch.v1.workers_pb2 import PreloadReport

BOOK = [{"role": "system", "content": "Answer from this handbook: …"}]
WAIT_S = 30.0


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with running(small(tmp_path)) as it:
        yield it


@pytest.fixture
def kv(service: Service) -> Iterator[Connection]:
    with kvprefetch.connect(service.address) as it:
        yield it


@pytest.fixture
def worker(service: Service) -> Iterator[TestWorker]:
    with calling(service.address) as channel:
        it = TestWorker(channel)
        yield it
        it.leave()


def counts(kv: Connection, tenant: str = "default") -> dict[str, Any]:
    found: dict[str, Any] = kv.stats()["tenants"][tenant]
    return found


# -- hints -------------------------------------------------------------------------------------------------
def test_a_hint_has_an_outcome_and_then_a_use(kv: Connection, worker: TestWorker) -> None:
    hint = kv.prefetch(kv.context(BOOK), session="u-7", probability=0.8, expected_in_s=5.0, hold_s=300.0)
    (preload,) = worker.wait_for("preload")
    assert (preload.session, preload.probability, preload.hold_s) == ("u-7", 0.8, 300.0)
    assert hint.outcome is None
    with pytest.raises(TimeoutError, match="it lives on"):
        hint.wait(timeout_s=0.01)
    done = PreloadReport(hint=preload.hint, outcome=words.OUTCOME_WARM, tokens=64, because="hint: V=1.4s")
    worker.say(preload=done)
    result = hint.wait(WAIT_S)
    assert (result.outcome, result.tokens, hint.because) == (Outcome.WARM, 64, "hint: V=1.4s")
    assert (hint.use, hint.worker) == (None, worker_name(kv))
    worker.say(preload=PreloadReport(hint=preload.hint, use=words.USE_USED, tokens=48))
    until(lambda: hint.use is Use.USED, "its use is not told")
    assert hint.used_tokens == 48


def worker_name(kv: Connection) -> str:
    name: str = kv.stats()["service"]["workers"][0]["name"]
    return name


def test_a_withdrawn_hint_is_cancelled_wherever_it_is(kv: Connection, service: Service) -> None:
    waiting = kv.prefetch(kv.context(BOOK))
    waiting.cancel()  # perhaps before it has got there
    assert waiting.wait(WAIT_S).outcome is Outcome.CANCELLED
    with calling(service.address) as channel:
        worker = TestWorker(channel)
        placed = kv.prefetch(kv.context(BOOK))
        (preload,) = worker.wait_for("preload")
        placed.cancel()
        placed.cancel()
        assert worker.wait_for("withdraw")[0].hint == preload.hint
        worker.say(preload=PreloadReport(hint=preload.hint, outcome=words.OUTCOME_CANCELLED, reason="withdrawn"))
        assert placed.wait(WAIT_S).reason == "withdrawn"
        placed.cancel()
        worker.leave()


def test_many_hints_of_many_threads_are_told_apart(kv: Connection, worker: TestWorker) -> None:
    handles: dict[int, Any] = {}

    def ask(first: int) -> None:
        for number in range(first, first + 25):
            handles[number] = kv.prefetch(kv.context(token_ids=[number, 1]), session=str(number))

    threads = [threading.Thread(target=ask, args=(25 * number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for preload in worker.wait_for("preload", 200):
        reported = PreloadReport(hint=preload.hint, outcome=words.OUTCOME_FAILED, reason=preload.session)
        worker.say(preload=reported)
    assert {number: int(handle.wait(WAIT_S).reason) for number, handle in handles.items()} == {
        number: number for number in range(200)
    }
    before = {thread.name for thread in threading.enumerate()}
    assert sum("kvprefetch-client" in name for name in before) == 1  # one thread for all of them


def test_odd_numbers_are_refused_at_once(kv: Connection) -> None:
    for odd in ({"probability": 1.1}, {"hold_s": -1.0}, {"expected_in_s": float("inf")}):
        with pytest.raises(InvalidRequest):
            kv.prefetch(kv.context(BOOK), **odd)


def test_what_the_service_refuses_is_raised_by_wait(tmp_path: Path) -> None:
    with (
        running(small(tmp_path, max_hints=1)) as service,
        kvprefetch.connect(service.address) as kv,
        calling(service.address) as channel,
    ):
        worker = TestWorker(channel)
        stranger = kv.prefetch(kv.context(BOOK, model="x"))
        with pytest.raises(kvprefetch.UnknownContext, match="no worker serves 'x'; there is 'm'"):
            stranger.wait(WAIT_S)
        assert stranger.outcome is Outcome.REJECTED
        nameless = kv.prefetch(kv.context(name="nobody's"))
        with pytest.raises(kvprefetch.UnknownContext, match="no context is known by the name"):
            nameless.wait(WAIT_S)
        first = kv.prefetch(kv.context(BOOK))
        worker.wait_for("preload")
        with pytest.raises(LimitExceeded, match=r"service\.max_hints"):
            kv.prefetch(kv.context(BOOK)).wait(WAIT_S)
        assert first.outcome is None
        worker.leave()


# -- contexts ----------------------------------------------------------------------------------------------
def test_a_name_is_known_here_at_once_and_elsewhere_after_its_first_use(
    kv: Connection, service: Service, worker: TestWorker
) -> None:
    context = kv.context(BOOK, name="handbook")
    assert kv.context(name="handbook") is context
    kv.prefetch(context)
    worker.wait_for("preload")
    with kvprefetch.connect(service.address) as other:
        other.prefetch(other.context(name="handbook"))
        preloads = worker.wait_for("preload", 2)
    assert preloads[0].context.messages == preloads[1].context.messages != b""


def test_another_tenants_name_is_unknown(tmp_path: Path) -> None:
    known = credential("ann", "tenant", "ann's"), credential("bob", "tenant", "bob's")
    with (
        running(with_credentials(small(tmp_path), *known)) as service,
        kvprefetch.connect(service.address, "ann's") as ann,
        kvprefetch.connect(service.address, "bob's") as bob,
    ):
        ann.signal("opened", session="s", contexts=[ann.context(BOOK, name="plans")])
        until(lambda: counts(ann, "ann")["contexts"]["named"] == 1, "it is not remembered")
        with pytest.raises(kvprefetch.UnknownContext, match="'plans'"):
            bob.prefetch(bob.context(name="plans")).wait(WAIT_S)
        assert set(bob.stats()["tenants"]) == {"bob"}


# -- signals -----------------------------------------------------------------------------------------------
def test_signals_arrive_in_their_order_and_are_counted(kv: Connection, worker: TestWorker) -> None:
    for number in range(20):
        kv.signal("typing" if number % 2 else "reading", session="u-7", attributes={"n": number})
    kv.signal("document_opened", session="u-7", contexts=[kv.context(BOOK)])
    (preload,) = worker.wait_for("preload")
    assert preload.kind == "document_opened"
    assert [observed.kind for observed in worker.wait_for("observed", 20)[:20]] == ["reading", "typing"] * 10
    assert kv.stats()["client"]["signals"]["sent"] == 21


def test_a_signal_never_waits_for_a_service_that_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "MOST", 100)
    with kvprefetch.connect(f"unix://{tmp_path}/s.sock") as kv:
        began = time.monotonic()
        for number in range(150):
            kv.signal(f"{number}", session="s")
        assert time.monotonic() - began < 5
        with running(small(tmp_path)):
            until(lambda: kv._signals.counts["sent"] == 100, "the first hundred are not sent when it comes")
            assert kv.stats()["client"]["signals"] == {"sent": 100, "dropped": 50}


def test_a_signal_that_is_refused_is_counted_and_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with running(small(tmp_path, signals_per_s=0.1)) as service, kvprefetch.connect(service.address) as kv:
        for _ in range(4):
            kv.signal("reading", session="s")
        until(lambda: kv._signals.counts["refused"] == 3, "they are not refused")
        assert kv._signals.counts["sent"] == 1
    assert caplog.text.count("the service refuses signals: RESOURCE_EXHAUSTED") == 1


def test_a_signal_without_a_kind_is_refused_at_once(kv: Connection) -> None:
    with pytest.raises(InvalidRequest, match="a kind"):
        kv.signal("", session="s")


# -- who, and where ----------------------------------------------------------------------------------------
def test_wrong_and_missing_tokens_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVPREFETCH_TOKEN", raising=False)
    with running(with_credentials(small(tmp_path), credential("ann", "tenant", "ann's"))) as service:
        with kvprefetch.connect(service.address) as kv, pytest.raises(Unauthenticated, match="KVPREFETCH_TOKEN"):
            kv.stats()
        with kvprefetch.connect(service.address, "wrong") as kv, pytest.raises(Unauthenticated, match="no credential"):
            kv.prefetch(kv.context(BOOK)).wait(WAIT_S)
        with kvprefetch.connect(service.address, "ann's") as kv:
            assert kv.stats()["tenants"].keys() == {"ann"}
            with pytest.raises(kvprefetch.PermissionDenied):
                kv.check()
        monkeypatch.setenv("KVPREFETCH_TOKEN", "ann's")
        with kvprefetch.connect(service.address) as kv:
            assert kv.stats()


def test_a_service_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with (
        kvprefetch.connect(f"unix://{tmp_path}/none.sock") as kv,
        pytest.raises(ServiceUnavailable, match=r"none\.sock: No such file .*is `kvprefetch serve` running"),
    ):
        kv.stats()


def test_check_proves_the_books(kv: Connection) -> None:
    kv.check()


# -- portable code -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["context", "prefetch", "signal", "stats", "check", "close"])
def test_calls_have_the_same_shape_as_those_of_a_local_worker(name: str) -> None:
    here, there = (inspect.signature(getattr(kind, name)) for kind in (Connection, kvprefetch.Local))
    assert [(p.name, p.kind, p.default) for p in here.parameters.values()] == [
        (p.name, p.kind, p.default) for p in there.parameters.values()
    ]
