"""Requests and answers, read as far as the gateway needs it.

What is odd is passed over: the engine is the one to complain. A request without a prompt that can be prepared (a
batch, or messages that are no list) has an empty opening and no turns.
"""

import json
from typing import Any

import msgspec

from kvprefetch.errors import InvalidRequest
from kvprefetch.gateway.contract import Answered, Asked, Dialect, Json
from kvprefetch.gateway.wire import chat, completions, messages, responses
from kvprefetch.gateway.wire.conversation import CONVERSATIONS, parted
from kvprefetch.gateway.wire.events import events
from kvprefetch.gateway.wire.fields import an_object, is_said, text

_LIMITS = {  # the first that is said counts
    Dialect.CHAT: ("max_completion_tokens", "max_tokens"),
    Dialect.COMPLETIONS: ("max_tokens",),
    Dialect.RESPONSES: ("max_output_tokens",),
    Dialect.MESSAGES: ("max_tokens",),
}
_SCORING = {  # fields that ask for an answer about the prompt itself
    Dialect.CHAT: ("echo", "prompt_logprobs"),
    Dialect.COMPLETIONS: ("echo", "logprobs", "prompt_logprobs"),
}
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
        prewarm=_is_prewarm(dialect, said),
        salt=text(said.get("cache_salt")),
        previous=_previous(said),
        is_text=is_text,
    )


def read_loosely(dialect: Dialect, body: bytes) -> Asked:
    """Read, of what strict JSON is not, as much as its way needs; engines are as loose (NaN, lone surrogates).

    It counts as a request without a prompt. Raises InvalidRequest where Python's own parser refuses it too.
    """
    try:
        said = json.loads(body.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        raise InvalidRequest("the body is no JSON that can be read") from None
    if not isinstance(said, dict):
        raise InvalidRequest("the body must be a JSON object")
    stream, salt = said.get("stream") is True, text(said.get("cache_salt")).encode(errors="backslashreplace").decode()
    return Asked(dialect, {}, text(said.get("model")), b"", (), stream, salt=salt, previous=_previous(said))


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


def _is_prewarm(dialect: Dialect, body: Json) -> bool:
    if any(is_said(body.get(name)) and body[name] is not False for name in _SCORING.get(dialect, ())):
        return False
    limit = next((body[name] for name in _LIMITS[dialect] if body.get(name) is not None), None)
    if type(limit) is int and limit == 0:  # False is not 0 here
        return True
    return an_object(body.get("prompt_cache_options")).get("prewarm") is True


def _previous(body: Json) -> str:
    conversation: Any = body.get("conversation")
    return text(body.get("previous_response_id")) or text(conversation) or text(an_object(conversation).get("id"))
