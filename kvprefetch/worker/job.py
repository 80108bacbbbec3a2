"""A preload in work."""

from collections.abc import Callable
from dataclasses import dataclass, field

from kvprefetch.cache.keys import BlockKey
from kvprefetch.cache.sequence import Owner
from kvprefetch.contexts import Context
from kvprefetch.outcomes import Result
from kvprefetch.plan.ledger import Ticket

Resolved = Callable[[Result], None]


@dataclass(eq=False)
class Job:
    """What is to be preloaded, for whom, and how far it is. `tokens` is None until its context is rendered."""

    ticket: Ticket
    context: Context
    owner: Owner
    resolved: Resolved
    is_next_turn: bool = False
    is_signalled: bool = False  # a signal named it
    tokens: list[int] | None = None
    keys: list[BlockKey] = field(default_factory=list)
    has_computed: bool = False  # some of its blocks were computed for it, not found
    elsewhere: int = 0  # leading blocks that the node's arena held when it was last asked
    to_host: bool = False  # it is enough to have it in the arena
    why: str = ""  # the planner's latest decision for it, with the terms of its value

    @property
    def name(self) -> str:
        """What the planner knows it by."""
        return str(self.ticket.number)
