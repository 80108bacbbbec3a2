"""Which waiting preload to work on next."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

from kvprefetch.plan.ledger import Ticket

T = TypeVar("T", bound="Candidate")


@dataclass(eq=False)
class Candidate:
    """A preload that waits or is half done."""

    ticket: Ticket


def choose(candidates: Iterable[T], now: float) -> T | None:
    """The candidate most likely to be used; among equals the soonest expected; of those due, the newest.

    The newest first, because a user's last signal says most about the next request.
    """
    return max(
        candidates,
        key=lambda c: (c.ticket.probability, -max(c.ticket.expected_at, now), c.ticket.number),
        default=None,
    )


def expires_at(ticket: Ticket) -> float:
    """When nobody can be expected to want this preload any more."""
    return ticket.expected_at + ticket.hold_s
