"""When the worker fails or is closed: a status where there is still one to give, else the stream's last event."""

import json
import time
from collections.abc import Callable
from itertools import count

import httpx
import openai
import pytest
from served import ASKED, MODEL, Open, each_step, events, served, until

ENDLESS = {"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 500, "ignore_eos": True}


def failing_at(number: int) -> Callable[[], None]:
    """Breaks the engine in one step, as torch would."""
    steps = count(1)

    def fail() -> None:
        if next(steps) == number:
            raise RuntimeError("out of memory")

    return fail


def test_an_engine_that_fails_before_the_first_token_is_a_500(open_tiny: Open) -> None:
    with served(open_tiny()) as site:
        each_step(site.kv, failing_at(1))
        response = site.post("completions", **ENDLESS, stream=True)
        assert response.status_code == 500
        assert response.json()["error"]["type"] == "server_error"
        assert site.post("chat/completions", **ASKED).status_code == 200


def test_an_engine_that_fails_on_the_way_ends_the_stream_with_an_error(open_tiny: Open) -> None:
    with served(open_tiny()) as site:
        each_step(site.kv, failing_at(20))
        *parts, last = events(site.post("completions", **ENDLESS, stream=True))
        assert 10 <= len(parts) <= 20
        assert last["error"]["type"] == "server_error"
        each_step(site.kv, failing_at(20))
        with pytest.raises(openai.APIError):
            list(site.ai.completions.create(model=MODEL, prompt=[5, 6], max_tokens=500, stream=True))
        each_step(site.kv, failing_at(20))
        assert site.post("completions", **ENDLESS).status_code == 500


def test_a_closed_worker_is_unavailable(open_tiny: Open) -> None:
    with served(open_tiny()) as site:
        site.kv.close()
        answers = [site.post("chat/completions", **ASKED), site.post("completions", **{**ENDLESS, "max_tokens": 0})]
        answers.append(site.http.get(site.url.removesuffix("/v1") + "/health"))
        assert [answer.status_code for answer in answers] == [503, 503, 503]
        assert all(answer.json()["error"]["code"] == "unavailable" for answer in answers)
        assert site.http.get(site.url.removesuffix("/v1") + "/metrics").status_code == 200


def test_closing_the_worker_ends_what_is_streamed_with_an_error(open_tiny: Open) -> None:
    with (
        served(open_tiny()) as site,
        site.http.stream("POST", "/completions", json={**ENDLESS, "stream": True}) as read,
    ):
        lines = read.iter_lines()
        next(lines)
        site.kv.close()
        said = [line.removeprefix("data: ") for line in lines if line]
    assert said[-1] == "[DONE]"
    assert json.loads(said[-2])["error"]["code"] == "unavailable"


def test_who_takes_longer_than_the_drain_is_cut_off(open_tiny: Open) -> None:
    with served(open_tiny(), drain_s=1) as site:
        each_step(site.kv, lambda: time.sleep(0.05))
        with site.http.stream("POST", "/completions", json={**ENDLESS, "stream": True}) as read:
            lines = read.iter_lines()
            next(lines)
            site.server.should_exit = True
            with pytest.raises(httpx.RemoteProtocolError):
                list(lines)
        until(lambda: not site.kv.worker.live, "nothing is live", seconds=5)
