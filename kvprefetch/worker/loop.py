"""The worker's loop: one thread owns the engine, the pool and the books; everybody else sends it messages.

Promises
- Live first (law 2): speculation runs only while no live request is there or announced, and gives up its
  step as soon as one is.
- `submit`, `post` and `announce` never block on device work and may be called from any thread.
- After `close` nothing is held: every request has ended, every prefetch has its outcome.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from math import inf
from typing import TypeVar

from kvprefetch.cache.block import Block
from kvprefetch.cache.commons import Commons
from kvprefetch.cache.pool import BlockPool
from kvprefetch.cache.shares import Shares, shares_of
from kvprefetch.engines.batch import Abandoned
from kvprefetch.engines.engine import TransformersEngine
from kvprefetch.engines.render import Renderer
from kvprefetch.errors import Closed, WorkerFailed
from kvprefetch.plan.foresight import Foresight
from kvprefetch.plan.ledger import Ledger
from kvprefetch.plan.preloads import Preloads
from kvprefetch.settings import Settings
from kvprefetch.worker.job import Job
from kvprefetch.worker.link import Link
from kvprefetch.worker.live import Finished, LiveQueue
from kvprefetch.worker.request import LiveRequest
from kvprefetch.worker.speculation import Speculator

log = logging.getLogger(__name__)
T = TypeVar("T")
Clock = Callable[[], float]
_METERED_S = 1.0  # between two looks at who has how much speculation in the pool


class Worker:
    """See the module's promises. `finished` is called on the loop's thread when a live request has ended."""

    def __init__(
        self,
        engine: TransformersEngine,
        settings: Settings,
        clock: Clock,
        finished: Finished,
        link: Link | None = None,
    ) -> None:
        self.engine, self.clock, self.link = engine, clock, link
        self.pool = BlockPool(
            engine.pool.pages, evicted_memory=settings.pool.evicted_memory, claim_s=settings.fairness.claim_s
        )
        self.commons = Commons()
        self.foresight: Foresight[Job] = Foresight(
            self.pool, engine.block_tokens, settings.speculation, page_bytes=engine.shape.bytes
        )
        self.pool.on_evict = self._note_evicted
        self.ledger = Ledger()
        self.renderer = Renderer(engine.loaded.tokenizer)
        if link is not None:
            link.open(self.pool, self.post, lambda: bool(self.live) or self._announced > 0)
        self.live = LiveQueue(engine, self.pool, self.ledger, self.foresight, finished, link)
        self.live.turns.counters.credit = settings.fairness.credit_s
        self._take_shares(shares_of(settings))
        self.preloads = Preloads(self.ledger, self.foresight, settings.speculation, engine.block_tokens)
        self.speculator = Speculator(
            engine, self.renderer, self.pool, self.preloads, settings.speculation, self._aside, link
        )
        self._helper = ThreadPoolExecutor(1, "kvprefetch-render")
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._announced = 0  # live requests on their way
        self._closing = False
        self._metered_at = -inf
        self._thread = threading.Thread(target=self._run, name="kvprefetch-worker", daemon=True)
        self._thread.start()

    # -- for any thread --------------------------------------------------------------------------------
    @contextmanager
    def announce(self) -> Iterator[None]:
        """A live request is being prepared: speculation makes way already now."""
        with self._wake:
            self._announced += 1
        try:
            yield
        finally:
            with self._wake:
                self._announced -= 1
                self._wake.notify()

    def submit(self, request: LiveRequest) -> None:
        """Hand over a live request. Raises Closed."""

        def arrive() -> None:
            with self._wake:
                self._announced -= 1
            self.live.add(request)

        with self._wake:
            self._post(arrive)
            self._announced += 1

    def post(self, action: Callable[[], None]) -> None:
        """Run `action` on the loop's thread before its next step. Raises Closed."""
        with self._wake:
            self._post(action)

    def set_shares(self, shares: Shares) -> None:
        """What each tenant may count on from the next step on: in the pool, in live order and in idle time.

        Raises Closed.
        """
        self.post(lambda: self._take_shares(shares))

    def call(self, action: Callable[[], T]) -> T:
        """Run `action` on the loop's thread and wait for its result; blocks for at most one step.

        After `close` it runs here.
        """
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(action())
            except BaseException as error:  # noqa: BLE001 - it is the caller's, and raised there
                future.set_exception(error)

        try:
            self.post(run)
        except Closed:
            self._thread.join()
            return action()  # nobody else touches the loop's data any more
        return future.result()

    def close(self) -> None:
        """End everything and wait for the thread. Calling it again does nothing."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def forget_all(self) -> None:
        """On the loop's thread: nothing that is cached is to be found any more."""
        self.pool.clear()
        self.commons.clear()

    def _post(self, action: Callable[[], None]) -> None:
        if self._closing:
            raise Closed("the worker is closed")
        self._inbox.append(action)
        self._wake.notify()

    # -- the loop's thread -----------------------------------------------------------------------------
    def _run(self) -> None:
        try:
            while self._next_round():
                self._step()
        except Exception as error:  # the thread's outermost line
            log.exception("the worker's loop broke")
            self._shut_down(WorkerFailed(f"the worker's loop broke: {error}"))
        else:
            self._shut_down(Closed("the worker was closed"))

    def _next_round(self) -> bool:
        """Run what was posted; wait if there is nothing else to do. False: closing."""
        busy = self._inbox or self._closing or self.live
        pause = 0.0 if busy else self._pause_s()
        with self._wake:
            if not (self._inbox or self._closing or self.live) and pause != 0:
                self._wake.wait(pause)
            if self._closing:
                return False
        self._run_posted()
        return True

    def _run_posted(self) -> None:
        for _ in range(len(self._inbox)):  # what comes meanwhile waits for the next round
            self._inbox.popleft()()

    def _pause_s(self) -> float | None:
        """How long speculation has nothing to do; None: until something happens."""
        if self._announced:
            return None
        now = self.clock()
        wakes_at = self.speculator.wakes_at(now)
        if self.link is not None:
            wakes_at = min(wakes_at, self.link.offloader.wakes_at())
        return None if wakes_at == inf else max(wakes_at - now, 0.0)

    def _aside(self, work: Callable[[], list[int]], done: Callable[[Future[list[int]]], None]) -> None:
        """Run `work` on the helper thread, then `done` on the loop's; neither, once closing."""

        def post(future: Future[list[int]]) -> None:
            with suppress(Closed):
                self.post(lambda: done(future))

        self._helper.submit(work).add_done_callback(post)

    def _step(self) -> None:
        now = self.clock()
        self.ledger.expire_holds(now)
        self.preloads.expire(now)
        if now >= self._metered_at + _METERED_S or now < self._metered_at:
            self._metered_at = now
            self.foresight.occupied(now)
        if self.link is not None:
            self.link.offloader.pump(now)
        try:
            if self.live:
                self.live.step(self.clock, self._is_closing)
            elif not self._announced:
                self.speculator.step(self.clock, self._is_urgent)
        except Abandoned:
            pass  # closing
        except RuntimeError as error:  # what torch raises, out of memory included: ends the requests, not the worker
            log.exception("a live forward failed")
            failure = WorkerFailed(f"the engine failed: {error}")
            failure.__cause__ = error
            self.live.fail_all(failure, now)

    def _take_shares(self, shares: Shares) -> None:
        self.shares = shares
        self.live.turns.set_shares(shares)
        self.foresight.set_shares(shares)
        self.pool.shares = shares

    def _is_closing(self) -> bool:
        return self._closing

    def _is_urgent(self) -> bool:
        """Whether speculation must make way: a live request is announced or waits in the inbox."""
        return self._announced > 0 or self._closing

    def _note_evicted(self, block: Block, rule: str) -> None:
        self.ledger.note_evicted(block.key)
        if self.link is None:
            self.commons.forget([block.key])  # else it may lie in the arena

    def _shut_down(self, error: Exception) -> None:
        with self._wake:
            self._closing = True
        self._helper.shutdown(wait=False, cancel_futures=True)
        while self._inbox:  # what was posted still happens, so that nobody waits for ever
            try:
                self._run_posted()
            except Exception:  # the thread's outermost line, once more
                log.exception("a posted action broke while closing")
        self.live.fail_all(error, self.clock())
        self.preloads.withdraw(lambda job: True, "the worker was closed", self.clock())
