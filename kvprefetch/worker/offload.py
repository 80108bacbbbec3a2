"""Writes what this worker computed into its node's arena, so that others find it and an eviction here loses nothing.

Written behind: blocks are queued when they are published and copied soon after by a thread of its own, whole runs at a
time, in idle time at full speed and beside live requests for a tenth of the time. So evicting a page costs nothing.

Promises
- `published` and `pump` are for the loop's thread and never block. Blocks under way are held, so their pages
  cannot be evicted; all holds end with `close`.
- The thread stops writing to a slot before it gives its reservation back or registers again.
- Out of reach, blocks wait in the queue, the oldest are dropped where it is full, and all are counted.
"""

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from math import inf

import torch

from kvprefetch.cache.block import Block, State
from kvprefetch.cache.keys import BlockKey
from kvprefetch.cache.pool import BlockPool
from kvprefetch.client.remote import TAKEN, CacheClient, CallRefused
from kvprefetch.contexts import unqualified
from kvprefetch.errors import Closed, ServiceUnavailable
from kvprefetch.tiers.arena import ArenaFile
from kvprefetch.worker.host import Host, page_bytes

log = logging.getLogger(__name__)
_RUN = 32  # blocks of one reservation, at most
_QUEUED = 65_536
_TIMEOUT_S = 1.0  # of a call: nobody waits for it
_SHARE = 0.1  # of the time, beside live requests
_LONGEST_REST_S = 1.0  # where a run took long because something stood still
_RETRY_S = 0.25  # after a refusal


@dataclass(frozen=True)
class Run:
    """Blocks that follow each other, as the thread sees them."""

    tenant: str
    session: str
    parent: BlockKey
    keys: Sequence[BlockKey]
    pages: Sequence[int]
    speculative_s: float | None
    ready: Callable[[], None]  # returns once the device has written the pages


@dataclass(eq=False)
class _Held:
    """The hold on a run's blocks."""

    blocks: list[Block] = field(default_factory=list)


