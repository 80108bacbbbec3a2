"""One hint, and what is kept for a tenant of all that it gave."""

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from kvprefetch.outcomes import Outcome, Use
from kvprefetch.v1.workers_pb2 import Preload


@dataclass(eq=False)
class Hint:
    """One preload that somebody wants. `worker`: who has it; None: it waits."""

    number: int
    tenant: str
    model: str  # "": the first that there will be
    preload: Preload  # its content is dropped when the hint ends
    expected_at: float
    expires_at: float
    worker: bytes | None = None
    worker_name: str = ""
    losses: int = 0  # workers that vanished with it
    is_withdrawn: bool = False
    outcome: Outcome | None = None
    use: Use | None = None
    size: int = 0  # of its content, in bytes
    tokens: int = 0
    used_tokens: int = 0
    reason: str = ""
    because: str = ""
    use_due_at: float = 0.0  # a use that is not told by then is UNUSED
    only_at: bytes | None = None  # the one worker that it is for; None: wherever the session's request will land
    heard: Callable[["Hint"], None] | None = None  # called when it has its outcome, and when it has its use
    resolved: asyncio.Event = field(default_factory=asyncio.Event)  # it has an outcome, or the book is closed
    ended: asyncio.Event = field(default_factory=asyncio.Event)  # nothing more will come

    @property
    def session(self) -> str:
        """The session it is for."""
        return self.preload.session


@dataclass
class TenantBook:
    """One tenant's hints and counts."""

    open: dict[int, Hint] = field(default_factory=dict)
    ended: OrderedDict[int, Hint] = field(default_factory=OrderedDict)
    open_bytes: int = 0
    issued: int = 0
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    uses: Counter[Use] = field(default_factory=Counter)
    placed: Counter[str] = field(default_factory=Counter)  # where they were wanted: "device", "host"
    used_tokens: int = 0

    def stats(self) -> dict[str, Any]:
        """`outcomes` and `pending` sum to `issued`, `uses` and `use_pending` to the resident outcomes."""
        resident = sum(n for outcome, n in self.outcomes.items() if outcome.is_resident)
        return {
            "issued": self.issued,
            "pending": self.issued - self.outcomes.total(),
            "outcomes": {outcome.name: self.outcomes[outcome] for outcome in Outcome},
            "uses": {use.name: self.uses[use] for use in Use},
            "use_pending": resident - self.uses.total(),
            "placed": dict(self.placed),
            "used_tokens": self.used_tokens,
        }
