"""What the dialects' answers have in common."""

from collections.abc import Sequence
from typing import Any

from kvprefetch.gateway.contract import Answered, Json
from kvprefetch.gateway.wire.fields import an_object, count, objects, text

_LONGEST_NAME = 64


def kind_of(finish: str, tools: Sequence[Any] = ()) -> str:
    """How an answer ended. A call that ran into the limit of tokens was not made."""
    if finish not in ("", "length", "content_filter") and tools:
        return f"tool {text(tools[0])[:_LONGEST_NAME]}"
    return finish[:_LONGEST_NAME]


def first_choice(answer: Json) -> Json:
    """Of several answers, the first."""
    return next((each for each in objects(answer.get("choices")) if each.get("index", 0) == 0), {})


def answered(answer: Json, kind: str, turn: bytes = b"", message: Any = None) -> Answered:
    """An answer with the usage of OpenAI's chat and completions, or the timings that llama.cpp sends."""
    usage, timings = an_object(answer.get("usage")), an_object(answer.get("timings"))
    prompt, output = count(usage.get("prompt_tokens")), count(usage.get("completion_tokens"))
    cached = count(an_object(usage.get("prompt_tokens_details")).get("cached_tokens"))
    found, computed = count(timings.get("cache_n")), count(timings.get("prompt_n"))
    if prompt is None and found is not None and computed is not None:
        prompt = found + computed
    return Answered(
        kind,
        turn if kind else b"",
        message if kind else None,
        prompt,
        found if cached is None else cached,
        count(timings.get("predicted_n")) if output is None else output,
        text(answer.get("id")),
    )
