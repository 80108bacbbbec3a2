"""What the operator wants every worker to hold: given to all, also to those that come later, and by nobody else."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from crew import Crew, report
from processes import until
from services import TestWorker, calling, credential, running, small, with_credentials

from kvprefetch.cache.shares import OPERATOR
from kvprefetch.errors import LimitExceeded
from kvprefetch.outcomes import Outcome, Use
from kvprefetch.service.hints import COMES_BACK_S, HintBook
from kvprefetch.service.public import PublicContexts, Standing
from kvprefetch.settings import GroupSettings
from kvprefetch.v1 import hints_pb2_grpc, outcomes_pb2
from kvprefetch.v1.hints_pb2 import CancelRequest, Context, PrefetchRequest, SignalRequest
from kvprefetch.v1.workers_pb2 import PLACE_DEVICE, Preload, PreloadReport


class Node:
    """A book, its public contexts, and a crew of workers that tells both of them."""

    def __init__(self, most: int = 4, most_bytes: int = 1_000) -> None:
        self.crew = Crew()
        self.book = HintBook(self.crew, max_hints=4, max_bytes=1_000, first_number=100)
        self.public = PublicContexts(self.book, most, most_bytes)

    def join(self, worker: bytes, model: str = "m", now: float = 0.0) -> None:
        self.crew.join(self.book, worker, model, now)
        self.public.registered(worker, model, now)

    def leave(self, worker: bytes, now: float = 0.0) -> None:
        self.public.vanished(worker)
        self.crew.leave(self.book, worker, now)

    def issue(self, text: bytes = b"[]", model: str = "m", now: float = 0.0, hold_s: float = 100.0) -> Standing:
        context = Context(model=model, messages=text, namespace="public")
        return self.public.issue(Preload(context=context, probability=1.0), now, hold_s)

    def given(self, worker: bytes) -> list[Preload]:
        return [message.preload for message in self.crew.told(worker, "preload")]

    def say(self, worker: bytes, outcome: str = "", use: str = "", tokens: int = 64, reason: str = "") -> None:
        """Of the latest that it was given."""
        self.book.reported(worker, report(self.given(worker)[-1].hint, outcome, use, tokens, reason), 1.0)


@pytest.fixture
def node() -> Node:
    return Node()


def test_every_worker_of_the_model_is_given_it_and_its_outcome_comes_with_the_last_of_theirs(node: Node) -> None:
    for worker, model in ((b"v", "m"), (b"w", "m"), (b"x", "other")):
        node.join(worker, model)
    standing = node.issue()
    assert [len(node.given(worker)) for worker in (b"v", b"w", b"x")] == [1, 1, 0]
    (preload,) = node.given(b"w")
    assert (preload.tenant, preload.context.namespace, preload.place) == (OPERATOR, "public", PLACE_DEVICE)
    assert (preload.hold_s, preload.probability, preload.session) == (100.0, 1.0, "")
    node.say(b"v", "WARM", tokens=64)
    assert not standing.resolved.is_set()
    node.say(b"w", "ALREADY_WARM", tokens=96)
    assert (standing.outcome, standing.tokens, standing.worker_name) == (Outcome.WARM, 64, "v, w")
    assert standing.resolved.is_set()


def test_a_worker_that_comes_later_is_given_it_while_the_hold_lasts(node: Node) -> None:
    standing = node.issue()
    assert standing.outcome is None
    node.join(b"v", now=30.0)
    assert node.given(b"v")[0].hold_s == 70.0
    node.say(b"v", "WARM")
    assert standing.outcome is Outcome.WARM
    node.join(b"w", now=60.0)
    assert len(node.given(b"w")) == 1
    node.public.expire(100.0)
    node.join(b"x", now=100.0)
    assert node.given(b"x") == []


def test_its_use_is_told_when_its_hold_is_over(node: Node) -> None:
    node.join(b"v")
    used, unused = node.issue(b"[1]"), node.issue(b"[2]")
    for preload in node.given(b"v"):
        node.book.reported(b"v", report(preload.hint, "WARM", tokens=64), 1.0)
    node.book.reported(b"v", report(node.given(b"v")[0].hint, use="USED", tokens=48), 2.0)
    node.public.expire(99.0)
    assert not used.ended.is_set()
    node.public.expire(100.0)
    assert (used.use, used.used_tokens, unused.use) == (Use.USED, 48, Use.UNUSED)
    assert len(node.public) == 0


def test_what_fails_at_one_worker_is_the_outcome_and_says_where(node: Node) -> None:
    node.join(b"v")
    node.join(b"w")
    standing = node.issue()
    node.say(b"v", "WARM", tokens=64)
    node.say(b"w", "CLIPPED", tokens=32, reason="no room")
    assert (standing.outcome, standing.tokens, standing.reason) == (Outcome.CLIPPED, 32, "w: no room")


def test_a_worker_that_vanishes_is_not_waited_for_and_is_given_it_again_when_it_is_back(node: Node) -> None:
    node.join(b"v")
    node.join(b"w")
    standing = node.issue()
    node.say(b"v", "WARM")
    node.leave(b"w", now=2.0)
    assert standing.outcome is Outcome.WARM
    assert len(node.given(b"v")) == 1, "nobody else gets its copy"
    node.join(b"w", now=3.0)
    assert len(node.given(b"w")) == 2


def test_who_has_it_is_not_given_it_again_unless_it_is_another_process(node: Node) -> None:
    node.join(b"v")
    node.issue()
    node.say(b"v", "WARM")
    node.leave(b"v", now=2.0)
    node.join(b"v", now=2.0 + COMES_BACK_S - 1)
    assert len(node.given(b"v")) == 1
    node.leave(b"v", now=20.0)
    node.book.expire(20.0 + COMES_BACK_S)
    node.join(b"v", now=40.0)
    assert len(node.given(b"v")) == 2


def test_given_again_it_takes_its_own_place(node: Node) -> None:
    node.join(b"v")
    first, second = node.issue(), node.issue(now=50.0)
    assert (first.outcome, len(node.public)) == (Outcome.CANCELLED, 1)
    assert second.expires_at == 150.0


def test_withdrawn_nobody_is_given_it_any_more_and_those_that_are_not_done_give_it_up(node: Node) -> None:
    node.join(b"v")
    standing = node.issue()
    node.public.cancel(standing, "enough", 1.0)
    assert standing.outcome is Outcome.CANCELLED
    assert len(node.crew.told(b"v", "withdraw")) == 1
    node.join(b"w", now=2.0)
    assert node.given(b"w") == []
    assert node.public.find(standing.number) is standing


def test_it_expires_while_no_worker_comes_and_fails_where_the_service_ends(node: Node) -> None:
    late, other = node.issue(b"[1]", hold_s=10.0), node.issue(b"[2]")
    node.public.expire(10.0)
    assert late.outcome is Outcome.EXPIRED
    node.public.close("the service was ended")
    assert other.outcome is Outcome.FAILED
    assert other.ended.is_set()


def test_there_is_an_end_to_how_many_and_how_large_they_are() -> None:
    node = Node(most=2, most_bytes=100)
    node.issue(b"[" * 20)
    with pytest.raises(LimitExceeded):
        node.issue(b"[" * 80)
    node.issue(b"[" * 21)
    with pytest.raises(LimitExceeded, match="max_contexts"):
        node.issue(b"[" * 22)
    node.issue(b"[" * 21)  # one of those


def test_its_copies_keep_no_content_and_take_nothing_of_what_tenants_may_have(node: Node) -> None:
    for at in range(6):  # more than a tenant's hints
        node.join(bytes([65 + at]))
    standing = node.issue(b"[" * 900)
    assert [copy.preload.context.ByteSize() for copy in standing.copies.values()] == [0] * 6
    assert node.book.tenants[OPERATOR].open_bytes == 0


# -- who may -----------------------------------------------------------------------------------------------
TOKENS = {"ann": "ann's", "bob": "bob's", "w1": "w1's", "olga": "olga's"}
ROLES = {"ann": "tenant", "bob": "tenant", "w1": "worker", "olga": "operator"}
BOOK = b'[{"role":"system","content":"book"}]'
FORBIDDEN = grpc.StatusCode.PERMISSION_DENIED


@pytest.fixture
def channels(tmp_path: Path) -> Iterator[dict[str, grpc.Channel]]:
    known = [credential(name, ROLES[name], token) for name, token in TOKENS.items()]
    settings = replace(with_credentials(small(tmp_path), *known), groups=(GroupSettings("law", ("ann",)),))
    with running(settings) as service:
        opened = {name: calling(service.address, token) for name, token in TOKENS.items()}
        yield {name: channel.__enter__() for name, channel in opened.items()}
        for channel in opened.values():
            channel.__exit__(None, None, None)


def prefetch(channel: grpc.Channel, namespace: str, **more: Any) -> Any:
    context = Context(**{"messages": BOOK, "namespace": namespace, **more})
    stream = hints_pb2_grpc.HintsStub(channel).Prefetch(PrefetchRequest(context=context, hold_s=9.0), timeout=20)
    return stream, next(stream)


def refusal(call: Any, *arguments: Any, **more: Any) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as told:
        call(*arguments, **more)
    return told.value.code()


@pytest.mark.parametrize("who", ["ann", "bob", "w1"])
def test_neither_a_tenant_nor_a_worker_fills_the_public_namespace(channels: dict[str, grpc.Channel], who: str) -> None:
    worker = TestWorker(channels["w1"])
    assert refusal(prefetch, channels[who], "public") is FORBIDDEN
    signal = SignalRequest(kind="opened", session="s", contexts=[Context(messages=BOOK, namespace="public")])
    for caller in (who, "olga"):
        assert refusal(hints_pb2_grpc.HintsStub(channels[caller]).Signal, signal, timeout=20) is FORBIDDEN
    assert worker.of("preload") == []
    worker.leave()


def test_an_operator_fills_it_and_follows_it_and_nobody_else_knows_it(channels: dict[str, grpc.Channel]) -> None:
    worker = TestWorker(channels["w1"])
    stream, accepted = prefetch(channels["olga"], "public", name="book")
    (preload,) = worker.wait_for("preload")
    assert (preload.tenant, preload.context.messages) == (OPERATOR, BOOK)
    worker.say(preload=PreloadReport(hint=preload.hint, outcome=outcomes_pb2.OUTCOME_WARM, tokens=64))
    assert next(stream).outcome == outcomes_pb2.OUTCOME_WARM
    for who in ("ann", "w1"):
        hints = hints_pb2_grpc.HintsStub(channels[who])
        for number in (accepted.hint, preload.hint):
            assert refusal(hints.Cancel, CancelRequest(hint=number)) is grpc.StatusCode.NOT_FOUND
            assert refusal(next, hints.Prefetch(PrefetchRequest(follow=number))) is grpc.StatusCode.NOT_FOUND
    assert refusal(prefetch, channels["ann"], "", messages=b"", name="book") is grpc.StatusCode.NOT_FOUND
    again, _ = prefetch(channels["olga"], "public", messages=b"", name="book")
    until(lambda: len(worker.of("preload")) == 2, "the name alone is not enough")
    hints_pb2_grpc.HintsStub(channels["olga"]).Cancel(CancelRequest(hint=accepted.hint))
    again.cancel()
    worker.leave()


def test_a_groups_contexts_are_for_its_tenants(channels: dict[str, grpc.Channel]) -> None:
    worker = TestWorker(channels["w1"])
    for who in ("bob", "w1", "olga"):
        assert refusal(prefetch, channels[who], "group:law") is FORBIDDEN
    assert refusal(prefetch, channels["ann"], "group:sales") is FORBIDDEN
    for namespace in ("group:", "private", "group", "PUBLIC"):
        assert refusal(prefetch, channels["ann"], namespace) is grpc.StatusCode.INVALID_ARGUMENT
    prefetch(channels["ann"], "group:law")
    (preload,) = worker.wait_for("preload")
    assert (preload.tenant, preload.context.namespace) == ("ann", "group:law")
    worker.leave()


def test_a_worker_hears_only_of_hints_and_speaks_for_no_tenant_in_them(channels: dict[str, grpc.Channel]) -> None:
    """Its own hints count for the settings' tenant, and it can end nobody else's."""
    worker = TestWorker(channels["w1"])
    _, accepted = prefetch(channels["ann"], "")
    hints = hints_pb2_grpc.HintsStub(channels["w1"])
    assert refusal(hints.Cancel, CancelRequest(hint=accepted.hint)) is grpc.StatusCode.NOT_FOUND
    prefetch(channels["w1"], "")
    until(lambda: len(worker.of("preload")) == 2, "the hint is not given")
    assert [preload.tenant for preload in worker.of("preload")] == ["ann", "default"]
    worker.leave()
