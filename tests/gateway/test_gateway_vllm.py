"""The gateway before a real vLLM: official clients get vLLM's own answers, sooner."""

import json
import random
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import anthropic
import httpx
import openai
import pytest
from gateways import Gateway, Json, bearer, events, gateway, said
from processes import until, written
from real_engines import VLLM_PYTHON, RealEngine, free_port, needs_vllm, vllm
from services import credential

pytestmark = needs_vllm
BLOCK = 32
SENTENCES = (
    "The warehouse opens at seven and the night shift hands over its list of parcels. ",
    "A short answer is enough: yes, the second shelf holds the spare parts for the pump. ",
    "Please read the handbook first, then tell me what the return policy says about shoes. ",
    "In 2024 there were 365 requests a day, 17 of them late; in 2025 there were 410. ",
)
QUESTION = {"role": "user", "content": "What does the policy say about the second shelf?"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"{name} a shelf.",
            "strict": True,
            "parameters": {
                "type": "object",
                "properties": {"shelf": {"type": "string", "enum": ["first", "second"]}},
                "required": ["shelf"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("look", "fill")
]


@dataclass(frozen=True)
class Site:
    """vLLM, and a gateway that hears its KV events."""

    engine: RealEngine
    gateway: Gateway
    settings: str  # the gateway's upstreams


@pytest.fixture(scope="module")
def site(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    port = free_port()
    told = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": f"tcp://*:{port}", "topic": "kv"}
    flags = ["--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--kv-events-config", json.dumps(told)]
    terse = {"backend": "xgrammar", "disable_any_whitespace": True}  # else this model's calls are endless
    flags += ["--structured-outputs-config", json.dumps(terse)]
    with vllm(tiny_model, *flags) as engine:
        listed = f'[[gateway.upstreams]]\nurl = "{engine.url}"\nkv_events = "tcp://127.0.0.1:{port}"\n'
        settings = written(tmp_path_factory.mktemp("gateway") / "gateway.toml", listed)
        with gateway(settings=str(settings)) as running:
            running.knows("vllm")
            yield Site(engine, running, listed)


def document(name: str, repeated: int = 24) -> str:
    """One that no other test has."""
    return f"{uuid4().hex} {name}: " + SENTENCES[2] * repeated


def usage_of(answer: httpx.Response) -> tuple[int, int]:
    """Tokens found in the cache, and all of the prompt."""
    assert answer.status_code == 200, answer.text
    usage = answer.json()["usage"]
    return (usage["prompt_tokens_details"] or {}).get("cached_tokens", 0), usage["prompt_tokens"]


# -- the same answers ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Request:
    """One of a mixed traffic. `leaves_after`: events of the answer that are read before the client is gone."""

    path: str
    body: Json
    leaves_after: int = 0

    def ask(self, url: str, salt: str) -> httpx.Response:
        return httpx.post(url + self.path, json={"cache_salt": salt, **self.body}, timeout=120)

    def leave(self, url: str, salt: str) -> str:
        """What was read of the answer's text."""
        read = ""
        body = {"cache_salt": salt, **self.body}
        with httpx.stream("POST", url + self.path, json=body, timeout=120) as answer:
            for at, line in enumerate(answer.iter_lines()):
                for event in events(line):
                    read += text_of(event) if isinstance(event, dict) else ""
                if at >= self.leaves_after:
                    break
        return read


def text_of(event: Json) -> str:
    (choice,) = event["choices"] or [{}]
    return choice.get("text") or choice.get("delta", {}).get("content") or ""


def traffic(count: int) -> list[Request]:
    """Chats with tools and without, completions, streams, clients that leave, and bad requests."""
    draw = random.Random(6)
    openings = [draw.choice(SENTENCES) * draw.randrange(2, 12) for _ in range(8)]
    kinds = draw.choices((chat, chat_with_tools, completion, ids, bad), (5, 3, 3, 2, 2), k=count)
    return [kind(draw, draw.choice(openings)) for kind in kinds]


def finished(draw: random.Random, path: str, body: Json) -> Request:
    body = {"model": "tiny", "temperature": 0, "max_tokens": draw.randrange(1, 24), **body}
    if draw.random() < 0.5:
        return Request(path, body)
    body["stream"] = True
    if draw.random() < 0.5:
        body["stream_options"] = {"include_usage": True}
    return Request(path, body, draw.randrange(1, 12) if draw.random() < 0.3 else 0)


def chat(draw: random.Random, opening: str, **more: Any) -> Request:
    messages = [{"role": "system", "content": opening}]
    for _ in range(draw.randrange(3)):
        messages += [{"role": "user", "content": draw.choice(SENTENCES)}, {"role": "assistant", "content": "Yes."}]
    messages.append({"role": "user", "content": draw.choice(SENTENCES)})
    return finished(draw, "/v1/chat/completions", {"messages": messages, **more})


def chat_with_tools(draw: random.Random, opening: str) -> Request:
    named = {"type": "function", "function": {"name": draw.choice(("look", "fill"))}}
    return chat(draw, opening, tools=TOOLS, tool_choice=draw.choice(("auto", "none", named, "required")), max_tokens=64)


def completion(draw: random.Random, opening: str) -> Request:
    return finished(draw, "/v1/completions", {"prompt": opening + draw.choice(SENTENCES), "ignore_eos": True})


def ids(draw: random.Random, opening: str) -> Request:
    count = draw.randrange(10, 300)
    return finished(draw, "/v1/completions", {"prompt": [2 + at * 7 % 480 for at in range(count)], "stop": ["e"]})


def bad(draw: random.Random, opening: str) -> Request:
    path, body = draw.choice(
        (
            ("/v1/chat/completions", {"model": "tiny", "messages": 5}),
            ("/v1/chat/completions", {"model": "tiny"}),
            ("/v1/chat/completions", {"model": "another", "messages": [QUESTION]}),
            ("/v1/chat/completions", {"model": "tiny", "messages": [QUESTION], "max_tokens": -1}),
            ("/v1/completions", {"model": "tiny", "prompt": [5] * 9_000}),
            ("/v1/completions", {"model": "tiny", "prompt": opening, "temperature": "hot"}),
            ("/v1/nothing", {"model": "tiny"}),
        )
    )
    return Request(path, body)


@contextmanager
def hints(site: Gateway, requests: list[Request], salt: str) -> Iterator[None]:
    """Hints and signals all the while: every other of them is right."""
    stop = threading.Event()

    def give() -> None:
        for at, request in enumerate(requests * 10):
            if stop.wait(0.02):
                return
            said = {k: v for k, v in request.body.items() if k in ("model", "messages", "prompt", "tools")}
            if at % 2:
                said = {"model": "tiny", "messages": [{"role": "system", "content": document(f"wrong {at}")}]}
            context = {**said, "endpoint": request.path, "cache_salt": salt}
            if at % 2:
                context["endpoint"] = "/v1/chat/completions"
            site.asked("POST", "prefetch", {"context": context})  # one of a bad request may be refused
            site.signal({"kind": "opened", "session": f"s{at % 5}"})

    thread = threading.Thread(target=give)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_200_mixed_requests_are_answered_as_without_the_gateway(site: Site) -> None:
    requests = traffic(200)
    with ThreadPoolExecutor(4) as pool:
        whole = list(pool.map(lambda each: each.ask(site.engine.url, "direct"), requests))
        with hints(site.gateway, requests, "gateway"):
            given: list[httpx.Response | str] = []
            for at in range(0, len(requests), 8):
                given += pool.map(lambda each: answer_of(each, site.gateway.url), requests[at : at + 8])
                time.sleep(0.2)  # or nothing would be warmed
    for request, direct, through in zip(requests, whole, given, strict=True):
        if isinstance(through, str):
            text = "".join(text_of(event) for event in events(direct.text) if isinstance(event, dict))
            assert text.startswith(through), request
        else:
            assert said(through) == said(direct), request
    statuses = [answer.status_code for answer in whole]
    assert statuses.count(200) > 150
    assert {400, 404} <= set(statuses)
    assert sum('"tool_calls":[{' in answer.text for answer in whole) > 5
    stats = site.gateway.stats()["upstreams"][0]
    assert stats["pieces"]["sent"] > 20
    assert stats["prefetch"]["uses"]["USED"] > 0


def answer_of(request: Request, url: str) -> httpx.Response | str:
    return request.leave(url, "gateway") if request.leaves_after else request.ask(url, "gateway")


# -- official clients ------------------------------------------------------------------------------------------------
def test_anthropics_client_has_a_document_warm_and_asks(site: Site) -> None:
    text = document("anthropic")
    system = [{"type": "text", "text": text, "cache_control": {"type": "ephemeral"}}]
    told: Json = {"model": "tiny", "system": system, "messages": [QUESTION], "extra_body": {"temperature": 0}}
    client, direct = (
        anthropic.Anthropic(base_url=url, api_key="unused", max_retries=0, timeout=60)
        for url in (site.gateway.url, site.engine.url)
    )
    warm = client.messages.create(max_tokens=0, **told)
    assert (warm.content, warm.usage.output_tokens, warm.stop_reason) == ([], 0, "max_tokens")
    assert warm.to_dict()["kvprefetch"]["outcome"] == "warm"
    whole = client.messages.create(max_tokens=8, **told)
    assert whole.usage.cache_read_input_tokens > 24 * 10
    assert warm.usage.cache_read_input_tokens >= whole.usage.cache_read_input_tokens > 0
    again = direct.messages.create(max_tokens=8, **told)
    assert (again.content[0].text, again.stop_reason) == (whole.content[0].text, whole.stop_reason)
    with client.messages.stream(max_tokens=8, **told) as stream:
        assert "".join(stream.text_stream) == whole.content[0].text
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(max_tokens=8, messages=[QUESTION], model="another")


def test_openais_responses_are_the_engines_own(site: Site) -> None:
    client, direct = (
        openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=60)
        for url in (site.gateway.url, site.engine.url)
    )
    told: Json = {"model": "tiny", "instructions": document("responses"), "temperature": 0, "max_output_tokens": 16}
    answers = [each.responses.create(input="And?", **told) for each in (direct, client)]
    assert answers[0].output_text == answers[1].output_text
    assert answers[0].status == answers[1].status
    assert answers[1].usage.input_tokens_details.cached_tokens > 100
    with client.responses.stream(input="And?", **told) as stream:
        assert stream.get_final_response().output_text == answers[0].output_text


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_a_document_that_was_opened_is_found_to_its_last_full_block(site: Site, path: str) -> None:
    opened = {"role": "system", "content": document(path)}
    is_chat = path.startswith("chat")
    body = {"messages": [opened]} if is_chat else {"prompt": opened["content"]}
    (hint,) = site.gateway.signal(
        {
            "kind": "document_opened",
            "session": f"reader of {path}",
            "contexts": [{"model": "tiny", "endpoint": f"/v1/{path}", **body}],
        }
    )
    ended = site.gateway.ended(hint)
    assert ended["outcome"] == "warm"
    asked = {"messages": [opened, QUESTION]} if is_chat else {"prompt": opened["content"] + " What?"}
    answer = site.gateway.http.post(f"/v1/{path}", json={"model": "tiny", "max_tokens": 4, **asked})
    found, total = usage_of(answer)
    assert found == ended["tokens"]
    assert found % BLOCK == 0
    assert total - found < 2 * BLOCK + 24
    until(lambda: site.gateway.look(hint)["use"] == "used", "the hint was of no use")


def test_what_kv_events_say_is_there_is_not_sent_again(site: Site) -> None:
    messages = [{"role": "system", "content": document("by others")}]
    told: Json = {"model": "tiny", "messages": [*messages, QUESTION], "max_tokens": 1}
    assert httpx.post(f"{site.engine.url}/v1/chat/completions", json=told, timeout=60).status_code == 200
    until(lambda: site.gateway.metric("preloads_waiting") == 0, "preloads wait for ever")
    before = site.gateway.metric("pieces_total")
    hint = site.gateway.hint({"context": {"model": "tiny", "messages": messages}})
    assert (hint["outcome"], hint["computed_tokens"]) == ("already_warm", 0)
    assert site.gateway.metric("pieces_total") == before
    assert hint["tokens"] > 200


# -- tenants, and others at the engine -------------------------------------------------------------------------------
def test_two_tenants_same_prompt_is_computed_for_each(site: Site, tmp_path: Path) -> None:
    listed = site.settings
    for name in ("ann", "bob"):
        one = credential(name, "tenant", f"token-of-{name}")
        listed += f'[[credentials]]\nname = "{name}"\ntoken_sha256 = "{one.token_sha256}"\n'
    with gateway(settings=str(written(tmp_path / "gateway.toml", listed))) as running:
        told: Json = {"model": "tiny", "messages": [{"role": "system", "content": document("secret")}, QUESTION]}

        def ask(name: str) -> int:
            given = bearer(f"token-of-{name}")
            return usage_of(running.http.post("/v1/chat/completions", json={**told, "max_tokens": 1}, headers=given))[0]

        running.hint({"context": {"model": "tiny", "messages": told["messages"][:1]}}, "token-of-ann")
        assert [ask(name) > 0 for name in ("bob", "ann", "bob", "ann")] == [False, True, True, True]


def test_two_gateways_before_one_engine_make_way_for_each_others_requests(site: Site, tmp_path: Path) -> None:
    with gateway(settings=str(written(tmp_path / "gateway.toml", site.settings))) as other:
        other.knows("vllm")
        both = (site.gateway, other)
        for one in both:
            until(lambda one=one: one.metric("preloads_waiting") == 0, "preloads wait for ever")
        long: Json = {"model": "tiny", "prompt": "And so on: ", "max_tokens": 4_000, "ignore_eos": True}
        with site.gateway.http.stream("POST", "/v1/completions", json={**long, "stream": True}) as stream:
            pieces = stream.iter_raw()
            next(pieces)
            before = other.metric("pieces_total")
            context = {"model": "tiny", "messages": [{"role": "system", "content": document("waits", 60)}]}
            waiting = other.asked("POST", "prefetch", {"context": context}).json()["id"]
            for _ in range(20):
                next(pieces)
            assert other.metric("pieces_total") == before
            assert other.look(waiting)["outcome"] is None
        assert other.ended(waiting)["outcome"] == "warm", other.look(waiting)
        given = []
        for at, one in enumerate(both * 3):
            context = {"model": "tiny", "prompt": document(f"{at}", 60), "endpoint": "/v1/completions"}
            given.append((one, one.asked("POST", "prefetch", {"context": context}).json()["id"]))
        asked = {"model": "tiny", "prompt": document("live", 4), "max_tokens": 12, "temperature": 0}
        answers = [
            httpx.post(f"{each.url}/v1/completions", json=asked, timeout=60) for each in (site.engine, *both * 5)
        ]
        assert len({answer.json()["choices"][0]["text"] for answer in answers}) == 1
        for one, hint in given:
            assert one.ended(hint)["outcome"] == "warm", one.look(hint)


BENCH = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
def test_vllms_own_benchmark_has_no_failures(site: Site, tiny_model: Path, tmp_path: Path, backend: str) -> None:
    path = "/v1/completions" if backend == "openai" else "/v1/chat/completions"
    command = [VLLM_PYTHON, "-c", BENCH, "--backend", backend, "--base-url", site.gateway.url, "--endpoint", path]
    command += ["--model", "tiny", "--tokenizer", str(tiny_model), "--dataset-name", "random"]
    command += [
        "--random-input-len",
        "200",
        "--random-output-len",
        "16",
        "--num-prompts",
        "24",
        "--max-concurrency",
        "6",
    ]
    command += ["--save-result", "--result-dir", str(tmp_path), "--result-filename", "result.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-2_000:] + done.stderr[-2_000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result.get("failed", 0)) == (24, 0)
