"""The policies that kvprefetch is measured against."""

from collections import deque

from kvprefetch.cache.evict import Demand, Rank, lru
from kvprefetch.cache.spans import Span, SpanPolicy
from kvprefetch.sim.future import Future
from kvprefetch.sim.trace import Request
from kvprefetch.sim.worker import Live, Preload, SimWorker


class Reactive:
    """LRU on the GPU; the host keeps what it evicts, and a request loads it when it comes."""

    gpu_policy: SpanPolicy = staticmethod(lru)
    has_host = True
    merges = True

    def attach(self, worker: SimWorker) -> None:
        """See `Strategy`."""
        self.worker = worker

    def arrived(self, live: Live) -> None:
        """See `Strategy`."""

    def ended(self, live: Live) -> None:
        """See `Strategy`."""

    def signalled(self, request: Request) -> None:
        """See `Strategy`."""

    def next_preload(self) -> Preload | None:
        """See `Strategy`."""
        return None

    def failed(self, preload: Preload) -> None:
        """See `Strategy`."""

    def moved(self, preload: Preload, blocks: int) -> None:
        """See `Strategy`."""

    def loaded(self, tokens: int, seconds: float) -> None:
        """See `Strategy`."""

    def computed(self, start: int, end: int, seconds: float) -> None:
        """See `Strategy`."""

    def used(self, span: Span) -> None:
        """See `Strategy`."""


class GpuLru(Reactive):
    """LRU on the GPU, and what it evicts is gone."""

    has_host = False


class Ttl(Reactive):
    """Reactive, but blocks leave the GPU `seconds` after their last use."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def ended(self, live: Live) -> None:
        """Drop what nobody used in time."""
        worker = self.worker

        def drop() -> None:
            limit = worker.clock.now - self.seconds
            while old := [s for s in worker.gpu.leaves if s.last_used <= limit]:
                for span in old:
                    worker.gpu.cut(span, span.count)

        worker.clock.after(self.seconds, drop)


class Trigger(Reactive):
    """Every signal is believed: the session's context is loaded at once and held for `hold_s`."""

    def __init__(self, hold_s: float = 300.0) -> None:
        self.hold_s = hold_s
        self.queue: deque[Preload] = deque()

    def signalled(self, request: Request) -> None:
        """Queue its context; a session's older preload is replaced."""
        self._queue(request)

    def arrived(self, live: Live) -> None:
        """It is here: nothing to preload any more."""
        self._forget(live.request.session)

    def next_preload(self) -> Preload | None:
        """In the order of the signals."""
        return self.queue[0] if self.queue else None

    def failed(self, preload: Preload) -> None:
        """Done, or no room."""
        if self.queue and self.queue[0] is preload:
            self.queue.popleft()

    def _queue(self, request: Request) -> None:
        self._forget(request.session)
        until = self.worker.clock.now + self.hold_s
        self.queue.append(Preload(request.session, request.tenant, request.path, request.blocks, until))
        self.worker.serve_link()

    def _forget(self, session: str) -> None:
        self.queue = deque(p for p in self.queue if p.session != session)


class NextTurn(Trigger):
    """Every turn's end starts the next turn's preload, whatever the signals: for `hold_s` it is expected back.

    As the blocks are resident then, what this does is to put them back where other requests displace them: once per
    turn, as two sessions would else displace each other for ever.
    """

    def attach(self, worker: SimWorker) -> None:
        """Hear of evictions."""
        super().attach(worker)
        worker.gpu.on_evict = self._displaced
        self.expected: dict[str, tuple[Request, float]] = {}

    def ended(self, live: Live) -> None:
        """It is resident now."""
        self.expected[live.request.session] = (live.request, self.worker.clock.now + self.hold_s)

    def arrived(self, live: Live) -> None:
        """It needs no preload while it runs."""
        super().arrived(live)
        self.expected.pop(live.request.session, None)

    def signalled(self, request: Request) -> None:
        """Needs none."""

    def _displaced(self, span: Span, count: int) -> None:
        request, until = self.expected.pop(span.session, (None, 0.0))
        if request is not None and self.worker.clock.now < until:
            self.queue.append(Preload(request.session, request.tenant, request.path, request.blocks, until))


class Belady(Reactive):
    """Reactive, evicting what will be used last; it knows the future."""

    merges = False  # a run must have one next use

    def __init__(self, future: Future) -> None:
        def furthest(span: Span, demand: Demand) -> Rank | None:
            return Rank(0, -future.next_use(span.first + span.count - 1, demand.now), "belady")

        self.gpu_policy = furthest
