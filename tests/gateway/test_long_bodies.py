"""Long prompts cost their length once: what is done again for each piece or look does not grow with them."""

import asyncio
from dataclasses import replace
from functools import partial
from threading import current_thread, main_thread

import httpx
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvprefetch.client.handle import Prefetch
from kvprefetch.errors import UnknownContext
from kvprefetch.gateway import api, residency, service
from kvprefetch.gateway.app import make_gateway
from kvprefetch.gateway.contract import Answered, Dialect, Draft
from kvprefetch.gateway.engines.text import TextRenderer
from kvprefetch.gateway.engines.tokens import shared_prefix
from kvprefetch.gateway.link import open_links
from kvprefetch.gateway.service import followed
from kvprefetch.gateway.traffic import salted
from kvprefetch.gateway.wire import Cuts, canonical, next_draft, pieces, read_request, text_length
from kvprefetch.gateway.wire.conversation import CONVERSATIONS
from kvprefetch.outcomes import Outcome, Result
from kvprefetch.settings import GatewaySettings, Settings, UpstreamSettings

unhurried = settings(deadline=None, max_examples=60)  # busy machines are slow


def conversation(turns: int) -> Draft:
    said = [{"role": ("user", "assistant")[at % 2], "content": f"{at} " * 10} for at in range(turns)]
    return Draft(Dialect.CHAT, {"model": "m", "messages": said}, (b"",))


def test_the_pieces_of_a_long_conversation_measure_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    measured, measure = [], pieces._item_length
    monkeypatch.setattr(pieces, "_item_length", lambda item: measured.append(1) or measure(item))
    rendered = TextRenderer().render(conversation(2_000))
    for end in range(100, rendered.tokens, 100):
        rendered.request(end)
    cuts = rendered.tokens // 100
    assert len(measured) <= 2_000 + 3 * cuts


@unhurried
@given(st.lists(st.integers(0, 9), max_size=8), st.integers(0, 80))
def test_a_cut_says_how_long_it_is(lengths: list[int], chars: int) -> None:
    said = [{"role": "user", "content": "x" * length} for length in lengths]
    draft = Draft(Dialect.CHAT, {"messages": said, "tools": [{"name": "look"}]}, (b"",))
    body, length = Cuts(draft).cut(chars)
    assert length == text_length(replace(draft, body=body))
    text = "".join(turn["content"] for turn in body["messages"])
    room = max(chars - (text_length(draft) - sum(lengths)), 1)
    assert text == ("x" * sum(lengths))[:room] if any(lengths) else len(body["messages"]) >= 1


