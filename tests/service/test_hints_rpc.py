"""Hints and signals through a running service, with workers that say what became of them."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from processes import until
from services import Service, TestWorker, calling, credential, running, small, stats, with_credentials

from kvprefetch.settings import SpeculationSettings
from kvprefetch.v1 import admin_pb2, admin_pb2_grpc, hints_pb2_grpc, outcomes_pb2
from kvprefetch.v1.hints_pb2 import CancelRequest, Context, PrefetchRequest, SignalRequest
from kvprefetch.v1.workers_pb2 import PLACE_DEVICE, PreloadReport, SessionReport

TOKENS = {"ann": "ann's", "bob": "bob's", "w1": "w1's", "olga": "olga's"}
ROLES = {"ann": "tenant", "bob": "tenant", "w1": "worker", "olga": "operator"}
BOOK = Context(messages=b'[{"role":"system","content":"book"}]')


class Stage:
    """A service and those who call it."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.channels: dict[str, grpc.Channel] = {}

    def channel(self, who: str) -> grpc.Channel:
        return self.channels[who]

    def hints(self, who: str = "ann") -> hints_pb2_grpc.HintsStub:
        return hints_pb2_grpc.HintsStub(self.channels[who])

    def worker(self, model: str = "m") -> TestWorker:
        return TestWorker(self.channels["w1"], model)

    def prefetch(self, who: str = "ann", **more: Any) -> Any:
        """The stream, and its first event."""
        stream = self.hints(who).Prefetch(PrefetchRequest(**{"context": BOOK, "session": "s", **more}), timeout=30)
        return stream, next(stream)

    def signal(self, kind: str = "opened", who: str = "ann", **more: Any) -> None:
        self.hints(who).Signal(SignalRequest(**{"kind": kind, "session": "s", **more}), timeout=20)

    def counts(self, tenant: str = "ann") -> dict[str, Any]:
        every = json.loads(stats(self.channels["olga"]))["tenants"]
        return every[tenant]


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    yield from staged(tmp_path)


def staged(folder: Path, **service: Any) -> Iterator[Stage]:
    known = [credential(name, ROLES[name], token) for name, token in TOKENS.items()]
    settings = with_credentials(small(folder, **service), *known)
    settings = replace(settings, speculation=SpeculationSettings(hold_s=50.0, signal_probability=0.25))
    with running(settings) as it:
        stage = Stage(it)
        opened = {name: calling(it.address, token) for name, token in TOKENS.items()}
        stage.channels = {name: channel.__enter__() for name, channel in opened.items()}
        yield stage
        for channel in opened.values():
            channel.__exit__(None, None, None)


