"""The dialects whose prompt is a list of messages or items, each a module that keeps this protocol."""

from typing import Protocol

from kvprefetch.gateway.contract import Dialect, Json
from kvprefetch.gateway.wire import chat, messages, responses


class Conversation(Protocol):
    """`items` are what `body[KEY]` holds; FIELDS and ENDING name what else shapes the prompt."""

    KEY: str
    FIELDS: tuple[str, ...]
    ENDING: tuple[str, ...]

    def opening(self, body: Json) -> bytes: ...
    def items(self, body: Json) -> list[Json]: ...
    def turns(self, said: list[Json], /) -> tuple[bytes, ...]: ...
    def is_leading(self, item: Json, /) -> bool: ...
    def is_answer(self, item: Json, /) -> bool: ...
    def is_text(self, item: Json, /) -> bool: ...


CONVERSATIONS: dict[Dialect, Conversation] = {
    Dialect.CHAT: chat,
    Dialect.RESPONSES: responses,
    Dialect.MESSAGES: messages,
}


def parted(form: Conversation, said: list[Json]) -> tuple[list[Json], list[Json]]:
    """The items that belong to the opening, and the rest."""
    leading = 0
    while leading < len(said) and form.is_leading(said[leading]):
        leading += 1
    return said[:leading], said[leading:]
