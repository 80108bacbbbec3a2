"""Blocks of the arena go to a lower tier after they were committed, in the background.

Promises
- A block that waits is held in the arena, as long as no more than `most_held` are; the others that wait, `most` in all,
  may be evicted before their turn. What is lost so, or comes while the tier is out of reach, is counted: it is a cache.
- A batch is of one tenant, and used or preloaded: whom the tier refuses something, that costs nobody else.
- Lives on the event loop's thread; stores in the lane's. `close` waits for the batch that is under way and lets go of
  the rest.
"""

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Iterable
from itertools import takewhile

from kvprefetch.cache.block import Block, Hold
from kvprefetch.service.lane import Lane
from kvprefetch.tiers.contract import Incoming
from kvprefetch.tiers.host import HostTier
from kvprefetch.tiers.slots import SlotState

log = logging.getLogger(__name__)

_BATCH = 32  # blocks at most


class WriteBehind:
    """See the module's promises."""

    def __init__(self, host: HostTier, lane: Lane, most: int, most_held: int) -> None:
        self.host, self.lane, self.most, self.most_held = host, lane, most, most_held
        self.counters: Counter[str] = Counter()
        self._waiting: deque[Block] = deque()
        self._hold = Hold()  # the oldest that wait, in their order
        host.pool.holders.add(self._hold)
        self._task: asyncio.Task[None] | None = None
        self._is_closed = False

    def __len__(self) -> int:
        return len(self._waiting)

    def offer(self, blocks: Iterable[Block]) -> None:
        """Committed blocks: store them as soon as may be."""
        for block in blocks:
            if len(self._waiting) >= self.most:
                self.counters["dropped_full"] += 1
            else:
                self._waiting.append(block)
        self._hold_some()
        if self._waiting and self._task is None and not self._is_closed:
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def drain(self) -> None:
        """Until everything that waits now is stored or dropped."""
        while self._task is not None:
            await asyncio.wait({self._task})

    async def close(self) -> None:
        """Let go. Calling it again does nothing."""
        self._is_closed = True
        await self.drain()
        self._drop_all("dropped_closing")

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
        size = min(self.lane.store_pace.batch(self.host.block_bytes, _BATCH), len(self._hold.blocks))
        held = self._hold.blocks[:size]
        batch = list(takewhile(lambda block: _kind(block) == _kind(held[0]), held))
        incoming = [each for block in batch if (each := self._incoming(block)) is not None]
        stored = await self.lane.store(incoming) if incoming else 0
        self.counters["stored"] += stored
        self.counters["refused"] += len(incoming) - stored
        self._let_go(len(batch))
        self._hold_some()
        if not self.lane.is_open:
            self._drop_all("dropped_unavailable")

    def _incoming(self, block: Block) -> Incoming | None:
        header = self.host.arena.header(block.page)
        if not self._is_here(block) or header is None or header.state is not SlotState.SEALED:
            self.counters["dropped_damaged"] += 1
            return None
        until = block.hold_until if block.speculative else None
        data = self.host.arena.slot(block.page)
        return Incoming(block.key, header.parent, block.tenant, data, header.checksum, until)

    def _is_here(self, block: Block) -> bool:
        return self.host.pool.resident.get(block.key) is block

    def _hold_some(self) -> None:
        """Hold the oldest that wait and are still there."""
        held = self._hold.blocks
        while len(held) < min(self.most_held, len(self._waiting)):
            block = self._waiting[len(held)]
            if self._is_here(block):
                self.host.pool.hold([block])
                held.append(block)
            else:
                del self._waiting[len(held)]
                self.counters["dropped_evicted"] += 1

    def _let_go(self, count: int) -> None:
        """Of the oldest, which are held."""
        gone, self._hold.blocks = self._hold.blocks[:count], self._hold.blocks[count:]
        for _ in gone:
            self._waiting.popleft()
        self.host.pool.release(gone)

    def _drop_all(self, why: str) -> None:
        self.counters[why] += len(self._waiting)
        self._let_go(len(self._hold.blocks))
        self._waiting.clear()


def _kind(block: Block) -> tuple[str, bool]:
    return block.tenant, block.speculative
