"""Until when a preload can be wanted."""

from kvprefetch.plan.ledger import Ticket


def expires_at(ticket: Ticket) -> float:
    """When nobody can be expected to want this preload any more."""
    return ticket.expected_at + ticket.hold_s
