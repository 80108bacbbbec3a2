"""Blocks of the arena go to a lower tier after they were committed, in the background.

Promises
- A block that waits is held in the arena, so at most `most` wait; what comes beyond that, or while the tier is out of
  reach, is dropped and counted: it is a cache.
- Lives on the event loop's thread; stores in the lane's. `close` waits for the batch that is under way and lets go of
  the rest.
"""

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Iterable

from kvprefetch.cache.block import Block, Hold, State
from kvprefetch.service.lane import Lane
from kvprefetch.tiers.contract import Incoming
from kvprefetch.tiers.host import HostTier
from kvprefetch.tiers.slots import SlotState

log = logging.getLogger(__name__)

_BATCH = 32  # blocks at most


class WriteBehind:
    """See the module's promises."""

    def __init__(self, host: HostTier, lane: Lane, most: int) -> None:
        self.host, self.lane, self.most = host, lane, most
        self.counters: Counter[str] = Counter()
        self._waiting: deque[Hold] = deque()
        self._task: asyncio.Task[None] | None = None
        self._is_closed = False

    def __len__(self) -> int:
        return len(self._waiting)

    def offer(self, blocks: Iterable[Block]) -> None:
        """Committed blocks: hold them, and store them as soon as may be."""
        for block in blocks:
            if not self.lane.is_open and self._waiting:  # one is enough to ask again
                self.counters["dropped_unavailable"] += 1
            elif len(self._waiting) >= self.most:
                self.counters["dropped_full"] += 1
            else:
                self._hold(block)
        if self._waiting and self._task is None and not self._is_closed:
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """Let go. Calling it again does nothing."""
        self._is_closed = True
        if self._task is not None:
            await self._task
        self._drop_all("dropped_closing")

    async def drain(self) -> None:
        """Until everything that waits now is stored or dropped."""
        while self._task is not None:
            await asyncio.shield(self._task)

    # -- within ----------------------------------------------------------------------------------------
    async def _run(self) -> None:
        try:
            while self._waiting and not self._is_closed:
                await self._store_some()
        except Exception:  # the task's outermost line
            log.exception("writing behind to the %s tier broke", self.lane.name)
            self._drop_all("dropped_broken")
        finally:
            self._task = None

    async def _store_some(self) -> None:
        size = self.lane.store_pace.batch(self.host.block_bytes, _BATCH)
        batch = [self._waiting.popleft() for _ in range(min(size, len(self._waiting)))]
        try:
            incoming = [block for hold in batch if (block := self._incoming(hold.blocks[0])) is not None]
            stored = await self.lane.store(incoming)
            self.counters["stored"] += stored
            self.counters["refused"] += len(incoming) - stored
        finally:
            for hold in batch:
                self._let_go(hold)
        if not self.lane.is_open:
            self._drop_all("dropped_unavailable")

    def _incoming(self, block: Block) -> Incoming | None:
        header = self.host.arena.header(block.page)
        if block.state is not State.RESIDENT or header is None or header.state is not SlotState.SEALED:
            self.counters["dropped_damaged"] += 1
            return None
        until = block.hold_until if block.speculative else None
        data = self.host.arena.slot(block.page)
        return Incoming(block.key, header.parent, block.tenant, data, header.checksum, until)

    def _hold(self, block: Block) -> None:
        hold = Hold([block])
        self.host.pool.hold(hold.blocks)
        self.host.pool.holders.add(hold)
        self._waiting.append(hold)

    def _let_go(self, hold: Hold) -> None:
        self.host.pool.holders.discard(hold)
        self.host.pool.release(hold.blocks)

    def _drop_all(self, why: str) -> None:
        self.counters[why] += len(self._waiting)
        while self._waiting:
            self._let_go(self._waiting.popleft())
