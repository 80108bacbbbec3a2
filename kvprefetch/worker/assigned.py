"""Preloads that the service has asked this worker for, and what it must hear of each.

Promises
- Each preload's outcome is reported, then its use, in that order; both may be said twice, which the service ignores.
- When the stream breaks, what had no outcome yet is given up in silence: the service gives it to somebody, perhaps to
  this worker again under the same number. What had one is kept, and what was said just before is said again.
- Thread-safe. Nothing here blocks, and nothing is raised: what cannot be read is FAILED.
"""

import json
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvprefetch.contexts import Context
from kvprefetch.errors import Closed, InvalidRequest, PermissionDenied
from kvprefetch.outcomes import Outcome, Result
from kvprefetch.v1 import hints_pb2, workers_pb2
from kvprefetch.worker.hints import Prefetch

if TYPE_CHECKING:
    from kvprefetch.worker.core import Core

_REPEATED, _UNSURE_S = 1_024, 5.0  # reports that are remembered, and how long before a break one may have been lost


@dataclass(eq=False)
class _Given:
    """One preload of the service's."""

    hint: int
    handle: Prefetch | None = None
    is_moved: bool = False  # the service has given it to somebody else


class Assigned:
    """See the module's promises. `say` sends a message to the service, or loses it."""

    def __init__(
        self, core: "Core", say: Callable[[workers_pb2.WorkerMessage], None], clock: Callable[[], float]
    ) -> None:
        self.core, self.say, self.clock = core, say, clock
        self._given: dict[int, _Given] = {}
        self._said: deque[tuple[float, workers_pb2.PreloadReport]] = deque(maxlen=_REPEATED)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._given)

    def take(self, asked: workers_pb2.Preload) -> None:
        """A hint of the service's becomes a hint here."""
        given = _Given(asked.hint)
        with self._lock:
            self._given[asked.hint] = given
        try:
            given.handle = self.core.hints(asked.tenant).prefetch(
                read_context(asked.context),
                asked.session,
                asked.probability,
                asked.expected_in_s,
                asked.hold_s if asked.HasField("hold_s") else None,
                kind=asked.kind,
                to_host=asked.place == workers_pb2.PLACE_HOST,
                report=lambda handle: self._settled(given, handle),
            )
        except (InvalidRequest, PermissionDenied) as error:
            self._end(given, Result(Outcome.FAILED, 0, str(error)))
        except Closed:
            self._end(given, Result(Outcome.CANCELLED, 0, "the worker was closed"))

    def withdraw(self, hint: int) -> None:
        """Nobody wants it any more."""
        given = self._given.get(hint)
        if given is not None and given.handle is not None:
            given.handle.cancel()

    def broken(self) -> None:
        """The stream broke."""
        with self._lock:
            open_ones = [g for g in self._given.values() if g.handle is not None and not g.handle.is_done]
            for given in open_ones:
                given.is_moved = True
                del self._given[given.hint]
        for given in open_ones:
            assert given.handle is not None
            given.handle.cancel()

    def repeat(self, broke_at: float) -> None:
        """There is a stream again, with the same service: say again what may have been lost with the last one."""
        with self._lock:
            lost = [report for at, report in self._said if at >= broke_at - _UNSURE_S]
        for report in lost:
            self.say(workers_pb2.WorkerMessage(preload=report))

    def _settled(self, given: _Given, handle: Prefetch) -> None:
        """On the loop's thread: it has its outcome, or its use."""
        assert handle.job is not None
        ticket = handle.job.ticket
        if ticket.result is None or given.is_moved:
            return
        self._report(given.hint, ticket.result, handle)
        if ticket.use is not None or not ticket.result.outcome.is_resident:
            self._forget(given)

    def _end(self, given: _Given, result: Result) -> None:
        self._report(given.hint, result)
        self._forget(given)

    def _forget(self, given: _Given) -> None:
        with self._lock:
            if self._given.get(given.hint) is given:
                del self._given[given.hint]

    def _report(self, hint: int, result: Result, handle: Prefetch | None = None) -> None:
        use = handle.use if handle else None
        report = workers_pb2.PreloadReport(
            hint=hint,
            outcome=f"OUTCOME_{result.outcome.name}",
            use=f"USE_{use.name}" if use else "USE_UNSPECIFIED",
            tokens=handle.used_tokens if handle and use else result.tokens,
            reason=result.reason,
            because=handle.because if handle else "",
        )
        with self._lock:
            self._said.append((self.clock(), report))
        self.say(workers_pb2.WorkerMessage(preload=report))


def read_context(wire: hints_pb2.Context) -> Context:
    """What a client sent. Raises InvalidRequest."""
    if wire.adapter:
        raise InvalidRequest(f"this worker serves no adapters, {wire.adapter!r} among them")
    try:
        return Context(
            messages=tuple(json.loads(wire.messages or b"[]")),
            tools=tuple(json.loads(wire.tools or b"[]")),
            chat_template_kwargs=dict(json.loads(wire.chat_template_kwargs or b"{}")),
            token_ids=tuple(wire.token_ids),
            name=wire.name,
            namespace=wire.namespace,
        )
    except (ValueError, TypeError, RecursionError) as error:
        raise InvalidRequest(f"the context cannot be read: {type(error).__name__}") from error
