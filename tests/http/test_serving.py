"""A worker's process: SIGTERM lets what is in flight finish, and what cannot be had is said in a line."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from served import MODEL

from kvprefetch.errors import SettingsError
from kvprefetch.http.serving import listen

PROGRAM = """
import sys, time
from dataclasses import replace
from tiny_models import tiny_llama, tiny_settings, tiny_tokenizer
from kvprefetch.engines.engine import open_engine
from kvprefetch.engines.load import prepare
from kvprefetch.http.app import make_app
from kvprefetch.http.serving import serve
from kvprefetch.inprocess import Local
from kvprefetch.settings import HttpSettings

model = prepare(tiny_llama(), tiny_tokenizer(), "tiny-llama")
settings = replace(tiny_settings(model), http=HttpSettings(port=0))
with Local(open_engine(model, settings), settings) as local:
    step = local.worker.live.step
    local.worker.live.step = lambda *a: (time.sleep(0.01), step(*a))
    serve(make_app(local, settings), settings.http, ready=lambda url: print(url, flush=True), drain_s=30)
local.check()
print("closed", flush=True)
"""


def test_sigterm_lets_what_is_in_flight_finish_and_nobody_new_in() -> None:
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(tests)}
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            body = {"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 100, "ignore_eos": True, "stream": True}
            with httpx.stream("POST", f"{url}/completions", json=body, timeout=30) as response:
                lines = response.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)
                refused_at = _refused(url)
                rest = list(lines)
            assert rest[-2:] == ["data: [DONE]", ""]
            assert sum("text" in line for line in rest) >= 90
            assert refused_at < 5
            assert process.wait(30) == 0
            assert process.stdout.read().strip() == "closed"
        finally:
            process.kill()


def _refused(url: str) -> float:
    """Seconds until new connections are refused."""
    began = time.monotonic()
    while True:
        try:
            httpx.get(f"{url}/models", timeout=5)
        except (httpx.ConnectError, httpx.ReadError):  # the latter where it was in the queue already
            return time.monotonic() - began
        time.sleep(0.01)


def test_a_port_that_is_taken_says_what_to_do() -> None:
    with listen("127.0.0.1", 0) as taken, pytest.raises(SettingsError, match="choose another"):
        listen("127.0.0.1", taken.getsockname()[1])


def test_a_host_that_is_not_ours_says_what_to_do() -> None:
    with pytest.raises(SettingsError, match=r"203\.0\.113\.1"):
        listen("203.0.113.1", 0)
    with pytest.raises(SettingsError, match="no-such-host"):
        listen("no-such-host.invalid", 0)


def test_port_0_takes_any() -> None:
    with listen("127.0.0.1", 0) as one, listen("127.0.0.1", 0) as other:
        assert isinstance(one, socket.socket)
        assert one.getsockname() != other.getsockname()
