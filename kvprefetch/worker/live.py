"""Live requests: admit, pack prefill slices and decode rows into one forward, sample, finish.

Who has had least service goes first, by weight, and of its requests the one with least left (`plan.order`): a short
prompt waits for one slice of a long one, of whichever tenant. A request is let in when its turn has come for a slice
(`worker.admission` says who may be). Admission is all-or-nothing: every page that it may ever need is reserved, so an
admitted request never waits for another and cannot be thrown out half-way; one that waits keeps its references. What
the node's arena holds of a prompt is loaded before the rest is computed, a few milliseconds of copying at a time.
"""

from collections.abc import Callable
from heapq import nsmallest

import torch

from kvprefetch.cache.evict import Demand
from kvprefetch.cache.misses import explain
from kvprefetch.cache.pool import BlockPool
from kvprefetch.cache.shares import Shares
from kvprefetch.engines.batch import Row
from kvprefetch.engines.engine import TransformersEngine
from kvprefetch.errors import PoolTooSmall
from kvprefetch.outcomes import MissReason
from kvprefetch.plan.foresight import Foresight, turn_kind
from kvprefetch.plan.ledger import Ledger
from kvprefetch.worker.admission import Admission
from kvprefetch.worker.job import Job
from kvprefetch.worker.link import Link
from kvprefetch.worker.loading import ALONE_S, BESIDE_S, Loader
from kvprefetch.worker.request import FinishReason, LiveRequest
from kvprefetch.worker.turns import Slices, Turns

Finished = Callable[[LiveRequest], None]
_LOADS = 4  # requests that are loaded between two forwards


