"""The device tier: blocks in a pool of pages on a GPU, or on a CPU, under the contract of all tiers.

Promises, beyond those of the contract
- Owns the accounting of `memory`'s pages: whoever else writes to them breaks it. A running worker's pool is not one of
  these; its loop reserves and publishes pages itself.
- `load` and `store` return when their copies are done: buffers are the caller's again, and may be pageable.
"""

from collections import Counter
from collections.abc import Callable, Sequence

import torch

from kvprefetch.cache.block import Block
from kvprefetch.cache.chains import Chains
from kvprefetch.cache.evict import Demand
from kvprefetch.cache.keys import BlockKey
from kvprefetch.cache.pool import BlockPool
from kvprefetch.cache.shares import Shares
from kvprefetch.ops.copy import copy_pages
from kvprefetch.ops.pages import Pages, describe
from kvprefetch.tiers.checksum import checksum
from kvprefetch.tiers.contract import Incoming, Usage
from kvprefetch.tiers.device import DevicePool
from kvprefetch.tiers.paged import discard_unused, require_size, store_leading, usage_of


class DeviceTier:
    """See the module's promises. `clock` is any monotonic clock, in seconds."""

    name = "gpu"

    def __init__(self, memory: DevicePool, clock: Callable[[], float]) -> None:
        self.memory, self.clock, self.block_bytes = memory, clock, memory.shape.bytes
        self.pool = BlockPool(memory.pages)
        self.pool.on_evict = self._evicted
        self.chains = Chains(self.pool)
        self.counters: Counter[str] = Counter()
        self._pages = describe(memory.tensor)
        self._sums: dict[BlockKey, int] = {}

    def find(self, keys: Sequence[BlockKey]) -> int:
        return self.chains.longest(b"".join(keys)).count

    def load(self, keys: Sequence[BlockKey], into: Sequence[memoryview]) -> int:
        require_size(into, self.block_bytes)
        run = self.chains.longest(b"".join(keys[: len(into)]))
        good = 0
        for page, key, target in zip(run.numbers(), keys, into, strict=False):
            copy_pages(self._pages, self._as_page(target), [page], [0])
            self._wait()
            if checksum(target) != self._sums[key]:
                self.counters["corrupt"] += 1
                self._forget(self.pool.resident[key], "corrupt")
                break
            good += 1
        self.chains.use(self.chains.longest(b"".join(keys[:good])), self.clock())
        self.counters["loaded"] += good
        return good

    def store(self, blocks: Sequence[Incoming]) -> int:
        require_size([block.data for block in blocks], self.block_bytes)
        count = store_leading(self.pool, blocks, self._store)
        self.counters["refused"] += len(blocks) - count
        return count

    def discard(self, keys: Sequence[BlockKey]) -> int:
        return discard_unused(self.pool, keys, lambda block: self._forget(block, "discarded"))

    def rule(self, shares: Shares) -> None:
        self.pool.shares = shares

    def usage(self) -> Usage:
        return usage_of(self.pool, self.block_bytes, self.counters)

    def check(self) -> None:
        self.pool.check()

    def close(self) -> None:
        """The memory is its owner's."""

    # -- within ----------------------------------------------------------------------------------------
    def _store(self, incoming: Incoming) -> Block | None:
        until = incoming.speculative_until
        demand = Demand(incoming.tenant, until is not None, self.clock())
        reserved = self.pool.reserve(1, demand, or_fewer=True)
        if not reserved:
            return None
        (block,) = reserved
        copy_pages(self._as_page(incoming.data), self._pages, [0], [block.page])
        self._wait()
        self._sums[incoming.key] = incoming.checksum
        self.counters["stored"] += 1
        parent = self.pool.resident.get(incoming.parent)
        return self.pool.publish(block, incoming.key, parent, speculative_until=until)

    def _as_page(self, data: memoryview) -> Pages:
        """A buffer as a pool of one page."""
        writable = bytearray(data) if data.readonly else data
        return describe(torch.frombuffer(writable, dtype=torch.uint8).view(1, -1))

    def _wait(self) -> None:
        if self.memory.device.type == "cuda":
            torch.cuda.current_stream(self.memory.device).synchronize()

    def _evicted(self, block: Block, rule: str) -> None:
        del self._sums[block.key]
        self.counters["evicted"] += 1

    def _forget(self, block: Block, rule: str) -> None:
        del self._sums[block.key]
        self.pool.drop(block, rule)
