"""What the gateway's parts say to each other. No I/O, nothing of any one engine.

Words: a **dialect** is the API that a request speaks. A **draft** is the beginning of a coming prompt, in the dialect
of the request that will bring it. A **rendered** draft is that for one engine: requests that warm it, piece by piece.
The **canonical** bytes of a request are what its prompt is made of, opening first, then turn by turn: a request whose
canonical bytes begin with another's has a prompt that begins with the other's. They tell prompts apart without any
tokenizer, are never sent anywhere and never logged.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

Json = dict[str, Any]
Headers = tuple[tuple[str, str], ...]


class Dialect(Enum):
    """By its path."""

    CHAT = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"
    RESPONSES = "/v1/responses"
    MESSAGES = "/v1/messages"


@dataclass(frozen=True)
class Asked:
    """A request, as far as it is read; `body` is what was sent, decoded, and is never changed."""

    dialect: Dialect
    body: Json = field(repr=False)
    model: str
    opening: bytes = field(repr=False)  # canonical: tools, system, and whatever else shapes the prompt's beginning
    turns: tuple[bytes, ...] = field(repr=False)  # canonical: each message or input item; a completion's prompt is one
    stream: bool = False
    prewarm: bool = False  # `max_tokens: 0` or `prompt_cache_options.prewarm`: have it warm, answer nothing
    salt: str = ""  # the caller's own `cache_salt`
    previous: str = ""  # the response that this one goes on from, where the engine keeps it
    is_text: bool = True  # no images, audio or files


@dataclass(frozen=True)
class Answered:
    """What came back, read once it was complete, or cut off. None: the engine did not say."""

    kind: str = ""  # what it ended with: "stop", "length", "tool NAME"; "" for an error or a cut-off answer
    turn: bytes = field(default=b"", repr=False)  # canonical: the answer, as a client will send it back
    message: Any = field(default=None, repr=False)  # the answer in the dialect's own form, to be sent back
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    response_id: str = ""


@dataclass(frozen=True)
class Draft:
    """The beginning of a prompt. `body` holds what shapes the prompt (model, messages, tools, …), and nothing else."""

    dialect: Dialect
    body: Json = field(repr=False)
    canonical: tuple[bytes, ...] = field(repr=False)  # opening, then turns
    exact: bool = False  # the whole prompt as it stands; else the prefix that it shares with whatever comes next
    headers: Headers = field(default=(), repr=False)  # of its session's latest request: affinity, credentials
    salt: str = field(default="", repr=False)  # what isolates its namespace in the engine's cache; "" for nothing
    is_text: bool = True


@dataclass(frozen=True)
class Warmed:
    """What became of a prewarm request, for the answer to it."""

    outcome: str  # of `Outcome`, or "pending"
    prompt_tokens: int
    cached_tokens: int  # that are warm now
    expires_in_s: float
    reason: str = ""


@dataclass(frozen=True)
class WarmRequest:
    """A request for one token, which leaves the prompt's first `end` tokens in the engine's cache."""

    path: str
    body: bytes = field(repr=False)
    end: int


class Rendered(Protocol):
    """A draft for one engine. Immutable."""

    @property
    def tokens(self) -> int:
        """Of the whole prefix; an estimate where `is_exact` is False."""

    @property
    def is_exact(self) -> bool:
        """Whether `tokens`, and the ends of pieces, are counted and not estimated."""

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Nothing where the engine has no tokenizer."""

    def request(self, end: int) -> WarmRequest:
        """For the first `end` tokens, 0 < end ≤ tokens; it may round up to what can be cut."""


@dataclass(frozen=True)
class Traits:
    """What is known of an engine."""

    kind: str  # vllm | sglang | llama.cpp | kvprefetch | openai
    block_tokens: int = 1  # a piece that ends elsewhere leaves its last block unfinished
    capacity_tokens: int | None = None  # of its prefix cache
    takes_salt: bool = False
    warms_itself: bool = False  # it takes `max_tokens: 0`, and does the work in its own idle time
    priorities: bool = False
    models: frozenset[str] = frozenset()  # that it lists; none: it does not say


class Engine(Protocol):
    """What the gateway asks of an engine beside serving. One event loop; nothing here blocks it."""

    traits: Traits

    async def render(self, draft: Draft) -> Rendered:
        """Raises InvalidRequest where the engine refuses it, UpstreamError where it cannot be reached."""

    async def load(self) -> int | None:
        """Requests that it is serving, whoever sent them; None where it does not say. Raises UpstreamError."""

    def cached(self, rendered: Rendered, salt: str) -> int | None:
        """Leading tokens that it has said (in KV events) are in its cache; None where it says nothing."""

    def learn(self, rendered: Rendered, end: int, prompt_tokens: int) -> None:
        """The request for the first `end` tokens turned out to have `prompt_tokens`: later estimates are better."""

    async def close(self) -> None:
        """Let go of what it holds."""


class Link(Protocol):
    """A way to one upstream. Raises UpstreamError where it cannot be reached or takes too long."""

    url: str

    async def get(self, path: str, *, timeout_s: float = 5.0) -> tuple[int, bytes]:
        """Status and body, at most 64 MiB of it."""

    async def post(
        self, path: str, body: bytes, *, headers: Mapping[str, str] | Headers = (), timeout_s: float = 60.0
    ) -> tuple[int, bytes]:
        """The same, of JSON. A cancelled call closes the connection at once."""
