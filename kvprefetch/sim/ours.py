"""kvprefetch's own policies, replayed: the predictor and the eviction index of the worker, on the virtual clock."""

from kvprefetch.cache.evict import by_index
from kvprefetch.cache.spans import Span
from kvprefetch.predict.sessions import Sessions
from kvprefetch.sim.baselines import Reactive
from kvprefetch.sim.worker import Live


class ByIndex(Reactive):
    """Reactive, with the GPU's victims chosen by the index (DESIGN §7.3)."""

    def __init__(self) -> None:
        self.sessions = Sessions()
        self.gpu_policy = by_index(self._index)

    def arrived(self, live: Live) -> None:
        """Its gap has ended."""
        request = live.request
        self.sessions.requested(request.session, request.tenant, self.worker.clock.now)

    def ended(self, live: Live) -> None:
        """Its next gap begins."""
        request = live.request
        self.sessions.turn_ended(request.session, request.tenant, self.worker.clock.now, request.stop, request.tokens)

    def _index(self, span: Span, now: float) -> float:
        if not self.sessions.is_current(span.session, span.last_used):
            return 1e-9 / (1 + now - span.last_used)
        return self.sessions.index(span.session, now)
