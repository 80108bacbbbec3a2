"""Speculation: preloads worked off in idle time, one bounded step at a time (law 2).

Between steps a job holds nothing: its finished blocks are resident and charged as speculation, and the next
step finds them by their keys. So a live request may take any of its pages at any time, and preemption loses
at most the step under way.
"""

import logging
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from math import inf, nextafter
from typing import Any

from kvprefetch.cache.block import Block
from kvprefetch.cache.evict import Demand
from kvprefetch.cache.pool import BlockPool
from kvprefetch.cache.sequence import PagedSequence
from kvprefetch.contexts import unqualified
from kvprefetch.engines.batch import Abandoned, Row
from kvprefetch.engines.engine import TransformersEngine
from kvprefetch.engines.render import Renderer
from kvprefetch.errors import InvalidRequest, PoolError
from kvprefetch.outcomes import Outcome, Result
from kvprefetch.plan.planner import Action, Decision
from kvprefetch.plan.preloads import Preloads
from kvprefetch.plan.slices import slice_end, speculative_chunk
from kvprefetch.settings import SpeculationSettings
from kvprefetch.worker.host import Found
from kvprefetch.worker.job import Job
from kvprefetch.worker.link import Link
from kvprefetch.worker.loading import AHEAD_S, Loader

log = logging.getLogger(__name__)
Tokens = list[int]
Aside = Callable[[Callable[[], Any], Callable[["Future[Any]"], None]], None]
"""`(work, done)`: run `work` off the loop's thread, then `done` with its future on it."""


