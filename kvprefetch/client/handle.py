"""A hint that was given to a service, as its caller sees it."""

import threading
from collections.abc import Callable

from kvprefetch.errors import KVPrefetchError
from kvprefetch.outcomes import Outcome, Result, Use


class Prefetch:
    """A hint that was given. It lives on whether or not anybody waits for it. Thread-safe."""

    def __init__(self, cancel: Callable[["Prefetch"], None]) -> None:
        self._cancel = cancel
        self._done = threading.Event()
        self._result: Result | None = None
        self._refusal: KVPrefetchError | None = None
        self._use: Use | None = None
        self._used_tokens = 0
        self._because = ""
        self.number = 0  # the hint's id at the service; 0: it has not been accepted yet
        self.worker = ""  # that it was given to; "": none yet
        self.is_withdrawn = False

    def wait(self, timeout_s: float | None = None) -> Result:
        """Its outcome. Raises TimeoutError if there is none within `timeout_s`, and why the service refused it.

        Refusals are Unauthenticated, PermissionDenied, UnknownContext (or model), InvalidRequest, LimitExceeded.
        """
        if not self._done.wait(timeout_s):
            raise TimeoutError(f"the prefetch has no outcome after {timeout_s} s; it lives on")
        if self._refusal is not None:
            raise self._refusal
        assert self._result is not None
        return self._result

    def cancel(self) -> None:
        """Withdraw it; the outcome is CANCELLED unless it has one. Returns at once; again, it does nothing."""
        self._cancel(self)

    @property
    def outcome(self) -> Outcome | None:
        """How it ended; None while open. REJECTED also where `wait` raises the service's refusal."""
        return self._result.outcome if self._result else None

    @property
    def use(self) -> Use | None:
        """What it was good for; None while open, and for ever if the service was restarted meanwhile."""
        return self._use

    @property
    def used_tokens(self) -> int:
        """Tokens that the request which used it found resident."""
        return self._used_tokens

    @property
    def because(self) -> str:
        """Why it was worked on: evidence, action and the terms of its value, in seconds of TTFT; "" if it was not."""
        return self._because

    # -- for the connection's thread -------------------------------------------------------------------
    def resolve(self, result: Result, because: str = "") -> None:
        """It has an outcome; a second one is ignored."""
        if self._result is None:
            self._result, self._because = result, because
            self._done.set()

    def refuse(self, error: KVPrefetchError) -> None:
        """The service would not have it."""
        if self._result is None:
            self._refusal = error
            self.resolve(Result(Outcome.REJECTED, 0, str(error)))

    def note_use(self, use: Use, tokens: int) -> None:
        """It was good for this."""
        self._used_tokens, self._use = tokens, use
