"""Whose prefill goes on in the next forward, and who is admitted: by the service that each tenant has had.

Requests that wait for admission and those that were admitted stand in one order (`plan.order`), so a request takes
pages when its turn for a slice has come, not before. What counts is seconds of prefill and of loading, estimated, and
sampled tokens, which count for more than those of a prompt.

Used by the loop's thread alone. Raises what `open` raises, but for PoolFull: who meets that waits on, and keeps nobody
but its own tenant's requests waiting.
"""

from collections.abc import Callable

from kvprefetch.cache.shares import Shares
from kvprefetch.engines.engine import TransformersEngine
from kvprefetch.errors import PoolFull
from kvprefetch.plan.counters import Counters
from kvprefetch.plan.foresight import Foresight
from kvprefetch.plan.order import FairOrder, foremost
from kvprefetch.plan.slices import slice_end
from kvprefetch.worker.admission import Admission
from kvprefetch.worker.job import Job
from kvprefetch.worker.request import LiveRequest

OUTPUT_WEIGHT = 2.0
"""Of a sampled token against one of a prompt: Sheng et al. (OSDI 2024)."""
_RETRY_S = 0.05  # where nobody has ended meanwhile: other holds on pages end, too
_PASSED = 8  # turns of requests that do not fit, in one forward: the next one tries them again

Slices = list[tuple[LiveRequest, int]]
"""Whose prefill goes on, and up to which token."""


class Turns:
    """See the module's promises. `open` takes a request's pages; False: it can never have them, and was told so."""

    def __init__(
        self,
        engine: TransformersEngine,
        foresight: Foresight[Job],
        admission: Admission,
        open: Callable[[LiveRequest, float], bool],
    ) -> None:
        self.engine, self.foresight, self.admission, self.open = engine, foresight, admission, open
        self.counters = Counters(admission.shares.weight)
        self.waiting: FairOrder[LiveRequest] = FairOrder(self.counters)
        self.prefilling: FairOrder[LiveRequest] = FairOrder(self.counters)  # those that are being loaded are out

        self._full: set[str] = set()  # tenants for whose requests there was no room
        self._full_at = 0.0

    def add(self, request: LiveRequest) -> None:
        """It waits for admission."""
        self.admission.came(request)
        self.waiting.add(request, request.tenant, self._work(request))

    def set_shares(self, shares: Shares) -> None:
        """What each tenant may count on from now on."""
        self.admission.shares = shares
        self.counters.weight = shares.weight

    def again(self, request: LiveRequest) -> None:
        """It has had its slice, or was loaded: it waits for the next, if there is one."""
        if request.pending > 1:
            self.prefilling.reweigh(request, self._work(request))
        else:
            self.prefilling.remove(request)

    def sampled(self, request: LiveRequest) -> None:
        """A token is computed for it."""
        at = len(request.sequence.tokens)
        self.counters.charge(request.tenant, OUTPUT_WEIGHT * self.foresight.prefill_s(at - 1, at))

    def forget(self, request: LiveRequest) -> None:
        """It has ended, or never begun."""
        if request in self.waiting:
            self.waiting.remove(request)
            self.admission.gave_up(request)
            return
        self.admission.closed(request)
        self._full.clear()
        if request in self.prefilling:
            self.prefilling.remove(request)

    def choose(self, now: float) -> Slices:
        """Whose prefill goes on in the next forward, and up to where; whose first turn it is, is admitted.

        The first always gets its slice; others join while all slices together stay within a chunk.
        """
        slices: Slices = []
        passed: list[LiveRequest] = []
        room = chunk = self.engine.chunk_tokens
        if not self.admission.has_running or not 0 <= now - self._full_at < _RETRY_S:
            self._full.clear()
            self._full_at = now
        if self.admission.awaited is not None and self.admission.has_row:
            self._admit(self.admission.awaited, now)
        while room > 0 and len(passed) < _PASSED and (request := self._take()) is not None:
            if request in self.waiting:
                if not self._admit(request, now):
                    self.waiting.set_aside(request.tenant)
                    passed.append(request)
                continue
            request.sequence.adopt()
            if request.is_decoding:  # others have computed all of it meanwhile
                self.prefilling.remove(request)
                continue
            start = request.sequence.computed
            end = slice_end(start, len(request.sequence.tokens), chunk)
            if slices and end - start > room:
                passed.append(request)
                continue
            slices.append((request, end))
            room -= end - start
            self.prefilling.charge(request, self.foresight.prefill_s(start, end))
        for request in passed:
            (self.waiting if request in self.waiting else self.prefilling).put_back(request)
        self.waiting.resume()
        return slices

    # -- within ----------------------------------------------------------------------------------------
    def _take(self) -> LiveRequest | None:
        """Whose turn it is: of those that wait for admission, too, while there is a row for one."""
        orders = [self.prefilling, self.waiting] if self.admission.has_row else [self.prefilling]
        first = foremost(orders)
        if first is None:
            return None
        order, request = first
        order.hold(request)
        return request

    def _admit(self, request: LiveRequest, now: float) -> bool:
        """Let it in, or end it where it can never fit; False: there is no room for it now."""
        if request.tenant in self._full or not self.admission.may_open(request):
            return False
        try:
            is_open = self.open(request, now)
        except PoolFull:
            self.admission.refused(request, now)
            self._full.add(request.tenant)
            return False
        if not is_open:
            self.forget(request)
            return True
        self.admission.opened(request)
        if request.found is not None or not request.is_decoding:
            self.prefilling.add(request, request.tenant, self._work(request))
        if request.found is not None:
            self.prefilling.hold(request)
        self.waiting.remove(request)
        return True

    def _work(self, request: LiveRequest) -> float:
        """Seconds until its first token, as far as is known, if nobody else were there."""
        sequence, block = request.sequence, self.engine.block_tokens
        done, total = sequence.computed, len(sequence.tokens)
        if not done:
            done = min(len(self.admission.pool.match(sequence.keys)) * block, total - 1)
        held = min(request.found.blocks * block, total - 1) if request.found is not None else 0
        loading = self.foresight.rates.load_s(held - done) if held > done else None
        return (loading or 0.0) + self.foresight.prefill_s(max(done, held), total)
