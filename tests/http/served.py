"""The tiny model behind a real server on a port of its own, with clients that know nothing of us."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import httpx
import openai
import uvicorn

from kvprefetch.engines.engine import TransformersEngine
from kvprefetch.http.app import make_app
from kvprefetch.http.serving import listen, make_server, url_of
from kvprefetch.inprocess import Local
from kvprefetch.settings import Settings

Open = Callable[..., TransformersEngine]
MODEL = "tiny-llama"
HANDBOOK = {"role": "system", "content": "Please read the handbook first. " * 20}
QUESTION = {"role": "user", "content": "What does the policy say?"}
ASKED = {"model": MODEL, "messages": [HANDBOOK, QUESTION], "max_tokens": 8, "ignore_eos": True}


@dataclass
class Served:
    """A running server: `kv` is its worker, `http` and `ai` are clients."""

    url: str
    kv: Local
    http: httpx.Client
    ai: openai.OpenAI
    server: uvicorn.Server

    def post(self, path: str, **body: Any) -> httpx.Response:
        """POST a JSON body to /v1/`path`."""
        return self.http.post(f"/{path}", json=body)


@contextmanager
def served(engine: TransformersEngine, token: str = "unused", drain_s: float = 10, **changes: Any) -> Iterator[Served]:
    """Serve `engine`; the books must be right at the end. `changes` to the settings."""
    settings = replace(Settings(), **changes)
    with Local(engine, settings) as kv:
        server = make_server(make_app(kv, settings), drain_s)
        listener = listen("127.0.0.1", 0)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        url = url_of(listener)
        try:
            with (
                httpx.Client(base_url=url, timeout=60, headers={"authorization": f"Bearer {token}"}) as client,
                openai.OpenAI(base_url=url, api_key=token, max_retries=0, timeout=60) as ai,
            ):
                yield Served(url, kv, client, ai, server)
        finally:
            server.should_exit = True
            thread.join(30)
        assert not thread.is_alive(), "the server does not end"
        kv.check()


def events(response: httpx.Response) -> list[Any]:
    """The JSON of each event of a stream that has ended; the last must be [DONE]."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def each_step(kv: Local, first: Callable[[], None]) -> None:
    """Have the worker call `first` before each step of live requests."""
    live, step = kv.worker.live, kv.worker.live.step

    def later(*arguments: Any) -> None:
        first()
        step(*arguments)

    live.step = later  # type: ignore[method-assign]


def until(condition: Callable[[], bool], what: str, seconds: float = 30) -> None:
    """Wait for it."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.005)
