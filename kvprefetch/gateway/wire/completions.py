"""/v1/completions: its prompt, which is one turn of text or token ids, and its answers.

Text is its UTF-8, ids are 4 bytes each: a longer prompt's bytes begin with a shorter one's, as the prompt does.
A batch of prompts is not read.
"""

import struct
from collections.abc import Iterable
from typing import Any, TypeGuard

from kvprefetch.gateway.contract import Answered, Dialect, Json
from kvprefetch.gateway.wire import canonical
from kvprefetch.gateway.wire.answers import answered, first_choice, kind_of
from kvprefetch.gateway.wire.fields import text

KEY = "prompt"
# Beside the prompt, what shapes it; the rest is sampling or bookkeeping.
FIELDS = (
    *("model", "lora", "lora_path", "suffix"),
    *("add_special_tokens", "truncate_prompt_tokens", "truncation_side"),
)
Prompt = str | list[int]


def opening(body: Json) -> bytes:
    """Canonical: all but the prompt, and whether that is text. `body` has one."""
    kind = b"text\n" if isinstance(unwrapped(body), str) else b"ids\n"
    return canonical.opening(Dialect.COMPLETIONS, body, FIELDS) + kind


def prompt(body: Json) -> Prompt:
    """The one prompt; "" where there is none, or several."""
    said = unwrapped(body)
    if body.get("prompt_embeds"):
        return ""
    return said if isinstance(said, str) or _are_ids(said) else ""


def unwrapped(body: Json) -> Any:
    """What is sent as the prompt, out of the list of one that it may be in: `prompt`, of a body that has one."""
    said = body.get(KEY)
    return said[0] if isinstance(said, list) and len(said) == 1 and isinstance(said[0], str | list) else said


def turn(said: Prompt) -> bytes:
    """Canonical: the prompt, or what follows it."""
    return said.encode() if isinstance(said, str) else struct.pack(f"<{len(said)}I", *said)


def whole(answer: Json, body: Json) -> Answered:
    """Read an answer to the request `body`: its message is what follows the prompt, in the prompt's own form."""
    choice, before = first_choice(answer), prompt(body)
    kind, after = kind_of(text(choice.get("finish_reason"))), text(choice.get("text"))
    if isinstance(before, list):
        ids = choice.get("token_ids")
        return answered(answer, kind, turn(ids), ids) if _are_ids(ids) else answered(answer, kind)
    if body.get("echo") is True:
        after = after[len(before) :] if after.startswith(before) else ""
    return answered(answer, kind, turn(after), after)


def assembled(events: Iterable[Json]) -> Json:
    """The whole answer that the chunks of a stream make."""
    answer: Json = {}
    finish, pieces = "", [""]
    ids: list[object] = []
    for chunk in events:
        answer |= {name: chunk[name] for name in ("id", "usage", "timings") if chunk.get(name)}
        choice = first_choice(chunk)
        finish = text(choice.get("finish_reason")) or finish
        pieces.append(text(choice.get("text")))
        more = choice.get("token_ids")
        ids += more if isinstance(more, list) else []
    return {**answer, "choices": [{"index": 0, "text": "".join(pieces), "token_ids": ids, "finish_reason": finish}]}


def _are_ids(value: object) -> TypeGuard[list[int]]:
    if not isinstance(value, list) or set(map(type, value)) != {int}:  # in C: there may be a million of them
        return False
    return bool(min(value) >= 0 and max(value) < 2**32)
