"""The gateway before our own worker, both as processes: the client's base URL changes, and all else is as it was."""

import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from gateways import Gateway, Json, bearer, events, gateway, said
from processes import Process, until, written
from prometheus_client.parser import text_string_to_metric_families as parsed
from real_engines import RealEngine, free_port, worker
from services import credential

DOCUMENT = "The warehouse opens at seven and the night shift hands over its list of parcels. "
QUESTION = {"role": "user", "content": "What does the policy say about the second shelf?"}
NEXT = {"role": "user", "content": "And the first one?"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "description": "Look at a shelf.",
            "parameters": {"type": "object", "properties": {"shelf": {"type": "string"}}},
        },
    }
]
BLOCK = 32
SMALL = '[pool]\nsize = "64MiB"\n[engine]\ndtype = "float32"\n'
PEOPLE = {"ann": "tenant", "bob": "tenant", "boss": "operator", "machine": "worker"}


def token(name: str) -> str:
    return f"token-of-{name}"


def people() -> str:
    """Credentials, as settings have them."""
    each = (credential(name, role, token(name)) for name, role in PEOPLE.items())
    return "".join(
        f'[[credentials]]\nname = "{one.name}"\nrole = "{one.role}"\ntoken_sha256 = "{one.token_sha256}"\n'
        for one in each
    )


@pytest.fixture(scope="module")
def engine(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealEngine]:
    settings = written(tmp_path_factory.mktemp("worker") / "worker.toml", SMALL)
    with worker(tiny_model, "--settings", str(settings)) as running:
        yield running


@pytest.fixture(scope="module")
def site(engine: RealEngine) -> Iterator[Gateway]:
    with gateway(engine.url) as running:
        running.knows("kvprefetch")
        yield running