def refused(call: Any, *arguments: Any, **more: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as told:
        call(*arguments, **more)
    return told.value.code(), told.value.details()


# -- hints -------------------------------------------------------------------------------------------------
def test_a_hint_is_accepted_given_to_a_worker_and_told_its_outcome_and_its_use(stage: Stage) -> None:
    worker = stage.worker()
    stream, accepted = stage.prefetch(probability=0.75, expected_in_s=2.0, hold_s=9.0)
    assert (accepted.outcome, accepted.use) == (0, 0)
    assert accepted.hint
    assert accepted.worker.startswith("m@")
    (preload,) = worker.wait_for("preload")
    assert (preload.hint, preload.tenant, preload.session, preload.kind) == (accepted.hint, "ann", "s", "")
    assert (preload.probability, preload.hold_s, preload.place) == (0.75, 9.0, PLACE_DEVICE)
    assert 1.0 < preload.expected_in_s <= 2.0
    assert preload.context == BOOK
    done = PreloadReport(
        hint=accepted.hint, outcome=outcomes_pb2.OUTCOME_CLIPPED, tokens=64, reason="full", because="V"
    )
    worker.say(preload=done)
    event = next(stream)
    assert (event.hint, event.outcome, event.tokens) == (accepted.hint, outcomes_pb2.OUTCOME_CLIPPED, 64)
    assert (event.reason, event.because, event.use) == ("full", "V", 0)
    worker.say(preload=PreloadReport(hint=accepted.hint, use=outcomes_pb2.USE_USED, tokens=48))
    event = next(stream)
    assert (event.use, event.tokens, event.outcome) == (outcomes_pb2.USE_USED, 48, outcomes_pb2.OUTCOME_CLIPPED)
    assert next(stream, None) is None
    assert stage.counts()["hints"]["uses"]["USED"] == 1
    worker.leave()


def test_an_outcome_that_leaves_nothing_resident_is_the_end(stage: Stage) -> None:
    worker = stage.worker()
    stream, accepted = stage.prefetch()
    worker.wait_for("preload")
    worker.say(preload=PreloadReport(hint=accepted.hint, outcome=outcomes_pb2.OUTCOME_REJECTED, reason="no budget"))
    assert [(event.outcome, event.reason) for event in stream] == [(outcomes_pb2.OUTCOME_REJECTED, "no budget")]
    worker.leave()


def test_a_hint_lives_on_when_its_stream_is_closed_and_can_be_followed_again(stage: Stage) -> None:
    worker = stage.worker()
    stream, accepted = stage.prefetch()
    worker.wait_for("preload")
    stream.cancel()
    assert worker.of("withdraw") == []
    again, first = stage.prefetch(follow=accepted.hint, context=None)
    assert first.hint == accepted.hint
    worker.say(preload=PreloadReport(hint=accepted.hint, outcome=outcomes_pb2.OUTCOME_FAILED, reason="no memory"))
    assert next(again).outcome == outcomes_pb2.OUTCOME_FAILED
    events = [first, *stage.prefetch(follow=accepted.hint, context=None)[0]]  # even when it has ended
    assert events[-1].reason == "no memory"
    assert stage.counts()["hints"]["issued"] == 1
    for who, number in (("bob", accepted.hint), ("ann", 17)):
        code, details = refused(stage.prefetch, who, follow=number, context=None)
        assert (code, f"no hint {number}" in details) == (grpc.StatusCode.NOT_FOUND, True)
    worker.leave()


def test_a_hint_without_a_worker_waits_and_may_expire_with_a_reason(stage: Stage) -> None:
    expiring, _ = stage.prefetch(hold_s=0.1)
    waiting, accepted = stage.prefetch(hold_s=100.0)
    assert accepted.worker == ""
    event = next(expiring)
    assert event.outcome == outcomes_pb2.OUTCOME_EXPIRED
    assert "no worker" in event.reason
    worker = stage.worker()
    assert worker.wait_for("preload")[0].hint == accepted.hint
    assert worker.told[0].WhichOneof("message") == "registered"
    waiting.cancel()
    worker.leave()


def test_a_worker_that_vanishes_leaves_its_hints_to_another_and_the_second_time_they_fail(stage: Stage) -> None:
    first = stage.worker()
    stream, _ = stage.prefetch(hold_s=100.0)
    first.wait_for("preload")
    first.leave()
    second = stage.worker()
    second.wait_for("preload")
    second.leave()
    event = next(stream)
    assert event.outcome == outcomes_pb2.OUTCOME_FAILED
    assert "vanished" in event.reason


def test_cancelling_withdraws_and_is_for_the_tenant_alone(stage: Stage) -> None:
    worker = stage.worker()
    stream, accepted = stage.prefetch()
    code, _ = refused(stage.hints("bob").Cancel, CancelRequest(hint=accepted.hint), timeout=20)
    assert code is grpc.StatusCode.NOT_FOUND
    stage.hints().Cancel(CancelRequest(hint=accepted.hint), timeout=20)
    assert worker.wait_for("withdraw")[0].hint == accepted.hint
    worker.say(preload=PreloadReport(hint=accepted.hint, outcome=outcomes_pb2.OUTCOME_CANCELLED, reason="withdrawn"))
    assert next(stream).outcome == outcomes_pb2.OUTCOME_CANCELLED
    stage.hints().Cancel(CancelRequest(hint=accepted.hint), timeout=20)  # again: nothing
    worker.leave()


def test_a_tenant_cannot_have_more_hints_than_its_limit_and_harms_nobody(tmp_path: Path) -> None:
    for stage in staged(tmp_path, max_hints=2):
        streams = [stage.prefetch()[0] for _ in range(2)]
        code, details = refused(stage.prefetch)
        assert (code, "service.max_hints" in details) == (grpc.StatusCode.RESOURCE_EXHAUSTED, True)
        assert refused(stage.signal, contexts=[BOOK])[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
        stage.prefetch("bob")
        assert stage.counts()["hints"]["issued"] == len(streams)


# -- contexts ----------------------------------------------------------------------------------------------
def test_a_named_context_is_recalled_by_its_tenant_and_unknown_to_another(stage: Stage) -> None:
    worker = stage.worker()
    named = Context(name="handbook", messages=BOOK.messages, tools=b"[]")
    stage.prefetch(context=named)
    stage.prefetch(context=Context(name="handbook"), session="other")
    assert [preload.context.messages for preload in worker.wait_for("preload", 2)] == [BOOK.messages] * 2
    code, details = refused(stage.prefetch, "bob", context=Context(name="handbook"))
    assert (code, "'handbook'" in details) == (grpc.StatusCode.NOT_FOUND, True)
    assert refused(stage.signal, who="bob", contexts=[Context(name="handbook")])[0] is grpc.StatusCode.NOT_FOUND
    stage.prefetch("bob", context=Context(name="handbook", token_ids=[1, 2]))  # its own of that name
    stage.prefetch(context=Context(name="handbook"))
    assert worker.wait_for("preload", 4)[3].context.messages == BOOK.messages
    worker.leave()


def test_contexts_in_use_by_a_tenant_are_limited(tmp_path: Path) -> None:
    for stage in staged(tmp_path, max_contexts=1):
        stage.prefetch(context=Context(name="a", token_ids=[1]))
        code, details = refused(stage.prefetch, context=Context(name="b", token_ids=[1]))
        assert (code, "service.max_contexts" in details) == (grpc.StatusCode.RESOURCE_EXHAUSTED, True)
        stage.prefetch("bob", context=Context(name="b", token_ids=[1]))


def test_an_unknown_model_is_not_found_and_of_several_one_must_be_named(stage: Stage) -> None:
    workers = [stage.worker("m"), stage.worker("n")]
    code, details = refused(stage.prefetch, context=Context(model="x", token_ids=[1]))
    assert (code, details) == (grpc.StatusCode.NOT_FOUND, "no worker serves 'x'; there is 'm', 'n'")
    code, details = refused(stage.prefetch)
    assert (code, details) == (grpc.StatusCode.INVALID_ARGUMENT, "say which model: 'm', 'n'")
    stage.prefetch(context=Context(model="n", token_ids=[1]))
    assert workers[1].wait_for("preload")
    assert stage.counts()["hints"]["issued"] == 1
    for worker in workers:
        worker.leave()


@pytest.mark.parametrize(
    ("request_of", "named"),
    [
        ({"context": Context()}, "either messages or token_ids"),
        ({"context": Context(messages=b"[]", token_ids=[1])}, "either messages or token_ids"),
        ({"context": Context(messages=b'{"role": "user"}')}, "messages are a JSON list"),
        ({"context": Context(messages=b"[]", tools=b"x")}, "tools are a JSON list"),
        ({"context": Context(messages=b"[]", chat_template_kwargs=b"[]")}, "chat_template_kwargs are a JSON object"),
        ({"context": Context(name="n" * 300, token_ids=[1])}, "a name has at most 256 bytes"),
        ({"session": "s" * 300}, "a session has at most 256 bytes"),
        ({"probability": 1.5}, "a probability is from 0 to 1"),
        ({"probability": math.nan}, "a probability is from 0 to 1"),
        ({"expected_in_s": -1.0}, "finite seconds"),
        ({"hold_s": math.inf}, "finite seconds"),
    ],
)
def test_a_hint_that_cannot_be_is_refused_with_a_reason(stage: Stage, request_of: dict[str, Any], named: str) -> None:
    code, details = refused(stage.prefetch, **request_of)
    assert (code, named in details) == (grpc.StatusCode.INVALID_ARGUMENT, True), details


# -- signals -----------------------------------------------------------------------------------------------
def test_contexts_that_a_signal_names_are_preloaded_with_its_kind(stage: Stage) -> None:
    worker = stage.worker()
    stage.signal("document_opened", contexts=[BOOK, Context(token_ids=[1, 2])])
    preloads = worker.wait_for("preload", 2)
    assert [preload.kind for preload in preloads] == ["document_opened"] * 2
    assert [preload.probability for preload in preloads] == [0.25] * 2
    assert not preloads[0].HasField("hold_s")
    for preload in preloads:
        worker.say(preload=PreloadReport(hint=preload.hint, outcome=outcomes_pb2.OUTCOME_WARM))
    until(lambda: stage.counts()["hints"]["outcomes"]["WARM"] == 2, "not counted")
    worker.leave()


def test_a_signal_without_contexts_goes_to_the_sessions_likely_worker(stage: Stage) -> None:
    one, two = stage.worker(), stage.worker()
    two.say(session=SessionReport(tenant="ann", session="s"))
    until(lambda: stage.service.server.book.workers.expected_at("ann", "s", "m") == two.instance, "not learnt")
    stage.signal("typing")
    (observed,) = two.wait_for("observed")
    assert (observed.tenant, observed.session, observed.kind) == ("ann", "s", "typing")
    assert one.of("observed") == []
    for worker in (one, two):
        worker.leave()


def test_the_end_of_a_session_withdraws_what_waits_for_it(stage: Stage) -> None:
    worker = stage.worker()
    mine, accepted = stage.prefetch()
    others, _ = stage.prefetch(session="other")
    worker.wait_for("preload", 2)
    stage.signal("session_ended")
    assert worker.wait_for("observed")[0].kind == "session_ended"
    assert [withdraw.hint for withdraw in worker.wait_for("withdraw")] == [accepted.hint]
    for stream in (mine, others):
        stream.cancel()
    worker.leave()


def test_signals_of_a_tenant_are_limited_and_old_ones_are_stale(tmp_path: Path) -> None:
    for stage in staged(tmp_path, signals_per_s=0.5):
        for _ in range(5):
            stage.signal("read")
        code, details = refused(stage.signal, "read")
        assert (code, "service.signals_per_s" in details) == (grpc.StatusCode.RESOURCE_EXHAUSTED, True)
        stage.signal("read", who="bob", at=1.0, contexts=[BOOK])
        assert stage.counts()["signals"] == {"kinds": {"read": 5}, "stale": 0, "refused": 1}
        assert stage.counts("bob")["signals"] == {"kinds": {}, "stale": 1, "refused": 0}
        assert stage.counts("bob")["hints"]["issued"] == 0


def test_kinds_of_signals_are_counted_apart_up_to_an_end(stage: Stage) -> None:
    for number in range(70):
        stage.signal(f"kind {number}")
    kinds = stage.counts()["signals"]["kinds"]
    assert (len(kinds), kinds["other"]) == (65, 6)


@pytest.mark.parametrize(
    ("request_of", "named"),
    [
        ({"kind": ""}, "a signal has a kind"),
        ({"kind": "k" * 300}, "a signal's kind has at most 256 bytes"),
        ({"attributes": b"x" * 70_000}, "attributes have at most"),
        ({"at": math.nan}, "seconds since the epoch"),
        ({"contexts": [Context()]}, "either messages or token_ids"),
    ],
)
def test_a_signal_that_cannot_be_is_refused_with_a_reason(stage: Stage, request_of: dict[str, Any], named: str) -> None:
    code, details = refused(stage.signal, **request_of)
    assert (code, named in details) == (grpc.StatusCode.INVALID_ARGUMENT, True), details


# -- the end -----------------------------------------------------------------------------------------------
def test_a_service_that_drains_ends_its_streams_at_once(stage: Stage) -> None:
    stream, _ = stage.prefetch()
    admin_pb2_grpc.AdminStub(stage.channel("olga")).Drain(admin_pb2.DrainRequest(), timeout=20)
    code, details = refused(next, stream)
    assert (code, "draining" in details) == (grpc.StatusCode.UNAVAILABLE, True)
    stage.service.stop()