class LiveQueue:
    """The requests of one loop. Used by the loop's thread alone."""

    def __init__(
        self,
        engine: TransformersEngine,
        pool: BlockPool,
        ledger: Ledger,
        foresight: Foresight[Job],
        finished: Finished,
        link: Link | None = None,
        shares: Shares | None = None,
    ) -> None:
        self.engine, self.pool, self.ledger, self.foresight, self.finished = engine, pool, ledger, foresight, finished
        self.link = link
        self.loader = Loader(link.host, foresight.rates, engine.block_tokens) if link else None
        self.turns = Turns(engine, foresight, Admission(pool, engine.max_rows, shares or Shares()), self._open)
        self.waiting = self.turns.waiting  # not admitted yet
        self.active: list[LiveRequest] = []  # admitted
        self._fresh: list[LiveRequest] = []  # admitted, of which the predictor has not heard yet

    def __bool__(self) -> bool:
        return bool(self.waiting or self.active)

    def add(self, request: LiveRequest) -> None:
        """It waits from now on."""
        self.turns.add(request)

    def step(self, now: Callable[[], float], abandon: Callable[[], bool]) -> None:
        """One forward for whoever is ready. Raises what the engine raises; nothing is published then."""
        self._drop_cancelled(now())
        slices = self.turns.choose(now())
        self._load(now)
        chosen = self._rows(slices, now())
        if not chosen:
            return
        began = now()
        try:
            logits = self.engine.forward([row for _, row in chosen], abandon)
            self._complete(chosen)
        finally:
            for request, _ in slices:
                self.turns.again(request)
        wanting = [request for request, row in chosen if row.wants_logits]
        tokens = self._draw(wanting, logits)
        # on a GPU a slice's kernels may still run: there the planner learns from speculation, which waits for them
        if self.engine.pool.device.type == "cpu" and len(chosen) == 1 and len(chosen[0][1].tokens) > 1:
            self.foresight.rates.computed(chosen[0][1].start, chosen[0][1].end, now() - began)
        reasons = [request.accept(token, now()) for request, token in zip(wanting, tokens, strict=True)]
        self._tell(now())
        for request, reason in zip(wanting, reasons, strict=True):
            if reason is not None:
                self._finish(request, reason, now())

    def fail_all(self, error: BaseException, now: float) -> None:
        """The engine broke: end every request with `error`; pages that it may still write are quarantined."""
        failed, self.active = self.active, []
        waiting = list(self.waiting)
        for request in (*failed, *waiting):  # first, so that nobody waits for ever whatever follows
            request.stream.put_end(error)
        for request in (*failed, *waiting):
            self._end_load(request)
            self.turns.forget(request)
        doubtful = [block for request in failed for block in request.sequence.close(quarantine=True)]
        self._tell(now)
        for request in failed:
            self._turn_ended(request, "failed", now)
        if doubtful:
            self.engine.synchronize()
        for block in doubtful:
            self.pool.readmit(block)

    # -- within ----------------------------------------------------------------------------------------
    def _drop_cancelled(self, now: float) -> None:
        for request in [r for r in (*self.active, *self.waiting) if r.cancelled]:
            self._finish(request, FinishReason.CANCELLED, now)

    def _open(self, request: LiveRequest, now: float) -> bool:
        """Admit it; False: it can never fit, and has ended. Raises PoolFull."""
        sequence, block = request.sequence, self.engine.block_tokens
        found = request.found
        sequence.settle(found.blocks if found else 0)
        hits = len(self.pool.match(sequence.keys))
        lookup = explain(
            self.pool,
            sequence.keys,
            hits,
            block,
            elsewhere=found.blocks if found else 0,
            failed=found.failed if found else None,
            borrowed=sequence.borrowed,
        )
        try:
            patient = self.turns.admission.is_patient(request)
            demand = Demand(request.tenant, speculative=False, now=now, patient=patient, shared=sequence.owner.is_group)
            sequence.open(request.capacity, demand)
        except PoolTooSmall as error:
            self._end_load(request)
            request.stream.put_end(error)
            return False
        self.ledger.note_lookup(sequence.chain, lookup, block)
        self.ledger.note_use(sequence.keys[: sequence.borrowed], lookup, block)
        self.active.append(request)
        self._fresh.append(request)
        request.stream.reused_tokens = sequence.computed
        self._count_use(request, now)
        return True

    def _load(self, now: Callable[[], float]) -> None:
        """Copy what the arena holds into the pages of those who were admitted, for a bounded time."""
        if self.loader is None:
            return
        loading = [request for request in self.active if request.found is not None]
        others = len(loading) < len(self.active)
        for request in nsmallest(_LOADS, loading, key=lambda r: self.turns.counters.level(r.tenant)):
            began = now()
            request.sequence.adopt()
            found = request.found
            assert found is not None
            before = request.sequence.shared
            if self.loader.step(request.sequence, found, now, budget_s=BESIDE_S if others else ALONE_S):
                lost = found.blocks - request.sequence.shared
                if lost > 0:
                    self.ledger.note_not_loaded(lost, found.failed or MissReason.TIMED_OUT)
                self._end_load(request)
                self.turns.again(request)
            request.stream.loaded_tokens += (request.sequence.shared - before) * self.engine.block_tokens
            self._count_use(request, now())
            self.turns.counters.charge(request.tenant, now() - began)

    def _end_load(self, request: LiveRequest) -> None:
        found, request.found = request.found, None
        if found is not None and self.link is not None:
            self.link.host.release(found)

    def _count_use(self, request: LiveRequest, now: float) -> None:
        """Shared blocks that this request has come to hold are used from now on."""
        fresh = request.sequence.blocks[request.counted_shared : request.sequence.shared]
        self.foresight.used(fresh)
        first_used = self.pool.touch(fresh, now, request.session, request.tenant)
        self.ledger.tokens_used += first_used * self.engine.block_tokens
        request.counted_shared = request.sequence.shared

    def _rows(self, slices: Slices, now: float) -> list[tuple[LiveRequest, Row]]:
        """All who decode, and these slices."""
        decoding = [request for request in self.active if request.found is None and request.is_decoding]
        for request in decoding:
            self.turns.sampled(request)
        chosen = [(request, _row(request, len(request.sequence.tokens))) for request in decoding]
        chosen += [(request, _row(request, end)) for request, end in slices]
        for request, _ in chosen:
            if request.timing.first_token is None:  # it may have adopted what others computed
                self._count_use(request, now)
        return chosen

    def _complete(self, chosen: list[tuple[LiveRequest, Row]]) -> None:
        for request, row in chosen:
            published = request.sequence.complete(row.end)
            if self.link is not None:
                self.link.offloader.published(published)

    def _draw(self, wanting: list[LiveRequest], logits: torch.Tensor) -> list[int]:
        greedy: list[int] = logits.argmax(dim=-1).tolist() if wanting else []
        return [
            greedy[i] if request.sampler.greedy else request.sampler.draw(logits[i])
            for i, request in enumerate(wanting)
        ]

    def _finish(self, request: LiveRequest, reason: FinishReason, now: float) -> None:
        self._tell(now)
        was_active = request not in self.waiting
        self._end_load(request)
        self._count_use(request, now)
        self.pool.touch(request.sequence.blocks[: request.sequence.shared], now, request.session, request.tenant)
        request.sequence.close()
        self.turns.forget(request)
        if was_active:
            self.active.remove(request)
            tools = request.context.tools if request.context else ()
            self._turn_ended(request, turn_kind(reason.value, request.stream.text, tools), now)
        request.timing.finished = now
        stream = request.stream
        rest = request.text.flush()
        if rest:
            stream.put_text(rest)
        stream.finish_reason = reason
        try:
            self.finished(request)
        finally:
            stream.put_end()  # whatever happens, its reader must not wait for ever

    def _tell(self, now: float) -> None:
        """Let the predictor hear of the admitted: after their first forward, as no first token waits for it then."""
        fresh, self._fresh = self._fresh, []
        for request in fresh:
            keys, borrowed = request.sequence.chain, request.sequence.keys[: request.sequence.borrowed]
            self.foresight.requested(request.session, request.tenant, keys, now, borrowed)

    def _turn_ended(self, request: LiveRequest, kind: str, now: float) -> None:
        keys = request.sequence.chain
        self.foresight.turn_ended(request.session, request.tenant, kind, len(request.prompt), keys, now)


def _row(request: LiveRequest, end: int) -> Row:
    sequence = request.sequence
    return Row(
        tokens=sequence.tokens[sequence.computed : end],
        start=sequence.computed,
        pages=sequence.pages,
        written=sequence.written,
        wants_logits=end == len(sequence.tokens),
    )