@pytest.fixture(scope="module")
def guarded(engine: RealEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """One that knows its callers."""
    settings = written(tmp_path_factory.mktemp("guarded") / "gateway.toml", people())
    with gateway(engine.url, settings=str(settings)) as running:
        until(lambda: running.engine(token=token("boss")) is not None, "the engine is not found")
        yield running


@pytest.fixture(scope="module")
def ai(site: Gateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=site.v1, api_key="unused", max_retries=0, timeout=60) as client:
        yield client


def document(name: str, repeated: int = 12) -> Json:
    """One that no other test has opened."""
    return {"role": "system", "content": f"{name}: " + DOCUMENT * repeated}


def chat(engine: RealEngine, *messages: Json, **more: Any) -> Json:
    return {"model": engine.model, "messages": list(messages), "max_tokens": 8, "ignore_eos": True, **more}


def cached(answer: httpx.Response) -> tuple[int, int]:
    """Tokens found in the cache, and all of the prompt."""
    assert answer.status_code == 200, answer.text
    usage = answer.json()["usage"]
    return usage["prompt_tokens_details"]["cached_tokens"], usage["prompt_tokens"]


# -- as without it ---------------------------------------------------------------------------------------------------
REQUESTS: dict[str, Json] = {
    "chat": {"messages": [QUESTION], "max_tokens": 8, "ignore_eos": True},
    "chat, streamed": {"messages": [QUESTION], "max_tokens": 8, "stream": True},
    "chat, streamed with its usage": {
        **{"messages": [QUESTION], "max_tokens": 8, "stream": True, "stream_options": {"include_usage": True}},
    },
    "chat with tools": {"messages": [QUESTION], "max_tokens": 8, "tools": TOOLS, "seed": 3, "temperature": 0},
    "chat of another model": {"messages": [QUESTION], "model": "another"},
    "chat without messages": {"messages": []},
    "chat with odd messages": {"messages": 5},
    "chat with an odd limit": {"messages": [QUESTION], "max_tokens": "many"},
    "two answers": {"messages": [QUESTION], "n": 2},
    "completion of text": {"prompt": DOCUMENT, "max_tokens": 8, "ignore_eos": True},
    "completion of token ids": {"prompt": [5, 6, 7, 8, 9], "max_tokens": 8, "stop": ["a"]},
    "completion, streamed": {"prompt": DOCUMENT, "max_tokens": 8, "stream": True},
    "completion of nothing": {"max_tokens": 8},
    "completion of what is no token": {"prompt": [5, 10**9], "max_tokens": 8},
    "too long a prompt": {"prompt": [5] * 9_000, "max_tokens": 8},
}


@pytest.mark.parametrize("name", REQUESTS)
def test_answers_and_errors_are_the_workers_own(site: Gateway, engine: RealEngine, name: str) -> None:
    path = "/v1/chat/completions" if "messages" in REQUESTS[name] else "/v1/completions"
    body = {"model": engine.model, "temperature": 0, **REQUESTS[name]}
    here, there = (said(httpx.post(url + path, json=body, timeout=60)) for url in (engine.url, site.url))
    assert there == here


@pytest.mark.parametrize("method_and_path", ["GET /v1/models", "GET /v1/nothing", "DELETE /v1/models", "GET /nothing"])
def test_all_other_paths_are_the_workers_own(site: Gateway, engine: RealEngine, method_and_path: str) -> None:
    method, path = method_and_path.split()
    here, there = (said(httpx.request(method, url + path, timeout=60)) for url in (engine.url, site.url))
    assert there == here


@pytest.mark.parametrize(
    ("body", "kind"),
    [(b"{", "application/json"), (b'["a"]', "application/json"), (b"{}", "text/plain"), (b"\xff", "application/json")],
)
def test_what_cannot_be_read_is_refused_by_the_worker_itself(
    site: Gateway, engine: RealEngine, body: bytes, kind: str
) -> None:
    path, headers = "/v1/chat/completions", {"content-type": kind}
    here, there = (said(httpx.post(url + path, content=body, headers=headers)) for url in (engine.url, site.url))
    assert there == here
    assert there[0] in (400, 415)


def test_the_openai_client_notices_nothing_but_its_base_url(engine: RealEngine, ai: openai.OpenAI) -> None:
    direct = openai.OpenAI(base_url=f"{engine.url}/v1", api_key="unused", max_retries=0, timeout=60)
    assert [model.id for model in ai.models.list()] == [engine.model]
    told = {"model": engine.model, "max_tokens": 12, "temperature": 0, "extra_body": {"ignore_eos": True}}
    messages = [document("openai"), QUESTION]
    whole = [each.chat.completions.create(messages=messages, tools=TOOLS, **told) for each in (direct, ai)]
    assert whole[0].choices == whole[1].choices
    assert whole[0].usage.completion_tokens == whole[1].usage.completion_tokens == 12
    pieces = ai.chat.completions.create(messages=messages, tools=TOOLS, stream=True, **told)
    assert "".join(each.choices[0].delta.content or "" for each in pieces) == whole[0].choices[0].message.content
    texts = [each.completions.create(prompt=DOCUMENT, **told).choices[0].text for each in (direct, ai)]
    assert texts[0] == texts[1]
    with pytest.raises(openai.NotFoundError):
        ai.chat.completions.create(messages=messages, model="another")


# -- an opened document ----------------------------------------------------------------------------------------------
def test_questions_about_an_opened_document_are_answered_from_a_warm_cache(
    site: Gateway, engine: RealEngine, ai: openai.OpenAI
) -> None:
    opened = document("opened")
    context = {"model": engine.model, "messages": [opened], "name": "the handbook"}
    (hint,) = site.signal({"kind": "document_opened", "session": "reader", "contexts": [context]})
    assert (site.ended(hint)["outcome"], site.look(hint)["use"]) == ("warm", None)
    headers = {"X-KVPrefetch-Session": "reader"}
    told = {"model": engine.model, "max_tokens": 4, "extra_headers": headers}
    first = ai.chat.completions.create(messages=[opened, QUESTION], **told)
    assert first.usage.prompt_tokens_details.cached_tokens > first.usage.prompt_tokens - 3 * BLOCK
    until(lambda: site.look(hint)["use"] is not None, "the hint has no use")
    assert site.look(hint)["use"] == "used"
    assert site.look(hint)["because"].startswith("signal document_opened")
    second = ai.chat.completions.create(messages=[opened, NEXT], **told)
    assert second.usage.prompt_tokens_details.cached_tokens > second.usage.prompt_tokens - 3 * BLOCK


def test_a_context_is_given_again_by_its_name(site: Gateway, engine: RealEngine) -> None:
    context = {"model": engine.model, "messages": [document("named")], "name": "manual"}
    assert site.hint({"context": context})["outcome"] == "warm"
    assert site.hint({"context": {"name": "manual"}})["outcome"] == "already_warm"
    (hint,) = site.signal({"kind": "document_opened", "session": "another", "contexts": [{"name": "manual"}]})
    assert site.ended(hint)["outcome"] == "already_warm"
    answer = site.asked("POST", "prefetch", {"context": {"name": "nobody's"}})
    assert answer.status_code == 404
    assert "nobody's" in answer.json()["error"]["message"]


# -- the providers' own prewarm --------------------------------------------------------------------------------------
@pytest.mark.parametrize("ask", [{"max_tokens": 0}, {"prompt_cache_options": {"prewarm": True}}], ids=str)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_a_prewarm_request_is_answered_once_its_prompt_is_warm(
    site: Gateway, engine: RealEngine, path: str, stream: bool, ask: Json
) -> None:
    words = f"{path} {stream} {ask} " + DOCUMENT * 12
    prompt = {"prompt": words} if path == "completions" else {"messages": [{"role": "user", "content": words}]}
    options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    body = {"model": engine.model, **prompt}
    answer = site.http.post(f"/v1/{path}", json={**body, **ask, **options})
    assert answer.status_code == 200, answer.text
    last = events(answer.text)[-2] if stream else answer.json()
    usage, said = last["usage"], last["kvprefetch"]
    assert (said["outcome"], usage["completion_tokens"]) == ("warm", 0)
    assert usage["prompt_tokens_details"]["cached_tokens"] == said["tokens"] > 100
    assert said["expires_at"] > 0
    found, _ = cached(site.http.post(f"/v1/{path}", json={**body, "max_tokens": 1}))
    assert found >= usage["prompt_tokens"] - 2 * BLOCK


def test_a_prewarm_request_says_why_its_prompt_is_not_warm(site: Gateway, engine: RealEngine) -> None:
    long = site.http.post("/v1/completions", json={"model": engine.model, "prompt": [5] * 9_000, "max_tokens": 0})
    assert (long.status_code, long.json()["kvprefetch"]["outcome"]) == (200, "failed")
    assert "status 400" in long.json()["kvprefetch"]["reason"]
    batch = site.http.post("/v1/completions", json={"model": engine.model, "prompt": ["a", "b"], "max_tokens": 0})
    assert batch.status_code == 400
    assert "warmed" in batch.json()["error"]["message"]


# -- sessions --------------------------------------------------------------------------------------------------------
def conversation(site: Gateway, engine: RealEngine, name: str, named: bool) -> None:
    """Two turns; the second finds all but its own words."""
    headers = {"X-KVPrefetch-Session": name} if named else {}
    before = site.stats()["sessions"]
    messages = [document(name), QUESTION]
    first = site.http.post("/v1/chat/completions", json=chat(engine, *messages, max_tokens=40), headers=headers)
    messages += [first.json()["choices"][0]["message"], NEXT]
    until(lambda: site.metric("upstream_live") == 0, "the first turn does not end")
    until(lambda: site.metric("preloads_waiting") == 0, "its next turn is not prepared")
    found, total = cached(site.http.post("/v1/chat/completions", json=chat(engine, *messages), headers=headers))
    assert found > total - 3 * BLOCK
    assert site.stats()["sessions"] == before + 1


@pytest.mark.parametrize("named", [False, True], ids=["inferred", "named"])
def test_the_next_turn_of_a_session_goes_on_with_it(site: Gateway, engine: RealEngine, named: bool) -> None:
    conversation(site, engine, f"a session, {named}", named)


def test_the_end_of_a_session_withdraws_what_waits_for_it(guarded: Gateway, engine: RealEngine) -> None:
    who = token("ann")
    long = chat(engine, document("long"), QUESTION, max_tokens=1_500)
    with guarded.http.stream("POST", "/v1/chat/completions", json={**long, "stream": True}, headers=bearer(who)):
        context = {"model": engine.model, "messages": [document("withdrawn", 40)], "name": "withdrawn"}
        (hint,) = guarded.signal({"kind": "document_opened", "session": "leaver", "contexts": [context]}, who)
        assert guarded.signal({"kind": "session_ended", "session": "leaver"}, who) == []
        ended = guarded.look(hint, who)
    assert (ended["outcome"], ended["reason"]) == ("cancelled", "the session ended")


def test_a_hint_is_withdrawn_by_its_id(site: Gateway, engine: RealEngine) -> None:
    far = {"context": {"model": engine.model, "messages": [document("far")]}, "expected_in_s": 1e6, "probability": 0.0}
    given = site.asked("POST", "prefetch", far)
    assert (given.status_code, given.json()["outcome"]) == (202, None)
    withdrawn = site.asked("DELETE", f"prefetch/{given.json()['id']}")
    assert (withdrawn.status_code, withdrawn.json()["outcome"]) == (200, "cancelled")
    assert site.look(given.json()["id"])["outcome"] == "cancelled"
    assert site.asked("GET", "prefetch/none").status_code == 404


# -- who may what ----------------------------------------------------------------------------------------------------
def test_one_tenants_hints_sessions_and_figures_are_none_of_anothers(guarded: Gateway, engine: RealEngine) -> None:
    ann, bob = token("ann"), token("bob")
    context = {"model": engine.model, "messages": [document("ann's")], "name": "diary"}
    hint = guarded.hint({"context": context, "session": "s"}, ann)
    assert guarded.look(hint["id"], ann)["outcome"] == "warm"
    for method in ("GET", "DELETE"):
        assert guarded.asked(method, f"prefetch/{hint['id']}", token=bob).status_code == 404
    assert guarded.asked("POST", "prefetch", {"context": {"name": "diary"}}, bob).status_code == 404
    mine, theirs, all_of_it = (guarded.stats(each) for each in (ann, bob, token("boss")))
    assert mine["hints"]["known"] >= 1
    assert mine["sessions"] >= 1
    assert (theirs["hints"]["known"], theirs["sessions"]) == (0, 0)
    assert "upstreams" not in mine
    assert all_of_it["hints"]["known"] == mine["hints"]["known"]
    assert all_of_it["upstreams"][0]["prefetch"]["issued"] >= 1
    assert guarded.signal({"kind": "session_ended", "session": "s"}, bob) == []
    assert guarded.stats(ann)["sessions"] == mine["sessions"]


@pytest.mark.parametrize("who", ["boss", "machine", "nobody", ""])
def test_answers_are_for_tenants_alone(guarded: Gateway, engine: RealEngine, who: str) -> None:
    given = bearer(token(who) if who else "")
    expected = 403 if who in PEOPLE else 401
    for path in ("/v1/chat/completions", "/v1/completions", "/kvprefetch/v1/prefetch", "/kvprefetch/v1/signal"):
        answer = guarded.http.post(path, json=chat(engine, QUESTION), headers=given)
        assert answer.status_code == expected, path
        assert answer.json()["error"]["message"]
    assert guarded.http.get("/v1/models", headers=given).status_code == expected
    assert guarded.http.get("/kvprefetch/v1/stats", headers=given).status_code == (200 if who == "boss" else expected)


def test_a_tenant_may_send_its_key_as_anthropics_clients_do(guarded: Gateway, engine: RealEngine) -> None:
    answer = guarded.http.post("/v1/chat/completions", json=chat(engine, QUESTION), headers={"x-api-key": token("ann")})
    assert answer.status_code == 200


# -- figures ---------------------------------------------------------------------------------------------------------
def test_the_metrics_are_read_by_prometheus_and_add_up(site: Gateway, engine: RealEngine) -> None:
    for at in range(3):
        site.http.post("/v1/chat/completions", json=chat(engine, document(f"metrics {at}"), QUESTION))
        assert site.http.post("/v1/chat/completions", json={"messages": 5}).status_code == 400
    until(lambda: site.metric("preloads_waiting") == 0, "preloads wait for ever")
    answer = site.http.get("/metrics")
    samples = [sample for family in parsed(answer.text) for sample in family.samples]

    def total(name: str, **labels: str) -> float:
        names = (f"kvprefetch_gateway_{name}", f"kvprefetch_gateway_{name}_total")
        return sum(s.value for s in samples if s.name in names and labels.items() <= s.labels.items())

    books = site.stats()["upstreams"][0]["prefetch"]
    assert total("preloads") == total("preload_outcomes") + total("preloads_waiting") == books["issued"]
    resident = sum(total("preload_outcomes", outcome=each) for each in ("warm", "already_warm", "clipped"))
    assert resident == total("preload_uses") + books["use_pending"]
    assert total("preload_uses", use="used") >= 1
    assert total("requests", status="400") >= 3
    streams = total("ttft_seconds_count")  # of answers in one piece nobody sees the first token
    with site.http.stream("POST", "/v1/chat/completions", json=chat(engine, QUESTION, stream=True)) as stream:
        stream.read()
    samples = [sample for family in parsed(site.http.get("/metrics").text) for sample in family.samples]
    assert total("ttft_seconds_count") == streams + 1 <= total("requests", status="200")
    assert total("prompt_tokens", kind="cached") < total("prompt_tokens", kind="all")
    assert "text/plain" in answer.headers["content-type"]


# -- several engines, and their ends ---------------------------------------------------------------------------------
def test_sessions_stick_to_their_engine_and_an_engine_that_dies_is_avoided(
    tiny_model: Path, engine: RealEngine, tmp_path: Path
) -> None:
    port, settings = str(free_port()), str(written(tmp_path / "worker.toml", SMALL))
    told = ("worker", "--model", str(tiny_model), "--service", "none", "--port", port, "--settings", settings)
    with ExitStack() as stack:
        other = stack.enter_context(Process(*told))
        other.says("http://")
        site = stack.enter_context(gateway(engine.url, f"http://127.0.0.1:{port}"))
        site.knows("kvprefetch", 0)
        site.knows("kvprefetch", 1)

        def ask(name: str, *turns: Json, **more: Any) -> httpx.Response:
            headers = {"X-KVPrefetch-Session": name}
            return site.http.post("/v1/chat/completions", json=chat(engine, *turns, **more), headers=headers)

        long = chat(engine, QUESTION, max_tokens=4_000, stream=True)
        with site.http.stream("POST", "/v1/chat/completions", json=long, headers={"X-KVPrefetch-Session": "busy"}) as s:
            pieces = s.iter_raw()
            next(pieces)  # at the first engine: the least loaded is the other
            first, _ = cached(ask("sticky", document("sticky"), QUESTION))
            assert (first, site.metric("upstream_live", 0), site.metric("upstream_live", 1)) == (0, 1, 0)
        until(lambda: site.metric("upstream_live", 0) == 0, "a client that left is still served")
        found, total = cached(ask("sticky", document("sticky"), QUESTION))  # where its context is, busy or not
        assert found > total - 2 * BLOCK
        long |= {"messages": [document("sticky"), NEXT]}
        headers = {"X-KVPrefetch-Session": "sticky"}
        stream = stack.enter_context(site.http.stream("POST", "/v1/chat/completions", json=long, headers=headers))
        pieces = stream.iter_raw()
        next(pieces)
        assert site.metric("upstream_live", 1) == 1
        other.kill()
        with pytest.raises(httpx.RemoteProtocolError):  # never an answer that looks complete
            for _ in pieces:
                pass
        until(lambda: site.metric("upstream_up", 1) == 0, "nobody notices its death")
        assert site.http.get("/health").json()["status"] == "ok"
        assert ask("sticky", document("sticky"), QUESTION).status_code == 200
        assert ask("new", QUESTION).status_code == 200


def test_health_says_whether_an_engine_is_there(tiny_model: Path) -> None:
    port = free_port()
    with gateway(f"http://127.0.0.1:{port}") as site:
        until(lambda: site.http.get("/health").status_code == 503, "it is healthy without an engine")
        answer = site.http.post("/v1/chat/completions", json={"messages": [QUESTION]})
        assert answer.status_code == 502
        assert "cannot be reached" in answer.json()["error"]["message"]
        hint = site.asked("POST", "prefetch", {"context": {"messages": [document("early")]}})
        assert (hint.status_code, hint.json()["outcome"]) == (202, None)
        for turn in range(2):  # it comes, goes, and comes back
            with Process("worker", "--model", str(tiny_model), "--service", "none", "--port", str(port)) as engine:
                engine.says("http://")
                until(lambda: site.http.get("/health").status_code == 200, "it is not healthy with one")
                assert site.ended(hint.json()["id"])["outcome"] == "warm"
                asked = {"messages": [document("early"), QUESTION], "max_tokens": 1}
                if turn == 1:  # what it had is lost, and that is known: its sessions may have been warmed again
                    assert site.hint({"context": {"messages": asked["messages"][:1]}})["outcome"].endswith("warm")
                assert cached(site.http.post("/v1/chat/completions", json=asked))[0] > 100
                if turn == 0:
                    engine.kill()
                    assert site.http.post("/v1/chat/completions", json={"messages": [QUESTION]}).status_code == 502
                    until(lambda: site.http.get("/health").status_code == 503, "it is healthy without an engine")


# -- a cache service -------------------------------------------------------------------------------------------------
def test_hints_go_through_a_cache_service_to_the_worker_that_is_registered_there(
    tiny_model: Path, tmp_path: Path
) -> None:
    address = f"unix://{tmp_path}/s.sock"
    settings = written(
        tmp_path / "all.toml",
        SMALL
        + f'[service]\nlisten = ["{address}"]\nstate_dir = "{tmp_path}"\n'
        + f'[arena]\ndir = "{tmp_path}/arena"\nsize = "32MiB"\nprefault = false\nhuge_pages = false\n'
        + people(),
    )
    said = ("--settings", str(settings))
    with ExitStack() as stack:
        stack.enter_context(Process("serve", *said)).says("listening")
        told = ("worker", "--model", str(tiny_model), "--service", address, "--token", token("machine"), "--port", "0")
        running = stack.enter_context(Process(*told, *said))
        url = re.search(r"http://[\w.:]+", running.says("http://"))
        assert url is not None
        site = stack.enter_context(gateway(url[0], settings=str(settings), service=address))
        until(lambda: site.engine(token=token("boss")) is not None, "the engine is not found")
        engine = RealEngine(url[0], str(tiny_model), 0, tmp_path)
        who, opened = token("ann"), document("of the service")
        hint = site.hint({"context": {"model": engine.model, "messages": [opened]}, "session": "s"}, who)
        assert hint["outcome"] == "warm", hint
        headers = {**bearer(who), "X-KVPrefetch-Session": "s"}
        asked = site.http.post("/v1/chat/completions", json=chat(engine, opened, QUESTION), headers=headers)
        found, total = cached(asked)
        assert found > total - 3 * BLOCK
        until(lambda: site.look(hint["id"], who)["use"] == "used", "the service does not learn of its use")
        assert site.asked("GET", f"prefetch/{hint['id']}", token=token("bob")).status_code == 404
        bad = site.asked("POST", "prefetch", {"context": {"prompt": "text", "endpoint": "/v1/completions"}}, who)
        assert bad.status_code == 400
