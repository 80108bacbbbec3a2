"""Gateways as processes, and answers told apart from what differs between any two of the same."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from processes import Process, until

Json = dict[str, Any]
ALWAYS_OTHERS = frozenset(  # what two answers to the same question differ in
    ("id", "item_id", "response_id", "created", "created_at", "completed_at", "obfuscation", "request_id")
)
OF_THE_CACHE = frozenset(  # and what they differ in where one of them found more in the cache
    (
        *("prompt_tokens_details", "input_tokens_details", "cached_tokens", "created_cache_tokens"),
        *("cache_read_input_tokens", "cache_creation_input_tokens", "input_tokens"),
    )
)


@dataclass(frozen=True)
class Gateway:
    """A running one."""

    url: str
    process: Process
    http: httpx.Client

    @property
    def v1(self) -> str:
        """What a client is given as its base URL."""
        return f"{self.url}/v1"

    def stats(self, token: str = "") -> Json:
        return self.asked("GET", "stats", token=token).json()

    def asked(self, method: str, path: str, body: Json | None = None, token: str = "") -> httpx.Response:
        """Of its own API."""
        return self.http.request(method, f"/kvprefetch/v1/{path}", json=body, headers=bearer(token))

    def hint(self, body: Json, token: str = "") -> Json:
        """Give a hint, and wait for what becomes of it."""
        answer = self.asked("POST", "prefetch", {"wait_s": 60, **body}, token)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def signal(self, body: Json, token: str = "") -> list[str]:
        """The hints that it makes."""
        answer = self.asked("POST", "signal", body, token)
        assert answer.status_code == 202, answer.text
        return answer.json()["hints"]

    def look(self, hint: str, token: str = "") -> Json:
        answer = self.asked("GET", f"prefetch/{hint}", token=token)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def ended(self, hint: str, token: str = "") -> Json:
        """The hint, once it has an outcome."""
        until(lambda: self.look(hint, token)["outcome"] is not None, f"hint {hint} has no outcome")
        return self.look(hint, token)

    def knows(self, kind: str, at: int = 0) -> None:
        """Wait until it knows what its engine is."""
        until(lambda: self.metric("upstream_up", at) == 1 and self.engine(at) == kind, f"the engine is no {kind}")

    def engine(self, at: int = 0, token: str = "") -> str | None:
        return self.stats(token)["upstreams"][at]["engine"]

    def metric(self, name: str, at: int = 0) -> float:
        """Of the upstream at that place."""
        pattern = rf"^kvprefetch_gateway_{name}{{upstream=[^}}]*}} (\S+)$"
        return float(re.findall(pattern, self.http.get("/metrics").text, re.MULTILINE)[at])


@contextmanager
def gateway(*urls: str, settings: str = "", service: str = "") -> Iterator[Gateway]:
    """`kvprefetch gateway` before these engines. Ends when left, and must end in order."""
    arguments = [word for url in urls for word in ("--upstream", url)]
    arguments += ["--settings", settings] if settings else []
    arguments += ["--service", service] if service else []
    with Process("gateway", *arguments, "--port", "0") as process:
        found = re.search(r"http://[\w.:]+", process.says("gateway at"))
        assert found is not None
        with httpx.Client(base_url=found[0], timeout=120) as client:
            yield Gateway(found[0], process, client)
        assert process.stop() == 0
    broken = [line for line in process.lines if "Traceback" in line or "exception" in line.lower()]
    assert not broken, "\n".join(process.lines)


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"} if token else {}


def said(answer: httpx.Response, but: frozenset[str] = ALWAYS_OTHERS | OF_THE_CACHE) -> Any:
    """Status, kind and words of an answer, without what any two of the same differ in. A stream is put together."""
    kind = answer.headers.get("content-type", "").partition(";")[0]
    if kind == "text/event-stream":
        return answer.status_code, kind, together(events(answer.text), but)
    try:
        body = without(answer.json(), but)
    except ValueError:
        body = answer.text
    return answer.status_code, kind, body


def events(text: str) -> list[Any]:
    """The data of each event; what is no JSON as it is."""
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) if line.startswith("{") else line for line in lines]


def together(stream: list[Any], but: frozenset[str]) -> list[Any]:
    """A stream of chunks, as one long chunk for each choice: where one ends and the next begins is the network's."""
    parts: dict[Any, Any] = {}
    for chunk in stream:
        if not isinstance(chunk, Mapping):
            parts[chunk] = True
            continue
        for choice in chunk.get("choices") or [chunk]:
            _join(parts.setdefault((choice.get("index"), str(choice.get("type", ""))), {}), without(choice, but))
        if chunk.get("usage"):
            parts["usage"] = without(chunk["usage"], but)
    return sorted(parts.items(), key=str)


def _join(whole: Json, part: Json) -> None:
    """Strings grow; lists are joined by their items' indexes; anything else is the last that was said."""
    for name, value in part.items():
        if isinstance(value, str) and name not in ("role", "finish_reason", "type", "object", "model"):
            whole[name] = (whole.get(name) or "") + value
        elif isinstance(value, Mapping):
            whole[name] = whole.get(name) or {}
            _join(whole[name], dict(value))
        elif isinstance(value, list) and name == "tool_calls":
            calls = whole.setdefault(name, {})
            for call in value:
                _join(calls.setdefault(call.get("index"), {}), call)
        elif value is not None:
            whole[name] = value


def without(value: Any, names: frozenset[str]) -> Any:
    """JSON without the fields of these names, at any depth."""
    if isinstance(value, dict):
        return {name: without(each, names) for name, each in value.items() if name not in names}
    if isinstance(value, list):
        return [without(each, names) for each in value]
    return value


def same(ask: Callable[[str], httpx.Response], one: str, other: str) -> None:
    """The two servers answer the same."""
    here, there = said(ask(one)), said(ask(other))
    assert here == there
