"""Words for short stories about the books of speculation: blocks of four tokens, named by a letter."""

from collections import Counter
from collections.abc import Sequence

from kvprefetch.cache.keys import BlockKey
from kvprefetch.cache.misses import Lookup
from kvprefetch.outcomes import MissReason, Outcome, Result
from kvprefetch.plan.ledger import Ledger, Ticket

BLOCK = 4
HOLD = 60.0
RESIDENT = [outcome for outcome in Outcome if outcome.is_resident]
ABCD = [b"a", b"b", b"c", b"d"]


def issue(ledger: Ledger, now: float = 0.0, session: str = "s", hold_s: float = HOLD) -> Ticket:
    """Open a ticket for a prefetch that is held for `hold_s` seconds."""
    return ledger.issue(
        now, tenant="ann", session=session, probability=0.5, expected_in_s=5.0, hold_s=hold_s, because="hint"
    )


def warm(ledger: Ledger, keys: Sequence[BlockKey] = ABCD, found: int = 0, session: str = "s") -> Ticket:
    """A prefetch done at time 0: `found` blocks were there, the rest was computed."""
    ticket = issue(ledger, session=session)
    ledger.start(ticket, keys, found)
    ledger.resolve(ticket, Result(Outcome.WARM, len(keys) * BLOCK), 0.0, len(keys))
    return ticket


def already_warm(ledger: Ledger, keys: Sequence[BlockKey] = ABCD) -> Ticket:
    """A prefetch for `keys`, at time 0, that found all of them resident."""
    ticket = issue(ledger)
    ledger.start(ticket, keys, len(keys))
    ledger.resolve(ticket, Result(Outcome.ALREADY_WARM, len(keys) * BLOCK), 0.0, len(keys))
    return ticket


def request(ledger: Ledger, keys: Sequence[BlockKey], hits: int) -> None:
    """A live request for `keys` that found the first `hits`."""
    misses = Counter({MissReason.NEVER_SEEN: len(keys) - hits})
    ledger.note_lookup(keys, Lookup(len(keys), hits, misses, Counter(), None), BLOCK)


def assert_sums_hold(ledger: Ledger) -> None:
    """Everything counted once, and nothing counted below zero."""
    stats = ledger.stats()
    assert sum(stats["outcomes"].values()) + stats["pending"] == stats["issued"]
    ended_resident = sum(stats["outcomes"][outcome.name] for outcome in RESIDENT)
    assert sum(stats["uses"].values()) + stats["use_pending"] == ended_resident
    assert stats["tokens_computed"] == stats["tokens_used"] + stats["tokens_wasted"]
    assert min(stats["pending"], stats["use_pending"], stats["tokens_wasted"]) >= 0
    lookups = ledger.lookup_stats()
    assert lookups["hits"] + sum(lookups["misses"].values()) == lookups["blocks"]
