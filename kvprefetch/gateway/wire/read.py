"""Requests and answers, read as far as the gateway needs it.

What is odd is passed over: the engine is the one to complain. A request without a prompt that can be prepared (a
batch, or messages that are no list) has an empty opening and no turns.
"""

from typing import Any

import msgspec

from kvprefetch.errors import InvalidRequest
from kvprefetch.gateway.contract import Answered, Asked, Dialect, Json
from kvprefetch.gateway.wire import chat, completions, messages, responses
from kvprefetch.gateway.wire.conversation import CONVERSATIONS, parted
from kvprefetch.gateway.wire.events import events
from kvprefetch.gateway.wire.fields import an_object, text

_LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
_READERS = {
    Dialect.CHAT: (chat.whole, chat.assembled),
    Dialect.COMPLETIONS: (completions.whole, completions.assembled),
    Dialect.RESPONSES: (responses.whole, responses.assembled),
    Dialect.MESSAGES: (messages.whole, messages.assembled),
}
_BY_PATH = {dialect.value: dialect for dialect in Dialect}
_UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


def dialect_of(path: str) -> Dialect | None:
    """The dialect that is spoken at `path`, with or without a query."""
    return _BY_PATH.get(path.partition("?")[0])


def read_request(dialect: Dialect, body: bytes) -> Asked:
    """Read a POST to the dialect's path. Raises InvalidRequest where it is no JSON object."""
    try:
        said = msgspec.json.decode(body)
        if not isinstance(said, dict):
            raise InvalidRequest("the body must be a JSON object")
        opening, turns, is_text = _prompt(dialect, said)
    except _UNREADABLE:
        raise InvalidRequest("the body is no JSON that can be read") from None
    return Asked(
        dialect,
        said,
        text(said.get("model")),
        opening,
        turns,
        stream=said.get("stream") is True,
        prewarm=_is_prewarm(said),
        salt=text(said.get("cache_salt")),
        previous=text(said.get("previous_response_id")) or _conversation(said.get("conversation")),
        is_text=is_text,
    )


def read_answer(asked: Asked, status: int, content_type: str, raw: bytes) -> Answered:
    """Read an answer, whole or a stream of events, that may be cut off. Never raises."""
    whole, assembled = _READERS[asked.dialect]
    if not 200 <= status < 300:
        return Answered()
    try:
        is_stream = "event-stream" in content_type.lower()
        answer = assembled(events(raw)) if is_stream else an_object(msgspec.json.decode(raw))
        return whole(answer, asked.body)
    except _UNREADABLE:
        return Answered()


def _prompt(dialect: Dialect, body: Json) -> tuple[bytes, tuple[bytes, ...], bool]:
    if dialect is Dialect.COMPLETIONS:
        prompt = completions.prompt(body)
        return (completions.opening(body), (completions.turn(prompt),), True) if prompt else (b"", (), True)
    form = CONVERSATIONS[dialect]
    said = form.items(body)
    if not said:
        return b"", (), True
    leading, rest = parted(form, said)
    opening = b"".join((form.opening(body), *form.turns(leading)))
    return opening, form.turns(rest), all(map(form.is_text, said))


def _is_prewarm(body: Json) -> bool:
    asked_for = [body.get(name) for name in _LIMITS]
    if any(type(limit) is int and limit == 0 for limit in asked_for):  # False is not 0 here
        return True
    return an_object(body.get("prompt_cache_options")).get("prewarm") is True


def _conversation(value: Any) -> str:
    return text(value) or text(an_object(value).get("id"))
