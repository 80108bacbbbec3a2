"""What becomes of a prefetch, and why a look-up misses (law 6: each has exactly one)."""

from dataclasses import dataclass
from enum import Enum


class Outcome(Enum):
    """How a prefetch ended; terminal."""

    WARM = "warm"  # its blocks were loaded or computed, and are resident
    ALREADY_WARM = "already_warm"  # nothing had to be done
    CLIPPED = "clipped"  # a prefix is resident; the rest does not fit
    REJECTED = "rejected"  # refused before any work
    CANCELLED = "cancelled"  # the caller withdrew it
    EXPIRED = "expired"  # its time passed before it was done
    FAILED = "failed"  # an error; the reason names it

    @property
    def is_resident(self) -> bool:
        """Whether blocks were left in the pool, so that a use will follow."""
        return self in (Outcome.WARM, Outcome.ALREADY_WARM, Outcome.CLIPPED)


class Use(Enum):
    """What a resident prefetch was good for; terminal."""

    USED = "used"  # a request found its tokens
    LATE = "late"  # the request came before it was done
    EVICTED = "evicted"  # its blocks were gone before a request came
    UNUSED = "unused"  # its hold ran out


class MissReason(Enum):
    """Why a full block of a prompt was not resident."""

    NEVER_SEEN = "never_seen"
    DIVERGED = "diverged"  # its predecessor is resident with another continuation
    IN_FLIGHT = "in_flight"  # being computed by somebody else at that moment
    EVICTED = "evicted"
    TIMED_OUT = "timed_out"
    CORRUPT = "corrupt"
    UNAVAILABLE = "unavailable"
    UNKNOWN = "unknown"  # older than the bounded memory of evicted keys


@dataclass(frozen=True)
class Result:
    """The end of a prefetch: `tokens` are resident from the start of the context."""

    outcome: Outcome
    tokens: int
    reason: str = ""
