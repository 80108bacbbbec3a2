"""Live requests: admit, pack prefill slices and decode rows into one forward, sample, finish.

Admission is all-or-nothing: a request starts when every page it may ever need is reserved, so an admitted
request never waits for another and cannot be thrown out half-way. Prefill slices take turns, so a short
prompt waits for one slice of a long one; a waiting sequence keeps its references. What the node's arena holds of a
prompt is loaded before the rest is computed, a few milliseconds of copying at a time.
"""

from collections import deque
from collections.abc import Callable

import torch

from kvprefetch.cache.evict import Demand
from kvprefetch.cache.misses import explain
from kvprefetch.cache.pool import BlockPool
from kvprefetch.engines.batch import Row
from kvprefetch.engines.engine import TransformersEngine
from kvprefetch.errors import PoolFull, PoolTooSmall
from kvprefetch.outcomes import MissReason
from kvprefetch.plan.foresight import Foresight, turn_kind
from kvprefetch.plan.ledger import Ledger
from kvprefetch.plan.slices import prefill_slices
from kvprefetch.worker.job import Job
from kvprefetch.worker.link import Link
from kvprefetch.worker.loading import ALONE_S, BESIDE_S, Loader
from kvprefetch.worker.request import FinishReason, LiveRequest

Finished = Callable[[LiveRequest], None]


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
    ) -> None:
        self.engine, self.pool, self.ledger, self.foresight, self.finished = engine, pool, ledger, foresight, finished
        self.link = link
        self.loader = Loader(link.host, foresight.rates, engine.block_tokens) if link else None
        self.waiting: deque[LiveRequest] = deque()
        self.active: list[LiveRequest] = []
        self._fresh: list[LiveRequest] = []  # admitted, of which the predictor has not heard yet

    def __bool__(self) -> bool:
        return bool(self.waiting or self.active)

    def step(self, now: Callable[[], float], abandon: Callable[[], bool]) -> None:
        """One forward for whoever is ready. Raises what the engine raises; nothing is published then."""
        self._drop_cancelled(now())
        self._admit(now())
        self._load(now)
        chosen = self._rows(now())
        if not chosen:
            return
        began = now()
        logits = self.engine.forward([row for _, row in chosen], abandon)
        wanting = [request for request, row in chosen if row.wants_logits]
        for request, row in chosen:
            published = request.sequence.complete(row.end)
            if self.link is not None:
                self.link.offloader.published(published)
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
        for request in (*failed, *self.waiting):  # first, so that nobody waits for ever whatever follows
            request.stream.put_end(error)
        for request in (*failed, *self.waiting):
            self._end_load(request)
        self.waiting.clear()
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

    def _admit(self, now: float) -> None:
        while self.waiting and len(self.active) < self.engine.max_rows:
            request = self.waiting[0]
            try:
                self._open(request, now)
            except PoolFull:
                return
            except PoolTooSmall as error:
                self._end_load(request)
                request.stream.put_end(error)
            else:
                self.active.append(request)
            self.waiting.popleft()

    def _open(self, request: LiveRequest, now: float) -> None:
        sequence, block = request.sequence, self.engine.block_tokens
        hits = len(self.pool.match(sequence.keys))
        found = request.found
        lookup = explain(
            self.pool,
            sequence.keys,
            hits,
            block,
            elsewhere=found.blocks if found else 0,
            failed=found.failed if found else None,
        )
        capacity = len(request.prompt) + request.max_new - 1  # the last sampled token needs no KV
        sequence.open(capacity, Demand(request.tenant, speculative=False, now=now))
        self.ledger.note_lookup(sequence.keys, lookup, block)
        self._fresh.append(request)
        request.stream.reused_tokens = sequence.computed
        self._count_use(request, now)

    def _load(self, now: Callable[[], float]) -> None:
        """Copy what the arena holds into the pages of those who were admitted, for a bounded time."""
        if self.loader is None:
            return
        loading = [request for request in self.active if request.found is not None]
        others = len(loading) < len(self.active)
        for request in loading:
            request.sequence.adopt()
            found = request.found
            assert found is not None
            before = request.sequence.shared
            if self.loader.step(request.sequence, found, now, budget_s=BESIDE_S if others else ALONE_S):
                lost = found.blocks - request.sequence.shared
                if lost > 0:
                    self.ledger.note_not_loaded(lost, found.failed or MissReason.TIMED_OUT)
                self._end_load(request)
            request.stream.loaded_tokens += (request.sequence.shared - before) * self.engine.block_tokens
            self._count_use(request, now())

    def _end_load(self, request: LiveRequest) -> None:
        found, request.found = request.found, None
        if found is not None and self.link is not None:
            self.link.host.release(found)

    def _count_use(self, request: LiveRequest, now: float) -> None:
        """Shared blocks that this request has come to hold are used from now on."""
        fresh = request.sequence.blocks[request.counted_shared : request.sequence.shared]
        self.foresight.used(fresh)
        self.ledger.tokens_used += self.pool.touch(fresh, now, request.session) * self.engine.block_tokens
        request.counted_shared = request.sequence.shared

    def _rows(self, now: float) -> list[tuple[LiveRequest, Row]]:
        chosen: list[tuple[LiveRequest, Row]] = []
        prefilling = []
        for request in self.active:
            if request.found is not None:
                continue  # it is being loaded
            if not request.is_decoding:
                request.sequence.adopt()  # somebody else may have computed the same blocks meanwhile
                self._count_use(request, now)
            if request.is_decoding:
                chosen.append((request, _row(request, len(request.sequence.tokens))))
            else:
                prefilling.append(request)
        extents = [(r.sequence.computed, len(r.sequence.tokens)) for r in prefilling]
        slices = prefill_slices(extents, self.engine.chunk_tokens)
        served = [prefilling[piece.index] for piece in slices]
        chosen += [(request, _row(request, piece.end)) for request, piece in zip(served, slices, strict=True)]
        self._rotate(served)
        return chosen

    def _rotate(self, served: list[LiveRequest]) -> None:
        """Those who had a prefill slice go to the end of the line."""
        self.active = [r for r in self.active if r not in served] + served

    def _draw(self, wanting: list[LiveRequest], logits: torch.Tensor) -> list[int]:
        greedy: list[int] = logits.argmax(dim=-1).tolist() if wanting else []
        return [
            greedy[i] if request.sampler.greedy else request.sampler.draw(logits[i])
            for i, request in enumerate(wanting)
        ]

    def _finish(self, request: LiveRequest, reason: FinishReason, now: float) -> None:
        self._tell(now)
        was_active = request in self.active
        (self.active if was_active else self.waiting).remove(request)
        self._end_load(request)
        self._count_use(request, now)
        self.pool.touch(request.sequence.blocks[: request.sequence.shared], now, request.session)
        request.sequence.close()
        if was_active:
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
            self.foresight.requested(request.session, request.tenant, request.sequence.keys, now)

    def _turn_ended(self, request: LiveRequest, kind: str, now: float) -> None:
        keys = request.sequence.keys
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
