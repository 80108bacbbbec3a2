"""How many tokens a piece of warming may have (law 2). Pure.

An engine cannot be stopped in the midst of a step, so a live request waits for the rest of the piece before it. While
live requests come and go, a piece takes at most `step_s`, or half as long as first tokens take here anyway: as a
request comes at any moment of it, that is a quarter more, on the average, for those that meet one. When nobody has
come for a while, the next request is not likely to come just now: a piece may then take a tenth of that while, up to
six first tokens, for short pieces cost more. Rates are learnt from pieces that were warmed, what is usual from live
requests that had no piece before them.
"""

from collections import deque
from dataclasses import dataclass, field
from math import inf
from statistics import quantiles

from kvprefetch.plan.rates import Line

_WINDOW, _ENOUGH = 64, 4  # live requests that are remembered, and how many tell what is usual
_BESIDE, _ALONE = 0.5, 6.0  # usual first tokens that a piece may take, while others come and go, and at most
_OF_SILENCE = 0.1  # of the time that nobody has come
_UNMEASURED = 10.0  # steps that a piece may take at most, before it is known what is usual
_MOST = 8_192  # tokens of a piece
_TRIALS = (1, 2, 4)  # blocks of the first pieces: what a piece costs beside its tokens is known from several sizes
_GROWTH = 2  # of one piece over the longest before


@dataclass
class Pace:
    """See the module's promises. Tokens, seconds."""

    step_s: float = 0.02
    _cost: Line = field(default_factory=Line)  # of tokens, and of a piece
    _pieces: int = 0
    _longest: int = 0
    _first_tokens: "deque[float]" = field(default_factory=lambda: deque(maxlen=_WINDOW))

    @property
    def usual_s(self) -> float | None:
        """What a quick live request waits for its first token; None until enough were seen."""
        if len(self._first_tokens) < _ENOUGH:
            return None
        return quantiles(self._first_tokens, n=4)[0]

    def bound_s(self, silence_s: float) -> float:
        """How long a piece may take, when nobody was served for so long."""
        usual = self.usual_s
        least = self.step_s if usual is None else max(self.step_s, _BESIDE * usual)
        most = _UNMEASURED * self.step_s if usual is None else max(self.step_s, _ALONE * usual)
        return min(max(least, _OF_SILENCE * silence_s), most)

    def seconds(self, tokens: int) -> float | None:
        """What a piece of so many tokens will probably take; None before the first."""
        return self._cost.at(float(tokens), 1.0)

    def answered(self, seconds: float) -> None:
        """A live request that had no piece before it got its first token."""
        if 0 < seconds < inf:
            self._first_tokens.append(seconds)

    def warmed(self, tokens: int, seconds: float) -> None:
        """A piece of so many new tokens took so long."""
        if tokens > 0 and 0 < seconds < inf:
            self._cost.learn(float(tokens), 1.0, seconds)
            self._pieces += 1
            self._longest = max(self._longest, tokens)

    def piece(self, block_tokens: int, silence_s: float) -> int:
        """Tokens of the next piece: whole blocks, at least one."""
        bound_s = self.bound_s(silence_s)
        if self._pieces < len(_TRIALS):
            return _TRIALS[self._pieces] * block_tokens
        most = min(max(_GROWTH * self._longest, block_tokens), max(_MOST, block_tokens)) // block_tokens
        fitting, beyond = 1, most + 1  # the most blocks that fit lie between: what they take grows with them
        while beyond - fitting > 1:
            middle = (fitting + beyond) // 2
            if (self.seconds(middle * block_tokens) or 0.0) <= bound_s:
                fitting = middle
            else:
                beyond = middle
        return fitting * block_tokens


def piece_end(start: int, total: int, piece: int, block_tokens: int) -> int:
    """Where a piece that begins at `start` ends: at an absolute multiple of the block (law 1), or at the total."""
    end = (start + piece) // block_tokens * block_tokens
    if end <= start:
        end = (start // block_tokens + 1) * block_tokens
    return min(end, total)
