"""How fast this machine is: learnt from its real work, never assumed."""

from dataclasses import dataclass, field
from math import inf

_MEMORY = 0.98  # what a measurement's weight is after the next one


@dataclass
class Line:
    """seconds = a·x + b·y, by least squares over the recent past, neither less than 0.

    Until several kinds of work were seen, all goes by x.
    """

    xx: float = 0.0
    xy: float = 0.0
    yy: float = 0.0
    xt: float = 0.0
    yt: float = 0.0

    def learn(self, x: float, y: float, seconds: float) -> None:
        """One measurement. One that cannot be, of no time or NaN or of negative work, teaches nothing."""
        if not (0 < seconds < inf and 0 <= x < inf and 0 <= y < inf):
            return
        for name, value in (("xx", x * x), ("xy", x * y), ("yy", y * y), ("xt", x * seconds), ("yt", y * seconds)):
            setattr(self, name, getattr(self, name) * _MEMORY + value)

    def at(self, x: float, y: float) -> float | None:
        """Expected seconds, not negative; None before anything was measured."""
        if self.xx <= 0:
            return None
        det = self.xx * self.yy - self.xy * self.xy
        if det > 1e-6 * self.xx * self.yy:
            a = (self.xt * self.yy - self.yt * self.xy) / det
            b = (self.yt * self.xx - self.xt * self.xy) / det
            if a >= 0 and b >= 0:
                return a * x + b * y
            if a < 0:
                return self.yt / self.yy * y
        return self.xt / self.xx * x


@dataclass
class Rates:
    """Loading costs per token, prefill per token and per squared position."""

    loading: Line = field(default_factory=Line)
    computing: Line = field(default_factory=Line)

    def loaded(self, tokens: int, seconds: float) -> None:
        """A load of `tokens` took so long."""
        self.loading.learn(tokens, 0.0, seconds)

    def computed(self, start: int, end: int, seconds: float) -> None:
        """Prefill of positions `start`…`end` took so long."""
        self.computing.learn(end - start, float(end * end - start * start) / 1e5, seconds)

    def load_s(self, tokens: int) -> float | None:
        """Seconds to load so many; None: never measured."""
        return self.loading.at(tokens, 0.0)

    def prefill_s(self, start: int, end: int) -> float | None:
        """Seconds to compute positions `start`…`end`; None: never measured."""
        return self.computing.at(end - start, float(end * end - start * start) / 1e5)
