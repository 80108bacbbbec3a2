"""A tier behind the arena, as the event loop sees it: asked by threads of its own, at its own pace, or not at all.

Promises
- Nothing here blocks the loop, and nothing raises: a tier that is out of reach finds, loads and stores nothing, which
  is counted. After a failure it is left alone for a while (a breaker).
- `pace` is what the tier really gave, in bytes per second, as a moving average; None before the first load.
- Loads do not wait behind stores: these have a thread of their own. What runs in a thread is never abandoned: memory
  that it writes to stays reserved until it is done.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

from kvprefetch.cache.keys import BlockKey
from kvprefetch.cache.shares import Shares
from kvprefetch.errors import TierUnavailable
from kvprefetch.tiers.breaker import Breaker
from kvprefetch.tiers.checksum import checksum
from kvprefetch.tiers.contract import Incoming, Tier

log = logging.getLogger(__name__)
Clock = Callable[[], float]
T = TypeVar("T")

_LATEST = 0.25  # what a new measurement of the pace weighs
_BATCH_S = 0.01  # a batch is meant to take so long


@dataclass(slots=True)
class Pace:
    """Bytes per second, as a moving average."""

    bytes_per_s: float | None = None

    def learn(self, size: int, seconds: float) -> None:
        """So much came in so long."""
        if seconds <= 0:
            return
        now = size / seconds
        old = self.bytes_per_s
        self.bytes_per_s = now if old is None else old + _LATEST * (now - old)

    def batch(self, block_bytes: int, most: int) -> int:
        """Blocks that take about `_BATCH_S`; 1 to `most`."""
        return max(1, min(most, int((self.bytes_per_s or 0.0) * _BATCH_S / block_bytes)))


class Source(Protocol):
    """A place that blocks can be brought from into the arena."""

    name: str
    pace: Pace
    counters: Counter[str]

    @property
    def is_open(self) -> bool:
        """Whether it can be asked now."""

    async def find(self, keys: Sequence[BlockKey]) -> int:
        """How many leading keys it has."""

    async def load(self, keys: Sequence[BlockKey], into: Sequence[memoryview]) -> list[int]:
        """Bring leading blocks; the checksums of those that came whole."""

    async def close(self) -> None:
        """Let go, once nothing is under way. Calling it again does nothing."""


class Lane:
    """See the module's promises. A `Source`, and a sink. The tier's `find` and `load` may run beside one `store`."""

    def __init__(self, tier: Tier, clock: Clock) -> None:
        self.tier, self.clock, self.name = tier, clock, tier.name
        self.breaker = Breaker()
        self.pace, self.store_pace = Pace(), Pace()
        self.counters: Counter[str] = Counter()
        self._is_closed = False
        self._readers = ThreadPoolExecutor(2, f"kvprefetch-{tier.name}-read")
        self._writer = ThreadPoolExecutor(1, f"kvprefetch-{tier.name}-write")

    @property
    def is_open(self) -> bool:
        """Whether it answered when it was last asked, or may be asked again."""
        return not self.breaker.is_open

    async def find(self, keys: Sequence[BlockKey]) -> int:
        return await self._ask(self._readers, lambda: self.tier.find(keys), 0)

    async def load(self, keys: Sequence[BlockKey], into: Sequence[memoryview]) -> list[int]:
        def load() -> tuple[list[int], float]:
            began = self.clock()
            good = self.tier.load(keys, into)
            seconds = self.clock() - began
            return [checksum(view) for view in into[:good]], seconds

        nothing: tuple[list[int], float] = [], 0.0
        sums, seconds = await self._ask(self._readers, load, nothing)
        if sums:
            self.pace.learn(len(sums) * self.tier.block_bytes, seconds)
        self.counters["loaded"] += len(sums)
        return sums

    async def store(self, blocks: Sequence[Incoming]) -> int:
        """Keep leading blocks; how many it has now."""

        def store() -> tuple[int, float]:
            began = self.clock()
            return self.tier.store(blocks), self.clock() - began

        stored, seconds = await self._ask(self._writer, store, (0, 0.0))
        if stored:
            self.store_pace.learn(stored * self.tier.block_bytes, seconds)
        self.counters["stored"] += stored
        return stored

    def rule(self, shares: Shares) -> None:
        """What each tenant may count on in the tier, from the store after the one that is under way."""
        if not self._is_closed:
            self._writer.submit(self.tier.rule, shares)

    async def run(self, work: Callable[[], T]) -> T:
        """Run `work` where stores run: for figures and proofs. Raises what it raises."""
        return await asyncio.get_running_loop().run_in_executor(self._writer, work)

    async def close(self) -> None:
        """Wait for what is under way, and close the tier. Calling it again does nothing."""
        if not self._is_closed:
            self._is_closed = True
            await asyncio.to_thread(self._close)

    # -- within ----------------------------------------------------------------------------------------
    def _close(self) -> None:
        self._readers.shutdown()
        self._writer.shutdown()
        self.tier.close()

    async def _ask(self, threads: ThreadPoolExecutor, work: Callable[[], T], nothing: T) -> T:
        if self._is_closed or not self.breaker.allows(self.clock()):
            self.counters["skipped"] += 1
            return nothing
        try:
            answer = await asyncio.get_running_loop().run_in_executor(threads, work)
        except TierUnavailable as error:
            self.counters["unavailable"] += 1
            if self.is_open:
                log.warning("the %s tier is left alone for a while: %s", self.name, error)
            self.breaker.failed(self.clock())
            return nothing
        self.breaker.succeeded()
        return answer
