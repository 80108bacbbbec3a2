"""Policies of a navigation replay: what is computed before it is asked about."""

from collections import Counter

from kvprefetch.cache.spans import Path, Span
from kvprefetch.sim.baselines import Reactive
from kvprefetch.sim.prefilling import PrefillingWorker
from kvprefetch.sim.visits import Opening, Visit
from kvprefetch.sim.worker import Preload

HOLD_S = 600.0
"""How long policies without judgement hold what they computed."""


class Navigator(Reactive):
    """Reactive: computes and loads what a question needs when it comes. The texts of today's files are at hand."""

    worker: PrefillingWorker

    def __init__(self) -> None:
        self.library: dict[tuple[str, str], Path] = {}

    def opened(self, opening: Opening) -> None:
        """A signal."""

    def asked(self, visit: Visit) -> None:
        """A question about a file has come."""

    def foreseen(self, visit: Visit) -> None:
        """For policies that know the future."""

    def next_prefill(self) -> Preload | None:
        """See `PrefillStrategy`."""
        return None

    def prefilled(self, preload: Preload, blocks: int) -> None:
        """See `PrefillStrategy`."""

    def computed_used(self, span: Span) -> None:
        """See `PrefillStrategy`."""

    def _preload(self, key: str, tenant: str, path: Path, hold_s: float, worth: float = float("inf")) -> Preload:
        blocks = sum(count for _, count in path)
        return Preload(key, tenant, path, blocks, self.worker.clock.now + hold_s, worth)


class InTurn(Navigator):
    """What is told is loaded or computed in that order, at once. A key told again is told anew, in its old place."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: dict[str, Preload] = {}

    def tell(self, key: str, tenant: str, path: Path) -> None:
        """Compute this, too."""
        self.queue[key] = self._preload(key, tenant, path, HOLD_S)
        self.worker.wake()

    def next_preload(self) -> Preload | None:
        """What the host has of the first one."""
        worker, first = self.worker, next(iter(self.queue.values()), None)
        if first and worker.host.match(first.path) > worker.gpu.match(first.path):
            return first
        return None

    def next_prefill(self) -> Preload | None:
        """The first one, once the host has no more of it."""
        return next(iter(self.queue.values()), None) if self.next_preload() is None else None

    def failed(self, preload: Preload) -> None:
        """Done, or no room."""
        if self.queue.get(preload.session) is preload:
            del self.queue[preload.session]


class Popularity(InTurn):
    """After a question, the tenant's most popular files are brought to the GPU: each text once in its hold."""

    COUNT = 5

    def __init__(self) -> None:
        super().__init__()
        self.visits: dict[str, Counter[str]] = {}
        self.told: dict[tuple[str, str], tuple[Path, float]] = {}  # the latest text of each, and when

    def asked(self, visit: Visit) -> None:
        """One more for this file."""
        tenant, now = visit.request.tenant, self.worker.clock.now
        counts = self.visits.setdefault(tenant, Counter())
        counts[visit.context] += 1
        for context, _ in counts.most_common(self.COUNT):
            key, path = (tenant, context), self.library.get((tenant, context), ())
            before, at = self.told.get(key, ((), now))
            if path and (path != before or now - at >= HOLD_S):
                self.told[key] = path, now
                self.tell(f"{tenant}|{context}", tenant, path)


class Oracle(InTurn):
    """Knows what will be asked about."""

    def foreseen(self, visit: Visit) -> None:
        """It is computed now."""
        self.tell(key_of(visit.request.session, visit.context), visit.request.tenant, visit.request.path)


def key_of(session: str, context: str) -> str:
    """Names what is preloaded of a file for a session."""
    return f"{session}|{context}"
