"""Which session a request belongs to, and what its next request will begin with.

A session that the caller names is that session. Else a request goes on with the session whose latest request, or
latest request and answer, it begins with; one that begins with none is a new session. Pure. Bounded: the sessions used
last are kept, `max_sessions` of them, and of their drafts `max_bytes`.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import count

import msgspec

from kvprefetch.cache.keys import BlockKey
from kvprefetch.contexts import qualified
from kvprefetch.gateway.contract import Asked, Dialect, Draft

_ID_WEIGHT = 10  # bytes in memory for each canonical one of a token id
_RUN = 512  # bytes of a text that are looked up together
_INFERRED = "~"  # begins the names of sessions that nobody has named


@dataclass(eq=False)
class Conversation:
    """A session, as far as it is remembered."""

    session: str  # qualified by its tenant
    tenant: str
    named: str = ""  # by the caller
    upstream: str = ""  # where its context is
    draft: Draft | None = field(default=None, repr=False)
    keys: Sequence[BlockKey] = field(default=(), repr=False)  # of the draft
    running: int = 0
    _text: tuple[int, bytes] = (0, b"")  # of a completion's prompt: its length and digest
    _tails: list[bytes] = field(default_factory=list, repr=False)
    _bytes: int = 0

    def begins(self, asked: Asked) -> bool:
        """Whether a completion's prompt begins with the latest one here, to the last byte; true of other dialects."""
        length, digest = self._text
        return asked.dialect is not Dialect.COMPLETIONS or sha256(asked.turns[0][:length]).digest() == digest


class Conversations:
    """See the module's promises."""

    def __init__(self, max_sessions: int, max_bytes: int) -> None:
        self.max_sessions, self.max_bytes = max_sessions, max_bytes
        self.known: OrderedDict[str, Conversation] = OrderedDict()
        self.bytes = 0
        self._by_tail: dict[bytes, Conversation] = {}
        self._numbers = count(1)

    def of(self, tenant: str, asked: Asked, named: str) -> Conversation:
        """The request's session, a new one perhaps."""
        if named:
            return self.of_named(tenant, named)
        chain = list(tails(tenant, asked))
        for at, tail in enumerate(reversed(chain)):
            found = self._by_tail.get(tail)
            # of two that ask the same at the same time, neither goes on with the other
            if found is not None and not (at == 0 and found.running) and found.begins(asked):
                return self._use(found)
        return self._use(self._new(tenant))

    def of_named(self, tenant: str, named: str) -> Conversation:
        """The session that its caller calls so, a new one perhaps."""
        session = qualified(tenant, named)
        return self._use(self.known.get(session) or Conversation(session, tenant, named))

    def find(self, session: str) -> Conversation | None:
        """By its qualified name; counts as no use."""
        return self.known.get(session)

    def remember(
        self, talk: Conversation, asked: Asked, answer: bytes, draft: Draft | None, keys: Sequence[BlockKey]
    ) -> None:
        """A request of it was answered: what the next one will begin with."""
        if self.known.get(talk.session) is not talk:
            return  # it was forgotten meanwhile
        self._forget_tails(talk)
        *_, alone = [b"", *tails(talk.tenant, asked)]
        if asked.dialect is Dialect.COMPLETIONS and alone:
            talk._tails, talk._text = [alone], (len(asked.turns[0]), sha256(asked.turns[0]).digest())
            self._by_tail[alone] = talk
        elif asked.turns and asked.dialect is not Dialect.COMPLETIONS:
            talk._tails = [alone, _next(alone, answer)] if answer else [alone]
            for tail in talk._tails:
                self._by_tail[tail] = talk
        size = _weight(draft) if draft else 0
        if size > self.max_bytes:
            draft, keys, size = None, (), 0
        talk.draft, talk.keys = draft, keys
        self.bytes += size - talk._bytes
        talk._bytes = size
        self._shrink()

    def end(self, session: str) -> None:
        """No request of it will come."""
        talk = self.known.pop(session, None)
        if talk is not None:
            self._forget(talk)

    # -- within ----------------------------------------------------------------------------------------
    def _new(self, tenant: str) -> Conversation:
        numbered = (qualified(tenant, f"{_INFERRED}{number}") for number in self._numbers)
        return Conversation(next(name for name in numbered if name not in self.known), tenant)  # callers name some so

    def _use(self, talk: Conversation) -> Conversation:
        self.known[talk.session] = talk
        self.known.move_to_end(talk.session)
        self._shrink()
        return talk

    def _shrink(self) -> None:
        while len(self.known) > max(self.max_sessions, 1) or (self.bytes > self.max_bytes and len(self.known) > 1):
            _, oldest = self.known.popitem(last=False)
            self._forget(oldest)

    def _forget(self, talk: Conversation) -> None:
        self._forget_tails(talk)
        self.bytes -= talk._bytes
        talk.draft, talk.keys, talk._bytes = None, (), 0

    def _forget_tails(self, talk: Conversation) -> None:
        for tail in talk._tails:
            if self._by_tail.get(tail) is talk:
                del self._by_tail[tail]
        talk._tails = []


def _weight(draft: Draft) -> int:
    """Bytes that it holds, nearly: its canonical ones twice, token ids as Python keeps them, images in full."""
    canonical = sum(map(len, draft.canonical))
    if not draft.is_text:
        return canonical + len(msgspec.json.encode(draft.body))
    return canonical * (_ID_WEIGHT if isinstance(draft.body.get("prompt"), list) else 2)


def tails(tenant: str, asked: Asked) -> Iterable[bytes]:
    """A digest for each number of leading turns, or of `_RUN` bytes of a text: equal ones mean an equal beginning."""
    digest = sha256(b"\0".join((tenant.encode(), asked.dialect.value.encode(), asked.opening))).digest()
    for part in _runs(asked.turns) if asked.dialect is Dialect.COMPLETIONS else asked.turns:
        digest = _next(digest, part)
        yield digest


def _runs(turns: Sequence[bytes]) -> Iterator[bytes]:
    """The whole runs of a text, which has no turns of its own."""
    for text in turns:
        for end in range(_RUN, len(text) + 1, _RUN):
            yield text[end - _RUN : end]


def _next(digest: bytes, turn: bytes) -> bytes:
    return sha256(digest + turn).digest()
