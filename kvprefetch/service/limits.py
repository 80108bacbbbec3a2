"""What one tenant may ask for: signals a second, and contexts by name. Pure: the time is an argument, in seconds.

Promises
- What is kept for a tenant is bounded, whatever it sends, and takes nothing from another's allowance.
- What is refused raises LimitExceeded with a line that says which limit, and changes nothing.
"""

from collections import OrderedDict
from dataclasses import dataclass, field

from kvprefetch.errors import LimitExceeded, UnknownContext
from kvprefetch.v1.hints_pb2 import Context

BURST_S = 10.0
"""Signals are averaged over so long."""
IN_USE_S = 60.0
"""A name unused for longer gives way to a new one."""


@dataclass
class Bucket:
    """Lets through `rate` a second on average, and at once what was saved up in `BURST_S`; 0: nothing."""

    rate: float
    _taken: float = field(default=0.0, init=False)  # and not made up for yet
    _at: float = field(default=0.0, init=False)

    def take(self, now: float) -> bool:
        """Whether one more may pass now."""
        taken = max(self._taken - (now - self._at) * self.rate, 0.0)
        fits = self.rate > 0 and taken + 1.0 <= max(self.rate * BURST_S, 1.0)
        self._taken, self._at = taken + fits, now
        return fits


@dataclass(slots=True)
class _Named:
    context: Context
    size: int
    used_at: float


class Names:
    """The contexts that one tenant gave names: at most `most`, and `most_bytes` together."""

    def __init__(self, most: int, most_bytes: int) -> None:
        self.most, self.most_bytes = most, most_bytes
        self.bytes = 0
        self._named: OrderedDict[str, _Named] = OrderedDict()  # the longest unused first

    def __len__(self) -> int:
        return len(self._named)

    def recall(self, name: str, now: float) -> Context:
        """The context of that name. Raises UnknownContext."""
        named = self._named.get(name)
        if named is None:
            raise UnknownContext(f"no context is known by the name {name!r}; send its content with the name once")
        named.used_at = now
        self._named.move_to_end(name)
        return named.context

    def remember(self, name: str, context: Context, now: float) -> None:
        """Give `context` that name. Raises LimitExceeded where names still in use fill the allowance."""
        size = context.ByteSize()
        before = self._named[name].size if name in self._named else 0
        going, room = [], self.most_bytes - self.bytes + before
        places = self.most - len(self._named) + (name in self._named)
        for other, named in self._named.items():
            if (places >= 1 and room >= size) or now - named.used_at <= IN_USE_S:
                break
            if other != name:
                going.append(other)
                room, places = room + named.size, places + 1
        if places < 1 or room < size:
            raise LimitExceeded(
                f"{len(self)} named contexts of {self.bytes} bytes are in use, of {self.most} and {self.most_bytes} "
                f"bytes (service.max_contexts, max_context_bytes); one unused for {IN_USE_S:.0f} s gives way"
            )
        for other in going:
            del self._named[other]
        self._named[name] = _Named(context, size, now)
        self._named.move_to_end(name)
        self.bytes = self.most_bytes - room + size