@pytest.mark.parametrize("dialect", [Dialect.CHAT, Dialect.MESSAGES, Dialect.RESPONSES])
def test_an_answer_that_goes_on_from_a_begun_one_reads_no_turn_again(
    dialect: Dialect, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = CONVERSATIONS[dialect]
    said = conversation(2_001).body["messages"]
    begun = [*said, {"role": "assistant", "content": "It is "}]
    asked = read_request(dialect, msgspec.json.encode({"model": "m", form.KEY: begun}))
    framed, frame = [], canonical.frame
    monkeypatch.setattr(canonical, "frame", lambda *values: framed.append(1) or frame(*values))
    draft = next_draft(asked, Answered())
    assert len(framed) <= 1
    assert draft is not None
    assert (draft.body[form.KEY], draft.canonical) == (said, (asked.opening, *form.turns(said)))


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_the_shared_prefix_is_the_longest(shared: list[int], one: list[int], other: list[int]) -> None:
    found = shared_prefix([*shared, *one], (*shared, *other))
    assert found == tuple([*shared, *one][: len(found)]) == (*shared, *other)[: len(found)]
    ends = [*one, -1][len(found) - len(shared) :], [*other, -2][len(found) - len(shared) :]
    assert len(found) >= len(shared)
    assert ends[0][0] != ends[1][0]


def test_a_prompt_that_is_looked_up_again_is_not_hashed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed, key_of = [], residency._key
    monkeypatch.setattr(residency, "_key", lambda *block: hashed.append(1) or key_of(*block))
    blocks, ids, parent = residency.Blocks(), tuple(range(16 * 500)), None
    for at in range(500):  # as it is warmed, block by block
        blocks.stored([at], parent, ids[16 * at : 16 * at + 16], 16)
        assert blocks.cached(ids) == 16 * at + 16
        parent = at
    assert len(hashed) == 2 * 500  # each once as it was stored, and once as it was looked up
    blocks.removed([250])
    assert (blocks.cached(ids), blocks.cached(ids, "a salt"), blocks.cached(ids)) == (16 * 250, 0, 16 * 250)


def test_long_contexts_are_read_away_from_the_loop_and_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    is_here: list[bool] = []
    for name in ("parse_object", "_read"):
        work = getattr(api, name)
        watched = partial(lambda work, *said: is_here.append(current_thread() is main_thread()) or work(*said), work)
        monkeypatch.setattr(api, name, watched)

    async def story() -> None:
        own = GatewaySettings(upstreams=(UpstreamSettings("http://127.0.0.1:1"),))
        async with open_links(own) as links:
            gateway = make_gateway(Settings(gateway=own), links)
            async with httpx.AsyncClient(transport=httpx.ASGITransport(gateway.app), base_url="http://here") as client:
                for turns in (21, 20_001):
                    body = conversation(turns).body
                    signal = {"kind": "opened", "contexts": [{**body, "name": "whole"}, {"name": "whole"}]}
                    answer = await client.post("/kvprefetch/v1/signal", json=signal)
                    assert (answer.status_code, len(answer.json()["hints"])) == (202, 2)
                    assert gateway.hints.recall(gateway.site.gate.tenant_of({}), "whole").body == body
                    malformed = b'{"kind": "opened", "contexts": [{}]' + b" " * 100 * turns
                    headers = {"content-type": "application/json"}
                    answer = await client.post("/kvprefetch/v1/signal", content=malformed, headers=headers)
                    assert answer.status_code == 400

    asyncio.run(story())
    assert is_here == [True] * 3 + [False] * 3


@pytest.mark.parametrize("space", [0, 1, 255, 256, 257, 100_000])
@pytest.mark.parametrize("fields", ['"prompt": "{"', ""])
def test_a_salt_is_put_behind_the_last_field_wherever_the_body_ends(fields: str, space: int) -> None:
    body = f"{{{fields}{' ' * space}}}\n".encode()
    assert msgspec.json.decode(salted(body, "s")) == {**msgspec.json.decode(body), "cache_salt": "s"}
    assert len(salted(body, "s")) == len(body) + len('"cache_salt":"s"') + bool(fields)


def test_a_hint_that_the_service_does_not_answer_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "_LATE_S", 0.02)
    said: list[Result] = []
    asyncio.run(followed(Prefetch(lambda handle: None), said.append, 0.01, lambda: True))
    assert said == [Result(Outcome.FAILED, 0, "the service does not answer")]


def test_a_hint_that_nobody_keeps_is_followed_no_longer() -> None:
    said: list[Result] = []
    kept = iter((True, True, False))
    asyncio.run(followed(Prefetch(lambda handle: None), said.append, 60.0, lambda: next(kept)))
    assert not said


def test_the_services_refusal_and_a_hint_that_is_about_to_have_an_outcome() -> None:
    async def story() -> None:
        refused, warm = Prefetch(lambda handle: None), Prefetch(lambda handle: None)
        refused.refuse(UnknownContext("never heard of it"))
        warm._result = Result(Outcome.WARM, 64)  # another thread is between two lines of `resolve`
        asyncio.get_running_loop().call_later(0.02, warm._done.set)
        said: list[Result] = []
        await followed(refused, said.append, 60.0, lambda: True)
        await followed(warm, said.append, 60.0, lambda: True)
        assert [(each.outcome, each.tokens) for each in said] == [(Outcome.REJECTED, 0), (Outcome.WARM, 64)]

    asyncio.run(story())
