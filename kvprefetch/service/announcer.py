"""Tells the directory what this node's arena holds, so that other nodes find it here.

Promises
- `announce` and `withdraw` never block and never raise: they queue, the latest word for each key; a thread tells. What
  does not fit into the queue, or cannot be told, is counted; it is told again with everything else, every third of the
  directory's time to live.
- The directory is a hint to others. What is said too late or not at all costs a look, never a wrong block.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from kvprefetch.cache.keys import BlockKey
from kvprefetch.errors import TierUnavailable
from kvprefetch.tiers.directory import Directory

log = logging.getLogger(__name__)

MOST_QUEUED = 65_536
_BATCH = 512


class Announcer:
    """See the module's promises. `address`: where others read from us."""

    def __init__(self, directory: Directory, address: str, ttl_s: float, clock: Callable[[], float]) -> None:
        self.directory, self.address, self.clock = directory, address, clock
        self.every_s = ttl_s / 3
        self.counters: Counter[str] = Counter()
        self._queue: dict[BlockKey, bool] = {}  # True: we have it
        self._told_all_at = clock()
        self._task: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, "kvprefetch-directory")
        self._is_closed = False

    def announce(self, keys: Iterable[BlockKey]) -> None:
        """The arena has these."""
        self._put(keys, True)

    def withdraw(self, keys: Iterable[BlockKey]) -> None:
        """It has these no more."""
        self._put(keys, False)

    def remind(self, held: Callable[[], Sequence[BlockKey]]) -> None:
        """To be called about every second: tells everything again when it is time."""
        now = self.clock()
        if now - self._told_all_at >= self.every_s:
            self._told_all_at = now
            self.announce(held())

    async def drain(self) -> None:
        """Until everything is told, or given up."""
        while self._task is not None:
            await asyncio.wait({self._task})

    async def close(self) -> None:
        """Tell nothing more. Calling it again does nothing."""
        self._is_closed = True
        self._queue.clear()
        await self.drain()
        self._thread.shutdown(wait=False)

    # -- within ----------------------------------------------------------------------------------------
    def _put(self, keys: Iterable[BlockKey], has: bool) -> None:
        for key in keys:
            if len(self._queue) >= MOST_QUEUED and key not in self._queue:
                self.counters["dropped"] += 1
                continue
            self._queue[key] = has
        if self._queue and self._task is None and not self._is_closed:
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        try:
            while self._queue and not self._is_closed:
                batch = {key: self._queue.pop(key) for key in list(self._queue)[:_BATCH]}
                await asyncio.get_running_loop().run_in_executor(self._thread, self._tell, batch)
                self.counters["told"] += len(batch)
        except TierUnavailable:
            self.counters["unavailable"] += len(self._queue)
            self._queue.clear()
        except Exception:  # the task's outermost line
            log.exception("telling the directory what is here broke")
        finally:
            self._task = None

    def _tell(self, batch: dict[BlockKey, bool]) -> None:
        """In the thread."""
        there = [key for key, has in batch.items() if has]
        gone = [key for key, has in batch.items() if not has]
        if there:
            self.directory.announce(there, self.address)
        if gone:
            self.directory.withdraw(gone, self.address)
