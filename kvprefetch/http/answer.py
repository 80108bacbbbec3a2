"""How an answer is written: whole, or as a stream of server-sent events with one chunk for each token.

The end of a stream comes in the last token's chunk where both are known at once. `usage` counts the tokens that
were found ready, in whatever tier, as cached.
"""

import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kvprefetch.errors import KVPrefetchError
from kvprefetch.http.follow import Follower
from kvprefetch.http.problems import body_of

Json = dict[str, Any]
Batch = tuple[list[str], bool]
DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Form:
    """What tells one endpoint's answers from another's."""

    prefix: str  # of an answer's id
    whole: str  # the object's kind
    part: str
    choice: Callable[[str], Json]  # of the whole text
    delta: Callable[[str, bool], Json]  # of a piece, and whether it is the first


@dataclass(frozen=True)
class Usage:
    """Tokens of a request, `cached` of the prompt's found ready."""

    prompt: int
    completion: int
    cached: int

    def json(self) -> Json:
        """As OpenAI writes it."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


@dataclass
class Writer:
    """Writes one answer. `extra` fields go beside OpenAI's, in what carries the usage."""

    form: Form
    model: str
    include_usage: bool = False
    extra: Json = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._id, self._created = self.form.prefix + uuid.uuid4().hex, int(time.time())
        self._is_first = True

    def whole(self, text: str, reason: str, usage: Usage) -> Json:
        """The answer in one piece."""
        choice = {"index": 0, **self.form.choice(text), "finish_reason": reason}
        return {**self._head(self.form.whole), "choices": [choice], "usage": usage.json(), **self.extra}

    def chunks(self, pieces: Sequence[str], reason: str | None) -> bytes:
        """Events for `pieces`, the last one with the `reason` that the answer ended."""
        rest = list(pieces) if pieces or reason is None else [""]
        return b"".join(
            self._chunk(piece, reason if at == len(rest) else None) for at, piece in enumerate(rest, start=1)
        )

    def last(self, usage: Usage) -> bytes:
        """What follows the last chunk."""
        if not self.include_usage:
            return DONE
        return event({**self._head(self.form.part), "choices": [], "usage": usage.json(), **self.extra}) + DONE

    def _chunk(self, piece: str, reason: str | None) -> bytes:
        choice = {"index": 0, **self.form.delta(piece, self._is_first), "finish_reason": reason}
        self._is_first = False
        usage = {"usage": None} if self.include_usage else {}
        return event({**self._head(self.form.part), "choices": [choice], **usage})

    def _head(self, kind: str) -> Json:
        return {"id": self._id, "object": kind, "created": self._created, "model": self.model}


def event(value: Json) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


async def streamed(
    writer: Writer, first: Batch, follower: Follower, reason: Callable[[], str], usage: Callable[[], Usage]
) -> AsyncIterator[bytes]:
    """The events of an answer whose `first` batch is there; an error on the way is an event as well."""
    pieces, ended = first
    try:
        while not ended:
            yield writer.chunks(pieces, None)
            pieces, ended = await follower.batch()
    except KVPrefetchError as error:
        yield event(body_of(error)) + DONE
        return
    yield writer.chunks(pieces, reason()) + writer.last(usage())


class EventStream(Response):
    """A streaming response that leaves it to others to see the client go."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events as they come."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for chunk in self._events:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