class Offloader:
    """See the module's promises. `post` runs something on the loop's thread; it raises Closed."""

    def __init__(
        self,
        pool: BlockPool,
        host: Host,
        client: CacheClient,
        clock: Callable[[], float],
        post: Callable[[Callable[[], None]], None],
        is_live: Callable[[], bool],
    ) -> None:
        self.pool, self.host, self.client, self.clock = pool, host, client, clock
        self.post, self.is_live = post, is_live
        self.counts: Counter[str] = Counter()
        self._queue: deque[tuple[Block, BlockKey]] = deque()
        self._is_busy = False
        self._rests_until = 0.0
        self._stream: torch.cuda.Stream | None = None
        self._thread = ThreadPoolExecutor(1, "kvprefetch-offload")
        self._closing = threading.Event()
        self.writing = threading.Lock()  # held while slots are reserved and written

    # -- the loop's thread -----------------------------------------------------------------------------
    def published(self, blocks: Iterable[Block]) -> None:
        """These were computed here; they are to be written to the arena."""
        for block in blocks:
            self._queue.append((block, block.key))
        while len(self._queue) > _QUEUED:
            self._queue.popleft()
            self.counts["dropped"] += 1

    def resume(self, *, refill: bool) -> None:
        """The service is there. `refill`: its arena may have lost what was written before. For any thread."""
        with suppress(Closed):
            self.post(self._requeue if refill else lambda: None)

    def _requeue(self) -> None:
        queued = {key for _, key in self._queue}
        missing = [block for run in self.pool.sequences() for block in run if block.key not in queued]
        self._queue.extendleft((block, block.key) for block in reversed(missing))

    def wakes_at(self) -> float:
        """When `pump` will have something to do; inf: when something is published or done."""
        return self._rests_until if self._queue and not self._is_busy and self.host.arena is not None else inf

    def pump(self, now: float) -> None:
        """Hand the next run to the thread, if it is time."""
        arena = self.host.arena
        if self._is_busy or not self._queue or arena is None or now < self._rests_until or self._closing.is_set():
            return
        held = self._take(now)
        if not held.blocks:
            return
        run = self._run_of(held.blocks, now)
        self.pool.hold(held.blocks)
        self.pool.holders.add(held)
        self._is_busy = True
        self._thread.submit(self._write, arena, run, held, now)

    @property
    def queued(self) -> int:
        """Blocks that wait to be written."""
        return len(self._queue)

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits and nothing is under way."""
        return not self._queue and not self._is_busy

    def close(self) -> None:
        """Wait for the run under way. Call it when the loop runs nothing any more, which then drops the hold."""
        self._closing.set()
        self._thread.shutdown(wait=True, cancel_futures=True)

    # -- within, on the loop's thread ------------------------------------------------------------------
    def _take(self, now: float) -> _Held:
        """The next blocks of one sequence; those that are gone meanwhile are counted as lost."""
        held = _Held()
        while self._queue and len(held.blocks) < _RUN:
            block, key = self._queue[0]
            if block.state is not State.RESIDENT or self.pool.resident.get(key) is not block:
                self._queue.popleft()
                self.counts["evicted_before"] += 1
                continue
            if held.blocks and (block.parent is not held.blocks[-1] or block.tenant != held.blocks[0].tenant):
                break
            if held.blocks and block.speculative != held.blocks[0].speculative:
                break
            self._queue.popleft()
            held.blocks.append(block)
        return held

    def _run_of(self, blocks: list[Block], now: float) -> Run:
        first = blocks[0]
        hold_s = max(min(block.hold_until for block in blocks) - now, 0.0)
        return Run(
            tenant=first.tenant,
            session=unqualified(first.session),
            parent=first.parent.key if first.parent else b"",
            keys=[block.key for block in blocks],
            pages=[block.page for block in blocks],
            speculative_s=hold_s if first.speculative else None,
            ready=self._readiness(),
        )

    def _readiness(self) -> Callable[[], None]:
        if self.host.pool.device.type == "cpu":
            return lambda: None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.host.pool.device))
        return event.synchronize

    def _done(self, held: _Held, counts: Counter[str] | None, seconds: float) -> None:
        """`counts` of what became of the blocks; None: the service is out of reach."""
        self._is_busy = False
        self.pool.release(reversed(held.blocks))
        self.pool.holders.discard(held)
        if counts is None:  # later, then
            self._queue.extendleft((block, block.key) for block in reversed(held.blocks))
            self._rests_until = self.clock() + _RETRY_S
            return
        self.counts.update(counts)
        rest_s = min(seconds * (1 / _SHARE - 1), _LONGEST_REST_S) if self.is_live() else 0.0
        self._rests_until = self.clock() + rest_s

    # -- the offloading thread -------------------------------------------------------------------------
    def _write(self, arena: ArenaFile, run: Run, held: _Held, began: float) -> None:
        counts: Counter[str] | None = Counter(failed=len(run.keys))
        try:
            counts = self._write_run(arena, run)
        except CallRefused as error:
            log.warning("blocks are not written to the arena: %s", error)
            counts = Counter(refused=len(run.keys))
        except (ServiceUnavailable, Closed):
            counts = None
        except Exception:  # the thread's outermost line
            log.exception("blocks could not be written to the arena")
        finally:
            self._hand_back(held, counts, self.clock() - began)

    def _write_run(self, arena: ArenaFile, run: Run) -> Counter[str]:
        with self.writing:  # who registers, waits
            if self.host.arena is not arena:
                raise ServiceUnavailable("the arena was replaced")
            return self._write_slots(arena, run)

    def _write_slots(self, arena: ArenaFile, run: Run) -> Counter[str]:
        reserved = self.client.reserve(run.tenant, run.session, run.parent, run.keys, run.speculative_s, _TIMEOUT_S)
        checksums = []
        try:
            run.ready()
            for slot, page in zip(reserved.slots, run.pages, strict=False):
                if slot != TAKEN:
                    checksums.append(arena.write(slot, self._bytes(page)))
            if reserved.number:
                self.client.commit(reserved.number, checksums, _TIMEOUT_S)
        except BaseException:
            self.client.unwanted(reservation=reserved.number)  # committed all the same, that number means nothing
            raise
        taken = len(reserved.slots) - len(checksums)
        return Counter(written=len(checksums), present=taken, full=len(run.keys) - len(reserved.slots))

    def _bytes(self, page: int) -> memoryview:
        if self.host.pool.device.type == "cpu":
            return self.host.page(page)
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.host.pool.device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            return page_bytes(self.host.pool.tensor[page].cpu())

    def _hand_back(self, held: _Held, counts: Counter[str] | None, seconds: float) -> None:
        try:
            self.post(lambda: self._done(held, counts, seconds))
        except Closed:  # the loop is over: nobody else touches the pool any more
            self._done(held, counts, seconds)
