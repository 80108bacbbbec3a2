"""One request for an answer on its way through the gateway: a `Watcher` that keeps what is needed to learn from it.

What it holds of the answer is bounded; of a longer one nothing is read.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvprefetch.cache.keys import BlockKey
from kvprefetch.gateway.contract import Asked, Headers
from kvprefetch.gateway.conversations import Conversation
from kvprefetch.gateway.desk import Found
from kvprefetch.gateway.link import RawHeaders
from kvprefetch.gateway.upstream import Upstream

_MOST_BYTES = 16 * 2**20  # of an answer that is read


@dataclass(eq=False)
class Turn:
    """See the module's promises. Times of the gateway's clock."""

    asked: Asked = field(repr=False)
    tenant: str
    talk: Conversation
    upstream: Upstream
    root: BlockKey = field(repr=False)
    keys: Sequence[BlockKey] = field(repr=False)
    headers: Headers = field(repr=False)
    salt: str = field(repr=False)
    found: Found
    arrived: float
    was_alone: bool  # at the engine
    behind_piece: bool  # a piece of warming was under way there
    clock: Callable[[], float] = field(repr=False)
    over: Callable[["Turn"], None] = field(repr=False)  # called once, when it has ended
    first_byte: float | None = None
    status: int = 0
    content_type: str = ""
    error: str | None = None
    raw: bytearray = field(default_factory=bytearray, repr=False)
    is_whole: bool = True  # all of the answer is in `raw`

    @property
    def is_stream(self) -> bool:
        """Whether its first byte is that of its first token."""
        return self.status == 200 and "event-stream" in self.content_type

    def began(self, status: int, headers: RawHeaders) -> None:
        """The engine's head has come."""
        self.status = status
        kind = next((value for name, value in headers if name.lower() == b"content-type"), b"")
        self.content_type = kind.decode("latin-1")

    def chunk(self, data: bytes) -> None:
        """A part of the answer."""
        if self.first_byte is None:
            self.first_byte = self.clock()
        if self.is_whole:
            if len(self.raw) + len(data) > _MOST_BYTES:
                self.is_whole = False
                self.raw.clear()
            else:
                self.raw += data

    def ended(self, error: str | None) -> None:
        """It is over."""
        self.error = error
        self.over(self)
