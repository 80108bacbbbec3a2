"""A preload in work, as far as planning goes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from kvprefetch.cache.keys import BlockKey
from kvprefetch.outcomes import Result
from kvprefetch.plan.ledger import Ticket


@dataclass(eq=False)
class Preload:
    """What is to be preloaded, for whom, and how far it is."""

    ticket: Ticket
    context: Any  # as whoever does the work describes it
    resolved: Callable[[Result], None]  # called once, with its outcome
    named: str = field(default="", kw_only=True)  # the context's own name, if it has one
    is_next_turn: bool = field(default=False, kw_only=True)
    is_signalled: bool = field(default=False, kw_only=True)  # a signal named it
    size: int = field(default=0, kw_only=True)  # tokens of its whole blocks, once it is known what it is made of
    keys: list[BlockKey] = field(default_factory=list, kw_only=True)  # where its blocks are found
    chain: list[BlockKey] = field(default_factory=list, kw_only=True)  # its owner's own keys, where some are borrowed
    has_computed: bool = field(default=False, kw_only=True)  # some of its blocks were computed for it, not found
    elsewhere: int = field(default=0, kw_only=True)  # leading blocks that a lower tier held when it was last asked
    why: str = field(default="", kw_only=True)  # the planner's latest decision for it, with the terms of its value

    @property
    def own_keys(self) -> list[BlockKey]:
        """What it is known by: no other tenant's context has the same."""
        return self.chain or self.keys

    @property
    def name(self) -> str:
        """What the planner knows it by."""
        return str(self.ticket.number)


P = TypeVar("P", bound=Preload)
"""Of whoever does the work."""
