"""Beginnings that many sessions share: a system prompt with its tools. Pure and bounded.

An opening is a session of its own for the predictor: each session that begins with it is a request of that session. So
what is known of returns says how likely somebody will begin with it soon.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256

from kvprefetch.cache.keys import BlockKey
from kvprefetch.contexts import qualified
from kvprefetch.gateway.contract import Draft

_ENOUGH = 3  # sessions that began with it, before it is worth holding for the next


@dataclass(eq=False)
class Opening:
    """A shared beginning."""

    session: str  # its name for the predictor
    tenant: str
    draft: Draft = field(repr=False)
    keys: Sequence[BlockKey] = field(repr=False)
    upstream: str = ""  # where it was last
    sessions: int = 0

    @property
    def is_shared(self) -> bool:
        """Whether enough sessions began with it."""
        return self.sessions >= _ENOUGH


class Openings:
    """The latest `most` of them, and of their texts at most `max_bytes`."""

    def __init__(self, most: int, max_bytes: int) -> None:
        self.most, self.max_bytes, self._bytes = most, max_bytes, 0
        self.known: OrderedDict[bytes, Opening] = OrderedDict()

    def began(self, tenant: str, draft: Draft, keys: Sequence[BlockKey]) -> Opening:
        """A session has begun with it."""
        digest = _digest(tenant, draft.canonical[0])
        found = self.known.get(digest)
        if found is None:
            found = self.known[digest] = Opening(qualified(tenant, f"opening {digest.hex()[:12]}"), tenant, draft, keys)
            self._bytes += len(draft.canonical[0])
        found.sessions += 1
        found.draft, found.keys = draft, keys  # with the headers and salt of the latest session
        self.known.move_to_end(digest)
        while len(self.known) > self.most or (self._bytes > self.max_bytes and len(self.known) > 1):
            _, gone = self.known.popitem(last=False)
            self._bytes -= len(gone.draft.canonical[0])
        return found

    def of(self, tenant: str, opening: bytes) -> Opening | None:
        """That of a request, if it is known."""
        return self.known.get(_digest(tenant, opening))


def _digest(tenant: str, opening: bytes) -> bytes:
    return sha256(tenant.encode() + b"\0" + opening).digest()
