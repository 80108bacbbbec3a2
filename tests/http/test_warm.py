"""`max_tokens: 0` warms the exact prompt, and says what came of it."""

from typing import Any

import pytest
from served import ASKED, HANDBOOK, MODEL, QUESTION, Open, events, served

from kvprefetch.http import endpoint
from kvprefetch.http.warm import outcome_of
from kvprefetch.settings import SpeculationSettings

WARM = {"model": MODEL, "messages": [HANDBOOK, QUESTION], "max_tokens": 0}


def test_a_warmed_prompt_is_found_by_the_request_for_it(open_tiny: Open) -> None:
    with served(open_tiny()) as site:
        warm = site.post("chat/completions", **WARM).json()
        asked = site.post("chat/completions", **ASKED).json()
    prompt, cached = asked["usage"]["prompt_tokens"], asked["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert warm["kvprefetch"] == {"outcome": "warm", "tokens": prompt // 16 * 16, "reason": ""}
    assert warm["usage"]["prompt_tokens_details"]["cached_tokens"] == prompt // 16 * 16 == cached
    assert (warm["usage"]["prompt_tokens"], warm["usage"]["completion_tokens"]) == (prompt, 0)
    assert warm["choices"][0]["message"]["content"] == ""
    assert warm["choices"][0]["finish_reason"] == "length"


def test_tokens_are_warmed_as_well_and_twice_is_not_more(open_tiny: Open) -> None:
    with served(open_tiny()) as site:
        ask: dict[str, Any] = {"model": MODEL, "prompt": [5 + i % 300 for i in range(100)]}
        said = [site.post("completions", **ask, max_tokens=0).json()["kvprefetch"]["outcome"] for _ in range(2)]
        asked = site.post("completions", **ask, max_tokens=1).json()
        stats = site.kv.stats()
    assert said == ["warm", "already_warm"]
    assert asked["usage"]["prompt_tokens_details"]["cached_tokens"] == 96
    assert stats["prefetch"]["uses"]["USED"] == 2


def test_the_openai_client_can_warm_and_stream_nothing(open_tiny: Open) -> None:
    with served(open_tiny()) as site:
        answer = site.ai.completions.create(model=MODEL, prompt=[5] * 40, max_tokens=0)
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 0
        options = {"stream": True, "stream_options": {"include_usage": True}}
        part, last = events(site.post("chat/completions", **WARM, **options))
    assert part["choices"][0]["finish_reason"] == "length"
    assert last["usage"]["completion_tokens"] == 0
    assert last["kvprefetch"]["outcome"] == "warm"


def test_where_it_is_not_warmed_it_says_why(open_tiny: Open) -> None:
    with served(open_tiny(), speculation=SpeculationSettings(enabled=False)) as site:
        said = site.post("chat/completions", **WARM).json()
    assert said["kvprefetch"] == {"outcome": "rejected", "tokens": 0, "reason": "speculation is switched off"}
    assert said["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_what_cannot_be_warmed_is_refused(open_tiny: Open) -> None:
    with served(open_tiny()) as site:
        assert site.post("completions", model=MODEL, prompt=[10**6], max_tokens=0).status_code == 400
        assert site.post("completions", model=MODEL, prompt=[5] * 4_000, max_tokens=0).status_code == 400


def test_on_a_busy_worker_the_answer_does_not_wait_for_ever(open_tiny: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "outcome_of", lambda hint: outcome_of(hint, 0.05))
    with served(open_tiny()) as site, site.kv.worker.announce():  # speculation makes way for what is announced
        said = site.post("chat/completions", **WARM).json()["kvprefetch"]
    assert said["outcome"] == "pending"
    assert said["reason"]