class Speculator:
    """The jobs of one loop. Used by the loop's thread alone."""

    def __init__(
        self,
        engine: TransformersEngine,
        renderer: Renderer,
        pool: BlockPool,
        preloads: Preloads[Job],
        settings: SpeculationSettings,
        aside: Aside,
        link: Link | None = None,
    ) -> None:
        self.link = link
        self.loader = Loader(link.host, preloads.foresight.rates, engine.block_tokens) if link else None
        self.engine, self.renderer, self.pool, self.preloads = engine, renderer, pool, preloads
        self.ledger, self.foresight = preloads.ledger, preloads.foresight
        self.settings, self.aside = settings, aside
        # On a CPU a forward stops at the next layer; on a GPU its kernels are queued and run on.
        self.step_s = None if engine.pool.device.type == "cpu" else settings.step_s
        self._is_rendering = False
        self._planned: tuple[Job, Decision] | None = None  # until something happens
        self.tokens_per_s: float | None = None
        preloads.changed = self._plan_anew

    def wakes_at(self, now: float) -> float:
        """When `step` will have something to do: `now`, later, or never (inf)."""
        if self._to_render() is not None:
            return now
        self._planned = self.preloads.next(now)
        if self._planned is not None:
            return now
        return min(self.foresight.planner.wakes_at, nextafter(self.preloads.next_expiry, inf))

    def step(self, clock: Callable[[], float], abandon: Callable[[], bool]) -> bool:
        """Do one bounded piece of work; False if there is none. Raises what the engine raises."""
        now = clock()
        unrendered = self._to_render()
        if unrendered is not None:
            self._render(unrendered, clock)
            return True
        chosen = self._planned or self.preloads.next(now)
        self._planned = None
        if chosen is None:
            return False
        if chosen[1].job.action is Action.LOAD:
            self._load(*chosen, clock)
        else:
            self._compute(*chosen, clock, abandon)
        self.ledger.seconds += clock() - now
        return True

    def _plan_anew(self) -> None:
        self._planned = None

    # -- within ----------------------------------------------------------------------------------------
    def _to_render(self) -> Job | None:
        """The likeliest job without tokens, of the tenant that has fewest with them: who hints often keeps nobody out.

        Messages are rendered one context at a time: a long text takes a second.
        """
        waiting = [job for job in self.preloads.jobs if job.tokens is None]
        ready = [job for job in waiting if job.context.token_ids or not self._is_rendering]
        if not ready:
            return None
        read = Counter(job.ticket.tenant for job in self.preloads.jobs if job.tokens is not None)
        return max(ready, key=lambda job: (-read[job.ticket.tenant], job.ticket.probability, job.ticket.number))

    def _render(self, job: Job, clock: Callable[[], float]) -> None:
        if job.context.token_ids:
            self._take(job, list(job.context.token_ids), clock())
            return

        def done(rendered: "Future[Tokens]") -> None:
            self._is_rendering = False
            error = rendered.exception()
            if error is not None:  # whatever it is, a hint's template must not end the worker
                if not isinstance(error, InvalidRequest):
                    log.error("a context could not be rendered", exc_info=error)
                self.preloads.end(job, Result(Outcome.FAILED, 0, str(error)), clock())
            elif job in self.preloads.jobs:  # nobody withdrew it meanwhile
                self._take(job, rendered.result(), clock())

        self._is_rendering = True
        self.aside(lambda: self.renderer.prefix(job.context), done)

    def _take(self, job: Job, tokens: Tokens, now: float) -> None:
        block = self.engine.block_tokens
        try:
            self.engine.validate(tokens)
        except InvalidRequest as error:
            self.preloads.end(job, Result(Outcome.FAILED, 0, str(error)), now)
            return
        job.tokens = tokens[: len(tokens) // block * block]  # a partial block has no key and cannot be shared
        job.size = len(job.tokens)
        sequence = PagedSequence(self.pool, job.owner, job.tokens, block)  # may borrow what the arena holds
        job.chain, job.keys = sequence.chain, sequence.keys
        self.ledger.start(job.ticket, job.chain, len(self.pool.match(job.keys)))
        self._offer(job, now)

    def _offer(self, job: Job, now: float) -> None:
        """Let the planner weigh it; it should know first how much of it lies in the node's arena."""
        link = self.link
        if link is None or not job.keys:
            self.foresight.offer(job, now)
            return

        def done(answer: "Future[int]") -> None:
            if job not in self.preloads.jobs:
                return  # somebody withdrew it meanwhile
            job.elsewhere = answer.result()
            self._planned = None
            if job.to_host and job.elsewhere >= len(job.keys):
                self.preloads.end(
                    job, Result(Outcome.ALREADY_WARM, len(job.tokens or ()), "in the arena"), link.clock()
                )
            else:
                self.foresight.offer(job, link.clock())

        ticket, session = job.ticket, unqualified(job.ticket.session)
        self.aside(lambda: link.host.peek(ticket.tenant, session, job.keys, ticket.hold_s), done)

    def _load(self, job: Job, decision: Decision, clock: Callable[[], float]) -> None:
        """Copy some of what the arena holds into the pool. Between steps no lease is held."""
        assert self.link is not None
        assert self.loader is not None
        now, host = clock(), self.link.host
        job.why = decision.because
        found = host.find(job.ticket.tenant, unqualified(job.ticket.session), job.keys, job.ticket.hold_s)
        try:
            self._load_found(job, decision, found, clock)
        except RuntimeError as error:  # what torch raises, out of memory included
            log.exception("a speculative load failed")
            self.preloads.end(
                job, Result(Outcome.FAILED, self.preloads.resident_tokens(job), f"the engine failed: {error}"), now
            )
        finally:
            host.release(found)

    def _load_found(self, job: Job, decision: Decision, found: Found, clock: Callable[[], float]) -> None:
        assert self.loader is not None
        now = clock()
        job.elsewhere = found.blocks  # where some are gone meanwhile, they are computed
        sequence = self._sequence(job)
        start = len(self.pool.match(job.keys))
        if found.blocks <= start:
            return
        end = min(found.blocks, len(job.keys)) * self.engine.block_tokens
        if not self._open(sequence, job, decision, end, now):
            return
        try:
            self.loader.step(sequence, found, clock, budget_s=AHEAD_S, speculative_until=now + job.ticket.hold_s)
            fresh = sequence.blocks[start : sequence.shared]
            self._preloaded(job, decision, fresh)
            self.foresight.loaded(job, fresh, clock() - now)
        finally:
            sequence.close()
        if found.failed is not None:
            job.elsewhere = 0

    def _preloaded(self, job: Job, decision: Decision, fresh: list[Block]) -> None:
        job.has_computed = True
        for block in fresh:
            if block.unused is not None:
                block.unused.fading = decision.job.outlook.index / max(job.ticket.hold_s, 1e-9)

    def _open(self, sequence: PagedSequence, job: Job, decision: Decision, end: int, now: float) -> bool:
        """Hold what is resident and reserve pages up to `end` tokens; False: there is no room: the job has ended."""
        found = self.pool.match(job.keys)
        demand = Demand(
            job.ticket.tenant,
            speculative=True,
            now=now,
            worth=decision.job.outlook.index,
            shared=job.owner.is_group,
        )
        try:
            sequence.open(end, demand)
        except PoolError as error:
            self.pool.extend_hold(found, now + job.ticket.hold_s, job.ticket.tenant)
            self.preloads.end(job, Result(Outcome.CLIPPED, len(found) * self.engine.block_tokens, str(error)), now)
            return False
        return True

    def _sequence(self, job: Job) -> PagedSequence:
        """A sequence for it, not open; `job.keys` say where its blocks are found now."""
        assert job.tokens is not None
        sequence = PagedSequence(self.pool, job.owner, job.tokens, self.engine.block_tokens, job.chain)
        sequence.settle(job.elsewhere)
        job.chain, job.keys = sequence.chain, sequence.keys
        return sequence

    def _compute(self, job: Job, decision: Decision, clock: Callable[[], float], abandon: Callable[[], bool]) -> None:
        now = clock()
        job.why = decision.because
        sequence = self._sequence(job)
        found = len(self.pool.match(job.keys))
        start = found * self.engine.block_tokens
        end = slice_end(start, len(sequence.tokens), self._chunk())
        if not self._open(sequence, job, decision, end, now):
            return
        try:
            if self._run(sequence, end, now + job.ticket.hold_s, abandon):
                fresh = sequence.blocks[found:]
                self._preloaded(job, decision, fresh)
                self.foresight.computed(job, fresh, start, end, clock() - now)
            else:
                self.foresight.worked(job, clock() - now)
        except RuntimeError as error:  # what torch raises, out of memory included
            log.exception("a speculative forward failed")
            self.preloads.end(job, Result(Outcome.FAILED, start, f"the engine failed: {error}"), now)
        finally:
            sequence.close()
        self._learn_rate(end - start, clock() - now)

    def _run(self, sequence: PagedSequence, end: int, until: float, abandon: Callable[[], bool]) -> bool:
        """One forward; whether it was finished."""
        start = sequence.computed
        row = Row(sequence.tokens[start:end], start, sequence.pages, sequence.written, wants_logits=False)
        try:
            self.engine.forward([row], abandon)
        except Abandoned:
            self.ledger.tokens_abandoned += end - start
            return False
        self.engine.synchronize()  # so that no more than this step is ever queued before a live request
        published = sequence.complete(end, speculative_until=until)
        if self.link is not None:
            self.link.offloader.published(published)
        self.pool.extend_hold(sequence.blocks, until, sequence.owner.tenant)
        self.ledger.tokens_computed += len(published) * self.engine.block_tokens
        return True

    def _chunk(self) -> int:
        return speculative_chunk(self.engine.chunk_tokens, self.engine.block_tokens, self.tokens_per_s, self.step_s)

    def _learn_rate(self, tokens: int, seconds: float) -> None:
        """A moving average, abandoned steps included: they err on the side of shorter steps."""
        rate = tokens / max(seconds, 1e-9)
        self.tokens_per_s = rate if self.tokens_per_s is None else 0.8 * self.tokens_per_s + 0.2 * rate
