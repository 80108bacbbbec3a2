"""A client that goes away takes its request with it, whole, streamed or warming, and holds nothing afterwards."""

import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from served import MODEL, Open, Served, each_step, served, until

from kvprefetch.worker.request import Generation

ENDLESS = {"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 900, "ignore_eos": True}
Made = list[Generation]


@contextmanager
def watched(site: Served) -> Iterator[Made]:
    """The answers that the worker makes meanwhile."""
    core, made = site.kv.core, Made()
    submit = core.submit

    def note(request: Any, session: str) -> None:
        made.append(request.stream)
        submit(request, session)

    core.submit = note  # type: ignore[method-assign]
    try:
        yield made
    finally:
        core.submit = submit  # type: ignore[method-assign]


def has_ended(made: Made) -> bool:
    return bool(made) and all(answer.finish_reason is not None for answer in made)


def slow(site: Served) -> None:
    """Hold the worker up at each step, so that an answer takes many seconds."""
    each_step(site.kv, lambda: time.sleep(0.02))


def test_a_stream_that_nobody_reads_any_more_is_cancelled(open_tiny: Open) -> None:
    with served(open_tiny()) as site, watched(site) as made:
        slow(site)
        with site.http.stream("POST", "/completions", json={**ENDLESS, "stream": True}) as response:
            next(response.iter_lines())
        until(lambda: has_ended(made), "the answer ends")
        (answer,) = made
        assert answer.finish_reason is not None
        assert answer.finish_reason.value == "cancelled"
        assert len(answer.tokens) < 200
        until(lambda: not site.kv.worker.live, "nothing is live")


def test_a_whole_answer_that_nobody_waits_for_is_cancelled(open_tiny: Open) -> None:
    with served(open_tiny()) as site, watched(site) as made:
        slow(site)
        with pytest.raises(httpx.ReadTimeout):
            site.http.post("/completions", json=ENDLESS, timeout=0.3)
        until(lambda: has_ended(made), "the answer ends")
        assert len(made[0].tokens) < 200


def test_a_connection_that_is_reset_is_a_client_that_has_gone(open_tiny: Open) -> None:
    with served(open_tiny()) as site, watched(site) as made:
        slow(site)
        body = httpx.Request("POST", site.url, json={**ENDLESS, "stream": True}).read()
        url = httpx.URL(site.url)
        raw = socket.create_connection((url.host, url.port))
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        raw.sendall(head.encode() + b"\r\n\r\n" + body)
        raw.recv(100)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raw.close()
        until(lambda: has_ended(made), "the answer ends")
        assert len(made[0].tokens) < 200


def test_a_client_that_goes_before_its_body_is_there_leaves_nothing(open_tiny: Open) -> None:
    with served(open_tiny()) as site:
        url = httpx.URL(site.url)
        raw = socket.create_connection((url.host, url.port))
        raw.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
        )
        raw.close()
        assert site.post("completions", **{**ENDLESS, "max_tokens": 2}).status_code == 200
        assert site.kv.stats()["lookups"]["count"] == 1


def test_who_waits_for_a_warm_prompt_and_goes_withdraws_it(open_tiny: Open) -> None:
    with served(open_tiny()) as site:
        with site.kv.worker.announce(), pytest.raises(httpx.ReadTimeout):
            site.http.post("/completions", json={**ENDLESS, "prompt": [5] * 64, "max_tokens": 0}, timeout=0.3)
        until(lambda: site.kv.stats()["prefetch"]["outcomes"]["CANCELLED"] == 1, "the hint is withdrawn")
