"""How many tokens a piece of warming may have (law 2). Pure.

An engine cannot be stopped in the midst of a step, so a live request waits for the rest of the piece before it. A piece
therefore takes at most `step_s`, or as long as first tokens take here anyway: then the wait is at most doubled. Rates
are learnt from pieces that were warmed, what is usual from live requests that had no piece before them.
"""

from collections import deque
from dataclasses import dataclass, field
from statistics import quantiles

_WINDOW, _ENOUGH = 64, 4  # live requests that are remembered, and how many tell what is usual
_MOST = 8_192  # tokens of a piece
_GROWTH = 2.0  # of one piece over the one before: a rate that was measured on short ones errs
_FRESH = 0.3  # weight of the newest rate


@dataclass
class Pace:
    """See the module's promises. Tokens, seconds."""

    step_s: float = 0.02
    tokens_per_s: float | None = None
    _latest: int = 0
    _first_tokens: "deque[float]" = field(default_factory=lambda: deque(maxlen=_WINDOW))

    @property
    def usual_s(self) -> float | None:
        """What a quick live request waits for its first token; None until enough were seen."""
        if len(self._first_tokens) < _ENOUGH:
            return None
        return quantiles(self._first_tokens, n=4)[0]

    def answered(self, seconds: float) -> None:
        """A live request that had no piece before it got its first token."""
        if seconds > 0:
            self._first_tokens.append(seconds)

    def warmed(self, tokens: int, seconds: float) -> None:
        """A piece of so many new tokens took so long."""
        if tokens <= 0 or seconds <= 0:
            return
        rate = tokens / seconds
        self.tokens_per_s = rate if self.tokens_per_s is None else (1 - _FRESH) * self.tokens_per_s + _FRESH * rate
        self._latest = tokens

    def piece(self, block_tokens: int) -> int:
        """Tokens of the next piece: whole blocks, at least one."""
        if self.tokens_per_s is None:
            return block_tokens
        room = self.tokens_per_s * max(self.step_s, self.usual_s or 0.0)
        room = min(room, _MOST, _GROWTH * max(self._latest, block_tokens))
        return max(int(room) // block_tokens, 1) * block_tokens


def piece_end(start: int, total: int, piece: int, block_tokens: int) -> int:
    """Where a piece that begins at `start` ends: at an absolute multiple of the block (law 1), or at the total."""
    end = (start + piece) // block_tokens * block_tokens
    if end <= start:
        end = (start // block_tokens + 1) * block_tokens
    return min(end, total)
