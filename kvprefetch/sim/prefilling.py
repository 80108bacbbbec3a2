"""A replayed worker that also computes contexts before they are asked about, on a GPU that nobody needs."""

from collections.abc import Callable
from typing import Protocol

from kvprefetch.cache.evict import Demand
from kvprefetch.cache.spans import Span, SpanPool
from kvprefetch.errors import PoolFull
from kvprefetch.sim.clock import VirtualClock
from kvprefetch.sim.lru_pool import LruPool
from kvprefetch.sim.machine import Machine
from kvprefetch.sim.worker import Live, Preload, SimWorker, Strategy

STEP_S = 0.02
"""One speculative step, which a request waits for at most."""


class QuietClock(VirtualClock):
    """A clock that knows for how long nothing will happen: steps that nothing could come between are one."""

    @property
    def quiet_s(self) -> float:
        """Seconds until the next action; 0 where there is none."""
        return self._queue[0][0] - self.now if self._queue else 0.0


class PrefillStrategy(Strategy, Protocol):
    """A strategy that has something to compute."""

    def next_prefill(self) -> Preload | None:
        """What the idle GPU should compute next. Asked again after each step."""

    def prefilled(self, preload: Preload, blocks: int) -> None:
        """So many blocks of it are being computed."""

    def computed_used(self, span: Span) -> None:
        """A request used these computed blocks for the first time, on the GPU or from the host."""


class PrefillingWorker(SimWorker):
    """Live prefill first; then, while nobody waits, what the strategy wants."""

    strategy: PrefillStrategy
    speculative_s = 0.0  # of the GPU
    computed_blocks = computed_useful = 0

    def __init__(
        self, machine: Machine, clock: QuietClock, strategy: PrefillStrategy, record: Callable[[Live], None]
    ) -> None:
        self.quiet = clock
        super().__init__(machine, clock, strategy, record)
        self.host.on_first_use = self._note_computed

    def _gpu_pool(self, capacity: int) -> SpanPool:
        return LruPool(capacity, self.strategy.merges)

    def wake(self) -> None:
        """Something may be worth doing now."""
        self.serve_link()
        self._serve_gpu()

    def asked(self, key: str) -> None:
        """The question has come that the preload of this name was for: what is not done by now is late."""
        self.moves.late += self.unfinished.pop(key, None) is not None

    def _serve_gpu(self) -> None:
        super()._serve_gpu()
        while not self.gpu_busy and (preload := self.strategy.next_prefill()) is not None:
            if not self._compute(preload):
                self.strategy.failed(preload)

    def _compute(self, preload: Preload) -> bool:
        """One step of it, if there is room; whether it has begun."""
        path, block = preload.path, self.machine.block_tokens
        here = min(self.gpu.match(path), preload.blocks)
        if here >= preload.blocks:
            return False
        self.gpu.hold(path, here)
        upto = self._room_for(preload, here)
        if upto <= here:
            self.gpu.release(path, here)
            return False
        seconds = self.machine.prefill_s(here * block, upto * block)
        self.gpu_busy = True
        self.gpu_seconds += seconds
        self.speculative_s += seconds
        self.moves.started += preload.session not in self.unfinished
        self.unfinished[preload.session] = preload
        self.strategy.computed(here * block, upto * block, seconds)
        self.strategy.prefilled(preload, upto - here)

        def done() -> None:
            self.gpu_busy = False
            self.gpu.unreserve(upto - here, preload.tenant)
            session, tenant, until = preload.session, preload.tenant, preload.hold_until
            fresh = self.gpu.insert(path, upto, tenant, session, self.clock.now, until)
            self.moves.moved += fresh
            self.computed_blocks += fresh
            self.gpu.extend_hold(path, upto, until)
            self.gpu.release(path, here)
            self._keep_computed(preload, upto)
            if upto >= preload.blocks:
                self.unfinished.pop(session, None)
            self._serve_gpu()

        self.clock.after(seconds, done)
        return True

    def _room_for(self, preload: Preload, here: int) -> int:
        """Reserve for as many steps as end before anything else happens, or for one; returns where they end."""
        demand = Demand(preload.tenant, True, self.clock.now, worth=preload.worth)
        for seconds in (max(STEP_S, self.quiet.quiet_s // STEP_S * STEP_S), STEP_S):
            upto = self._step_end(here, preload.blocks, seconds)
            try:
                self.gpu.reserve(upto - here, demand)
            except PoolFull:
                continue
            return upto
        return here

    def _step_end(self, here: int, blocks: int, seconds: float) -> int:
        block = self.machine.block_tokens
        if self.machine.prefill_s(here * block, blocks * block) <= seconds:
            return blocks
        return min(blocks, max(self.machine.prefill_end(here * block, seconds) // block, here + 1))

    def _keep_computed(self, preload: Preload, upto: int) -> None:
        """What was computed is kept on the host too, where other tenants' needs do not displace it so soon."""
        path, now = preload.path, self.clock.now
        known = min(self.host.match(path), upto)
        self.host.hold(path, known)
        try:
            self.host.make_room(upto - known, Demand(preload.tenant, True, now, worth=preload.worth))
            self.host.insert(path, upto, preload.tenant, preload.session, now, preload.hold_until)
        except PoolFull:
            pass
        finally:
            self.host.release(path, known)

    def _note_computed(self, span: Span) -> None:
        """Every question's text goes to the host: so the first use of what was computed shows there."""
        self.computed_useful += span.count
        self.strategy.computed_used(span)
