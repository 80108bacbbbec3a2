"""Public and group namespaces on real workers: who fills them, who finds them, who pays."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from processes import until
from service_thread import ServiceThread, attached, written
from workers import cold_answer, text

from kvprefetch.cache.shares import OPERATOR
from kvprefetch.client.connect import connect
from kvprefetch.contexts import Context
from kvprefetch.engines.engine import TransformersEngine
from kvprefetch.errors import InvalidRequest, PermissionDenied
from kvprefetch.inprocess import Local
from kvprefetch.outcomes import Outcome, Use
from kvprefetch.settings import GroupSettings, Settings

Open = Callable[..., TransformersEngine]
BLOCK = 16
MANUAL = text(1, 4 * BLOCK)
LAW = (GroupSettings("law", ("ann", "bob")),)


@contextmanager
def worker(engine: TransformersEngine) -> Iterator[Local]:
    with Local(engine, replace(Settings(), groups=LAW)) as kv:
        yield kv
        kv.check()
    kv.check()


def ask(kv: Local, prompt: list[int], **more: str) -> tuple[list[int], int]:
    """Tokens of the answer, and tokens of the prompt that were there."""
    done = kv.generate(token_ids=prompt, max_tokens=4, ignore_eos=True, **more).result()
    return done.tokens, done.reused_tokens + done.loaded_tokens


def charges(kv: Local) -> dict[str, float]:
    return {tenant: sum(kinds.values()) for tenant, kinds in kv.stats()["pool"]["charges"].items()}


def public(tokens: list[int]) -> Context:
    return Context(token_ids=tuple(tokens), namespace="public")


def test_what_the_operator_warms_every_tenant_finds_and_its_answers_are_the_same(open_tiny: Open) -> None:
    engine = open_tiny()
    questions = [MANUAL + text(at, 20) for at in (2, 3)]
    cold = [cold_answer(engine, question) for question in questions]
    with worker(engine) as kv:
        hint = kv.prefetch(public(MANUAL), hold_s=60.0)
        assert hint.wait(30).outcome is Outcome.WARM
        assert kv.stats()["pool"]["charges"] == {OPERATOR: {"speculative": 4}}
        for tenant, question, answer in zip(("ann", "eve"), questions, cold, strict=True):
            assert ask(kv.as_tenant(tenant), question) == (answer, 4 * BLOCK)
        assert charges(kv) == {OPERATOR: 4, "ann": 1, "eve": 1}
        until(lambda: hint.use is Use.USED, "the hint has no use")


def test_no_tenant_fills_the_public_namespace_by_whatever_way(open_tiny: Open) -> None:
    with worker(open_tiny()) as kv:
        ann = kv.as_tenant("ann")
        for fill in (
            lambda: ann.prefetch(public(MANUAL)),
            lambda: ann.signal("opened", session="s", contexts=[public(MANUAL)]),
            lambda: kv.signal("opened", session="s", contexts=[public(MANUAL)]),
            lambda: ann.generate(token_ids=MANUAL, namespace="public"),
            lambda: kv.generate(token_ids=MANUAL, namespace="public"),
        ):
            with pytest.raises(PermissionDenied):
                fill()
        for name in ("", "group:sales"):
            with pytest.raises((PermissionDenied, InvalidRequest)):
                kv.as_tenant(name).generate(token_ids=MANUAL, namespace="group:sales")
        assert kv.stats()["pool"]["resident"] == 0
        assert kv.stats()["prefetch"]["issued"] == 0


def test_a_tenants_own_preload_goes_on_behind_public_blocks_and_computes_none_of_them_again(open_tiny: Open) -> None:
    question = MANUAL + text(2, 2 * BLOCK)
    with worker(open_tiny()) as kv:
        kv.prefetch(public(MANUAL), hold_s=60.0).wait(30)
        ann = kv.as_tenant("ann")
        hint = ann.prefetch(ann.context(token_ids=question))
        assert hint.wait(30).tokens == 6 * BLOCK
        assert charges(kv) == {OPERATOR: 4, "ann": 2}
        assert ask(ann, [*question, 5])[1] == 6 * BLOCK
        assert hint.use is Use.USED


def test_a_hint_is_not_used_by_another_tenant_who_asks_for_the_same_public_beginning(open_tiny: Open) -> None:
    with worker(open_tiny()) as kv:
        shared = kv.prefetch(public(MANUAL), hold_s=60.0)
        shared.wait(30)
        ann, eve = kv.as_tenant("ann"), kv.as_tenant("eve")
        probe = eve.prefetch(eve.context(token_ids=MANUAL))
        assert probe.wait(30).outcome is Outcome.ALREADY_WARM
        ask(ann, [*MANUAL, 5])
        until(lambda: shared.use is Use.USED, "the operator does not hear of it")
        assert probe.use is None
        ask(eve, [*MANUAL, 5])
        assert probe.use is Use.USED


def test_public_blocks_that_are_gone_are_computed_for_oneself(open_tiny: Open) -> None:
    with worker(open_tiny()) as kv:
        kv.prefetch(public(MANUAL), hold_s=60.0).wait(30)
        kv.clear()
        ann = kv.as_tenant("ann")
        assert [ask(ann, [*MANUAL, 5])[1] for _ in range(2)] == [0, 4 * BLOCK]
        assert charges(kv) == {"ann": 4}


def test_a_group_shares_what_its_tenants_ask_in_its_name(open_tiny: Open) -> None:
    question = MANUAL + text(2, 20)
    engine = open_tiny()
    cold = cold_answer(engine, question)
    with worker(engine) as kv:
        ann, bob, eve = (kv.as_tenant(name) for name in ("ann", "bob", "eve"))
        assert ask(ann, question, namespace="group:law") == (cold, 0)
        assert ask(eve, question) == (cold, 0)
        assert ask(bob, question) == (cold, 5 * BLOCK)
        with pytest.raises(PermissionDenied, match="'eve' is in no group"):
            ask(eve, question, namespace="group:law")
        assert charges(kv) == {"ann": 2.5, "bob": 2.5, "eve": 5}


def test_a_member_that_leaves_finds_the_groups_blocks_no_more(open_tiny: Open) -> None:
    with worker(open_tiny()) as kv:
        ann, bob = kv.as_tenant("ann"), kv.as_tenant("bob")
        ask(ann, [*MANUAL, 5], namespace="group:law")
        kv.core.regroup((GroupSettings("law", ("ann",)),))
        assert ask(bob, [*MANUAL, 5])[1] == 0
        with pytest.raises(PermissionDenied):
            bob.prefetch(Context(token_ids=tuple(MANUAL), namespace="group:law"))


def test_a_groups_next_turn_is_prepared_in_its_name(open_tiny: Open) -> None:
    said = [{"role": "system", "content": "Please read the handbook first. " * 12}, {"role": "user", "content": "Hi?"}]
    with worker(open_tiny()) as kv:
        ann, bob = kv.as_tenant("ann"), kv.as_tenant("bob")
        done = ann.generate(said, session="s", namespace="group:law", max_tokens=20, ignore_eos=True).result()
        until(lambda: kv.stats()["prefetch"]["use_pending"] == 1, "the next turn is not prepared")
        more = [*said, {"role": "assistant", "content": done.text}, {"role": "user", "content": "And?"}]
        found = bob.generate(more, max_tokens=1).result()
        assert found.reused_tokens > done.prompt_tokens


# -- with a service ----------------------------------------------------------------------------------------
@pytest.fixture
def service(tmp_path: Path) -> Iterator[ServiceThread]:
    service = ServiceThread(tmp_path)
    yield service
    service.end()


def test_every_worker_has_the_public_context_those_that_start_later_too(
    open_tiny: Open, service: ServiceThread
) -> None:
    first, second = open_tiny(), open_tiny()
    with attached(first, service) as one, connect(service.address) as operator:
        context = operator.context(token_ids=MANUAL, namespace="public")
        hint = operator.prefetch(context, hold_s=86_400.0)
        assert hint.wait(30).outcome is Outcome.WARM
        written(one, service)
        assert service.call(lambda shelf: dict(shelf.host.usage().by_tenant)).keys() == {OPERATOR}
        with attached(second, service) as two:
            until(lambda: two.stats()["pool"]["resident"] == 4, "the later worker is not given it")
            assert two.stats()["node"]["read"]["loaded"] == 4, "the arena has it"
            for at, kv in enumerate((one, two)):
                assert ask(kv.as_tenant(f"tenant {at}"), [*MANUAL, 5])[1] == 4 * BLOCK
            assert charges(two) == {OPERATOR: 4}


def test_public_blocks_come_back_from_the_arena_for_any_tenant_and_stay_the_operators(
    open_tiny: Open, service: ServiceThread
) -> None:
    with attached(open_tiny(), service) as kv:
        kv.prefetch(public(MANUAL), hold_s=60.0).wait(30)
        written(kv, service)
        kv.clear()
        done = kv.as_tenant("eve").generate(token_ids=[*MANUAL, 5], max_tokens=4, ignore_eos=True).result()
        assert (done.reused_tokens, done.loaded_tokens) == (0, 4 * BLOCK)
        assert charges(kv) == {OPERATOR: 4}
        kv.clear()
        hint = kv.as_tenant("ann").prefetch(Context(token_ids=tuple(MANUAL + text(2, BLOCK))))
        assert hint.wait(30).tokens == 5 * BLOCK
        assert charges(kv) == {OPERATOR: 4, "ann": 1}


def test_what_the_arena_has_lost_is_not_asked_for_for_ever(open_tiny: Open, service: ServiceThread) -> None:
    with attached(open_tiny(), service) as kv:
        kv.prefetch(public(MANUAL), hold_s=60.0).wait(30)
        written(kv, service)
        kv.clear()
        service.call(lambda shelf: shelf.host.pool.clear())
        eve = kv.as_tenant("eve")
        assert [ask(eve, [*MANUAL, 5])[1] for _ in range(2)] == [0, 4 * BLOCK]
        assert charges(kv) == {"eve": 4}
        assert len(kv.worker.commons) == 0
