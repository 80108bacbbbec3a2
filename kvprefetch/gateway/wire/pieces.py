"""A draft cut shorter, and requests for one token: what warms an engine that shows no tokenizer, piece by piece."""

from bisect import bisect_left
from itertools import accumulate
from typing import Any

import msgspec

from kvprefetch.gateway.contract import Dialect, Draft, Json
from kvprefetch.gateway.wire import completions
from kvprefetch.gateway.wire.conversation import CONVERSATIONS, parted
from kvprefetch.gateway.wire.fields import an_object, is_said, objects, text

_CHARS_PER_ID = 4  # a token id counts as so many characters
_BESIDE = ("tools", "functions", "documents")
_PLAIN = frozenset({"role", "content"})
_SHORTEST = {"role": "user", "content": "."}  # engines refuse a conversation without a message


class Cuts:
    """A draft's text, measured once, so that it can be cut at many places: each costs little, however long it is."""

    def __init__(self, draft: Draft) -> None:
        self._draft = draft
        self._prompt: completions.Prompt = ""
        self._leading: list[Json] = []
        self._rest: list[Json] = []
        if draft.dialect is Dialect.COMPLETIONS:
            self._key, self._prompt = completions.KEY, completions.prompt(draft.body)
            self.length = _prompt_length(self._prompt)
            return
        form = CONVERSATIONS[draft.dialect]
        self._key = form.KEY
        self._leading, self._rest = parted(form, form.items(draft.body))
        self._before = _beside(draft.body) + sum(map(_item_length, self._leading))
        self._ends = list(accumulate(map(_item_length, self._rest)))  # where each of the rest ends, behind those
        self.length = self._before + (self._ends[-1] if self._ends else 0)

    def cut(self, chars: int) -> tuple[Json, int]:
        """The draft's body with its text cut after about `chars` characters, at least one; and how many it has then.

        What is rendered of it begins as the whole does, up to what the template writes at a message's end. Tools and
        system prompt stay whole, and so do messages that hold a call; there is one turn in any case.
        """
        if self._draft.dialect is Dialect.COMPLETIONS:
            prompt = self._prompt[: max(1, chars if isinstance(self._prompt, str) else chars // _CHARS_PER_ID)]
            return {**self._draft.body, self._key: prompt}, _prompt_length(prompt)
        whole, last = self._parted(max(chars - self._before, 1))
        kept = [*self._rest[:whole], *last] or [_SHORTEST]
        length = (self._ends[whole - 1] if whole else 0) + sum(map(_item_length, kept[whole:]))
        return {**self._draft.body, self._key: [*self._leading, *kept]}, self._before + length

    def _parted(self, room: int) -> tuple[int, list[Json]]:
        """How many items have room as they are, and the next one, shortened; the first in any case."""
        whole = bisect_left(self._ends, room)
        if whole == len(self._ends):
            return whole, []
        if self._ends[whole] == room:
            return whole + 1, []
        shorter = _shortened(self._rest[whole], room - (self._ends[whole - 1] if whole else 0))
        if shorter is None:
            return (whole, []) if whole else (1, [])
        return whole, [shorter]


def text_length(draft: Draft) -> int:
    """Characters of the prompt's text, about."""
    return Cuts(draft).length


def truncated(draft: Draft, chars: int) -> Json:
    """The draft's body, cut once: see `Cuts.cut`."""
    return Cuts(draft).cut(chars)[0]


def one_token(body: Json, dialect: Dialect) -> Json:
    """A body that has the engine compute this prompt and one token more."""
    if dialect is Dialect.RESPONSES:  # OpenAI's own least is 16; engines take 1
        return {**body, "max_output_tokens": 1, "temperature": 0, "stream": False, "store": False}
    if dialect is Dialect.MESSAGES and an_object(body.get("thinking")).get("type") == "enabled":
        body = {**body, "thinking": {"type": "adaptive"}}  # the same prompt; a budget must be less than max_tokens
    return {**body, "max_tokens": 1, "temperature": 0, "stream": False}


def _shortened(item: Json, room: int) -> Json | None:
    """An item of more than `room` characters, cut to them; None if it cannot be cut."""
    if _has_call(item):
        return None
    key = "output" if "output" in item else "content"
    return {**item, key: _cut(item.get(key), room)}


def _cut(content: Any, room: int) -> Any:
    """Content of more than `room` characters, cut to them."""
    if isinstance(content, str):
        return content[:room]
    kept: list[Any] = []
    for part in content if isinstance(content, list) else ():
        length = _content_length([part])
        if room <= 0:
            break
        kept.append(part if length <= room else _cut_part(part, room))
        room -= length
    return kept


def _cut_part(part: Any, room: int) -> Any:
    if isinstance(part, str):
        return part[:room]
    key = "content" if part.get("type") == "tool_result" else "text"
    return {**part, key: _cut(part[key], room)}


def _has_call(item: Json) -> bool:
    if is_said(item.get("tool_calls")) or is_said(item.get("function_call")) or "arguments" in item:
        return True
    return any(part.get("type") == "tool_use" for part in objects(item.get("content")))


def _beside(body: Json) -> int:
    """Characters of what stands before the messages, in fields of its own."""
    defined = [body[name] for name in _BESIDE if is_said(body.get(name))]
    head = _content_length(body.get("system")) + _content_length(body.get("instructions"))
    return head + sum(len(msgspec.json.encode(each)) for each in defined)


def _prompt_length(prompt: completions.Prompt) -> int:
    return len(prompt) * (1 if isinstance(prompt, str) else _CHARS_PER_ID)


def _item_length(item: Json) -> int:
    said = item.get("content")
    if isinstance(said, str) and item.keys() <= _PLAIN:
        return len(said)
    calls = [call.get("function") for call in objects(item.get("tool_calls"))]
    beside = sum(_call_length(an_object(call)) for call in (*calls, item.get("function_call"), item))
    return beside + _content_length(item.get("content")) + _content_length(item.get("output"))


def _call_length(call: Json) -> int:
    return len(text(call.get("name"))) + len(text(call.get("arguments")))


def _content_length(content: Any) -> int:
    if isinstance(content, str):
        return len(content)
    return sum(map(_part_length, content)) if isinstance(content, list) else 0


def _part_length(part: Any) -> int:
    """Images and the like count as nothing: they stay with the text before them."""
    if isinstance(part, str):
        return len(part)
    said = an_object(part)
    if said.get("type") == "tool_result":
        return _content_length(said.get("content"))
    if said.get("type") == "tool_use":
        return len(text(said.get("name"))) + len(msgspec.json.encode(said.get("input")))
    return len(text(said.get("text")))
