"""A live request: the worker's side of it, and the stream that its caller reads."""

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum

from kvprefetch.cache.sequence import PagedSequence
from kvprefetch.contexts import Context, Sampling
from kvprefetch.engines.sampling import Sampler
from kvprefetch.engines.text import TextStream
from kvprefetch.worker.host import Found


class FinishReason(Enum):
    """Why an answer ended."""

    STOP = "stop"  # an end token or a stop string
    LENGTH = "length"  # max_tokens, or the model's context is full
    CANCELLED = "cancelled"


Event = str | BaseException | None
"""A piece of text ("": a token that lets none through yet); then, once, the error or None: no more will come."""


@dataclass
class Timing:
    """When things happened, in seconds of the worker's clock."""

    arrived: float
    first_token: float | None = None
    finished: float | None = None


class Generation:
    """An answer being made. Iterate for its text pieces, or call `result()` for all of it, or `subscribe`.

    It has one reader, in one of these ways.
    Fields are filled by the worker and final once iteration has ended: `tokens`, `text`, `prompt_tokens`,
    `reused_tokens` (found in the pool), `loaded_tokens` (brought from another tier), `ttft_s` (from the call to the
    first token), `finish_reason`.
    """

    def __init__(self, cancel: Callable[[], None]) -> None:
        self.tokens: list[int] = []
        self.text = ""
        self.prompt_tokens = 0
        self.reused_tokens = 0
        self.loaded_tokens = 0
        self.ttft_s: float | None = None
        self.finish_reason: FinishReason | None = None
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._listener: Callable[[Event], None] | None = None
        self._turn = threading.Lock()  # between an event and a subscription: none is lost, none comes twice
        self._cancel = cancel
        self._ended = False

    def __iter__(self) -> Iterator[str]:
        """Text pieces as they come. Raises what went wrong with the request."""
        while not self._ended:
            event = self._events.get()
            if isinstance(event, str):
                if event:
                    yield event
                continue
            self._ended = True
            if event is not None:
                raise event

    def result(self) -> "Generation":
        """Wait for the end; returns itself."""
        for _ in self:
            pass
        return self

    def subscribe(self, listener: Callable[[Event], None]) -> None:
        """Have `listener` called for each event in order: at once for what has been, later on the worker's thread.

        It must not block and must not raise, and must not come back to this object's events.
        """
        with self._turn:
            while not self._events.empty():
                listener(self._events.get_nowait())
            self._listener = listener

    def cancel(self) -> None:
        """Stop early; what was made stays readable. Calling it again does nothing."""
        self._cancel()

    # -- the worker's side -----------------------------------------------------------------------------
    def put_text(self, piece: str) -> None:
        """Hand a piece to the reader."""
        self.text += piece
        self._put(piece)

    def put_end(self, error: BaseException | None = None) -> None:
        """No more will come."""
        self._put(error)

    def _put(self, event: Event) -> None:
        with self._turn:
            if self._listener is not None:
                self._listener(event)
            else:
                self._events.put(event)


@dataclass(eq=False)
class LiveRequest:
    """What the loop keeps of a request. `sequence` is open from admission to the end."""

    prompt: list[int]
    sampling: Sampling
    sequence: PagedSequence
    stream: Generation
    sampler: Sampler
    text: TextStream
    eos: frozenset[int]
    max_new: int
    timing: Timing
    session: str = ""
    tenant: str = ""
    context: Context | None = None  # set where the next turn can be foreseen
    cancelled: bool = False
    found: Found | None = None  # in the node's arena; until it is loaded
    counted_shared: int = field(default=0)  # leading blocks already counted as used
    refused_at: float | None = None  # when there was no room for it first

    @property
    def capacity(self) -> int:
        """Tokens whose KV it may need: the last sampled one needs none."""
        return len(self.prompt) + self.max_new - 1

    @property
    def pages(self) -> int:
        """Pages that it may need."""
        return -(-self.capacity // self.sequence.block_tokens)

    @property
    def pending(self) -> int:
        """Tokens without KV."""
        return len(self.sequence.tokens) - self.sequence.computed

    @property
    def is_decoding(self) -> bool:
        """Whether one token is left to run: the last sampled one, or a fully cached prompt's last."""
        return self.pending == 1

    def accept(self, token: int, now: float) -> FinishReason | None:
        """Take a sampled token; returns why the answer ends with it, if it does."""
        if self.timing.first_token is None:
            self.timing.first_token = now
            self.stream.ttft_s = now - self.timing.arrived
        self.sequence.append(token)
        self.stream.tokens.append(token)
        if token in self.eos and not self.sampling.ignore_eos:
            return FinishReason.STOP
        self.stream.put_text(self.text.push(token))
        if self.text.stopped:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(self.stream.tokens) >= self.max_new else None
