"""How much speculation a kind of evidence may waste: its own record widens or closes it (DESIGN §7.4)."""

from collections.abc import Hashable
from dataclasses import dataclass, field
from math import isfinite


@dataclass
class Budget:
    """Tokens that each account may still speculate on.

    An account starts with `start` tokens of credit. A token that was speculated on costs one, a token that a request
    then used earns `per_useful`; so in the long run an account moves at most `per_useful` tokens per useful one,
    whatever is claimed; beside them the start, the trickle, and what one job is larger than a quarter of the start.
    Credit is capped at `cap`, so that a good past does not pay for a bad present, and grows back by `trickle` tokens
    per second up to `start`, so that a kind that has become good again can show it.
    """

    per_useful: float = 1.4
    start: float = 400_000.0
    cap: float = 4_000_000.0
    trickle: float = 2.0
    caution: float = 32.0
    credit: dict[Hashable, float] = field(default_factory=dict)
    refilled: dict[Hashable, float] = field(default_factory=dict)

    def left(self, account: Hashable, now: float) -> float:
        """Tokens it may speculate on now."""
        credit = self.credit.setdefault(account, self.start)
        if not isfinite(now):
            return credit
        since = now - self.refilled.setdefault(account, now)
        if since > 0:
            self.refilled[account] = now
            if credit < self.start:
                credit = self.credit[account] = min(credit + since * self.trickle, self.start)
        return credit

    def spend(self, account: Hashable, tokens: int) -> None:
        """So many were speculated on."""
        self.credit[account] = self.credit.get(account, self.start) - tokens

    def earn(self, account: Hashable, tokens: int) -> None:
        """So many of them were used."""
        self.credit[account] = min(self.credit.get(account, self.start) + self.per_useful * tokens, self.cap)

    def allows(self, account: Hashable, tokens: int, share: float, now: float) -> bool:
        """Whether `tokens`, of which `share` will probably be used, may be speculated on.

        What pays for itself needs only credit for the case that it fails, of a large job for a part of it; what does
        not pay for itself lives on what is left over.
        """
        left = self.left(account, now)
        loss = tokens * max(1 - self.per_useful * share, 0.0)
        return left >= min(tokens, self.start / 4) and left >= self.caution * loss
