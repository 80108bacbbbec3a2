"""A circuit breaker: what is out of reach costs its timeout once, and is asked again after a while.

Promises: thread-safe; never blocks; no clock of its own. After a failure nobody asks for `first_s` seconds, then one
caller may try; each failure of such a try doubles the wait, up to `longest_s`; a success forgets all.
"""

import threading
from dataclasses import dataclass, field


@dataclass
class Breaker:
    """See the module's promises."""

    first_s: float = 0.5
    longest_s: float = 10.0
    failures: int = 0  # since it was made
    _wait_s: float = 0.0  # 0: closed, everybody may ask
    _until: float = 0.0
    _is_tried: bool = False  # somebody asks again, alone
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def is_open(self) -> bool:
        """Whether the last one who asked failed."""
        return self._wait_s > 0

    def allows(self, now: float) -> bool:
        """Whether to ask now. Where it is open, a true answer is for this caller alone."""
        with self._lock:
            if not self._wait_s:
                return True
            if now < self._until:
                return False
            self._until = now + self._wait_s  # the others wait for what this one finds
            self._is_tried = True
            return True

    def succeeded(self) -> None:
        """It answered."""
        if self._wait_s:
            with self._lock:
                self._wait_s, self._is_tried = 0.0, False

    def failed(self, now: float) -> None:
        """It did not."""
        with self._lock:
            self.failures += 1
            if self._wait_s and not self._is_tried:
                return  # it was under way when another one failed
            self._is_tried = False
            self._wait_s = min(max(2 * self._wait_s, self.first_s), self.longest_s)
            self._until = now + self._wait_s
