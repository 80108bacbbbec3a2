"""What a shelf has counted since the service started, in blocks unless said otherwise."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Counts:
    """See the module."""

    lookups: int = 0  # calls
    hits: int = 0
    misses: Counter[str] = field(default_factory=Counter)  # by the reason of the first that is missing (law 6)
    waited: int = 0  # calls that waited for blocks on their way
    reserved: int = 0
    not_reserved: Counter[str] = field(default_factory=Counter)  # by why
    committed: int = 0
    read: int = 0  # by other nodes

    def look_up(self, found: int, asked: int, reason: str) -> None:
        """One look-up; `reason`: why the first missing block is missing."""
        self.lookups += 1
        self.hits += found
        if found < asked:
            self.misses[reason] += asked - found
