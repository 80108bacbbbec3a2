"""Whether an engine finds its own answers again: pure.

What it generated is in its cache. But the next request brings the answer as the chat template writes it, and that may
be written otherwise: thinking is dropped, a tool call's JSON is spaced anew. Until it is known, a turn that has ended
is worth a look, which computes the difference, if there is one, while the user reads or the tool runs.
"""

from dataclasses import dataclass

_ENOUGH, _MOSTLY = 3, 0.9  # looks that tell, and the share of them that must have found all
_AGAIN = 32  # turns after which it is looked at once more
_MEMORY = 0.95


@dataclass
class Habit:
    """Of one engine."""

    looks: float = 0.0
    found: float = 0.0
    _believed: int = 0  # turns since the last look

    def believes(self) -> bool:
        """Whether an answer is taken to be in the cache as the next request will bring it. Asked once for each."""
        known = self.looks >= _ENOUGH and self.found >= _MOSTLY * self.looks
        self._believed = self._believed + 1 if known else 0
        return known and self._believed % _AGAIN != 0

    def looked(self, found: bool) -> None:
        """A turn was looked at; `found`: nothing had to be computed."""
        self.looks = self.looks * _MEMORY + 1
        self.found = self.found * _MEMORY + found
