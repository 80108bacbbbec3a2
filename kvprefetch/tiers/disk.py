"""The disk tier: one file of slots for a namespace, of bounded size, read and written by system calls.

Never mapped: a full disk, a cut file or a bad sector is an error here, not the end of the process.

Promises, beyond those of the contract
- A slot's header is unsealed before its bytes are written, and sealed after them, so that a process that is killed
  at any moment leaves whole blocks and free slots. Nothing is forced to the disk: what a power cut tears has another
  checksum, and is dropped when it is read.
- Opening reads the table of headers once; damaged ones, and blocks that lie behind the end of a cut file, are dropped
  and counted. A file that cannot be written to is not opened: TierUnavailable.
- A store that fails (disk full, read-only, broken) raises TierUnavailable; the blocks that were there still are. A
  block that cannot be read is dropped and counted as unreadable.
- Any number of threads may `load` and `find` beside one that stores. The index has a lock; nobody waits for the disk
  while having it, but who discards or drops.
"""

import logging
import os
import threading
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from kvprefetch.cache.block import Block, Hold
from kvprefetch.cache.chains import Chains
from kvprefetch.cache.evict import Demand
from kvprefetch.cache.keys import BlockKey
from kvprefetch.cache.pool import BlockPool
from kvprefetch.cache.rebuild import Kept, rebuild
from kvprefetch.cache.shares import Shares
from kvprefetch.errors import TierUnavailable
from kvprefetch.tiers.checksum import checksum
from kvprefetch.tiers.contract import CLAIM_S, Incoming, Usage
from kvprefetch.tiers.files import open_alone, unlock
from kvprefetch.tiers.layout import Layout
from kvprefetch.tiers.paged import discard_unused, require_size, usage_of
from kvprefetch.tiers.scan import scan
from kvprefetch.tiers.slots import HEADER_BYTES, SlotHeader, SlotState, encode

log = logging.getLogger(__name__)
_AT_ONCE = 4096  # headers read in one go


class DiskTier:
    """See the module's promises. `clock` is any monotonic clock, in seconds."""

    name = "disk"

    def __init__(
        self,
        path: str | Path,
        namespace: str,
        block_bytes: int,
        slots: int,
        clock: Callable[[], float],
        *,
        claim_s: float = CLAIM_S,
    ) -> None:
        self.path, self.clock, self.block_bytes = Path(path), clock, block_bytes
        self.layout = Layout("disk", namespace, block_bytes, slots)
        self.pool = BlockPool(slots, claim_s=claim_s)
        self.chains = Chains(self.pool)
        self.counters: Counter[str] = Counter()
        self.pool.on_evict = lambda block, rule: self.counters.update(evicted=1)
        self._sums = array("Q", bytes(8 * slots))  # of the block in each slot
        self._sequence = 0
        self._lock = threading.Condition()
        self._busy = 0  # calls that use the descriptor
        self._descriptor, _ = open_alone(self.path, self.layout, self._rebuild)
        self._is_closed = False

    def find(self, keys: Sequence[BlockKey]) -> int:
        with self._lock:
            return self.chains.longest(b"".join(keys)).count

    def load(self, keys: Sequence[BlockKey], into: Sequence[memoryview]) -> int:
        require_size(into, self.block_bytes)
        with self._in_use() as descriptor:
            with self._lock:
                run = self.chains.longest(b"".join(keys[: len(into)]))
                slots = run.numbers()
                sums = [self._sums[slot] for slot in slots]
                hold = Hold(list(run.tails))
                self.pool.hold(hold.blocks)
                self.pool.holders.add(hold)
            good, failed = 0, ""
            for slot, expected, target in zip(slots, sums, into, strict=False):
                failed = self._read(descriptor, slot, expected, target)
                if failed:
                    break
                good += 1
            with self._lock:
                self.pool.holders.discard(hold)
                self.pool.release(hold.blocks)
                self.counters["loaded"] += good
                self.chains.use(self.chains.longest(b"".join(keys[:good])), self.clock())
                if failed:
                    self._drop(descriptor, keys[good], slots[good], failed)
            return good

    def store(self, blocks: Sequence[Incoming]) -> int:
        require_size([block.data for block in blocks], self.block_bytes)
        hold = Hold()
        with self._in_use() as descriptor:
            with self._lock:
                self.pool.holders.add(hold)
            try:
                for block in blocks:
                    if not self._have(descriptor, block, hold):
                        break
            finally:
                with self._lock:
                    self.pool.holders.discard(hold)
                    self.pool.release(reversed(hold.blocks))
                    self.counters["refused"] += len(blocks) - len(hold.blocks)
        return len(hold.blocks)

    def discard(self, keys: Sequence[BlockKey]) -> int:
        with self._in_use() as descriptor, self._lock:

            def forget(block: Block) -> None:
                self._write_free(descriptor, block.page)
                self.pool.drop(block, "discarded")

            try:
                return discard_unused(self.pool, keys, forget)
            except OSError as error:
                raise self._unavailable(error) from error

    def rule(self, shares: Shares) -> None:
        with self._lock:
            self.pool.shares = shares

    def usage(self) -> Usage:
        with self._lock:
            return usage_of(self.pool, self.block_bytes, self.counters)

    def check(self) -> None:
        with self._lock:
            self.pool.check()

    def close(self) -> None:
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            self._lock.wait_for(lambda: not self._busy)
        unlock(self._descriptor)

    # -- within ----------------------------------------------------------------------------------------
    @contextmanager
    def _in_use(self) -> Iterator[int]:
        """The descriptor, which stays open meanwhile."""
        with self._lock:
            if self._is_closed:
                raise TierUnavailable(f"the disk tier {self.path} was closed")
            self._busy += 1
        try:
            yield self._descriptor
        finally:
            with self._lock:
                self._busy -= 1
                self._lock.notify_all()

    def _unavailable(self, error: OSError) -> TierUnavailable:
        self.counters["failed"] += 1
        return TierUnavailable(f"{self.path} cannot be written to ({error.strerror})")

    def _read(self, descriptor: int, slot: int, expected: int, target: memoryview) -> str:
        """Copy a block out and verify it; why it failed, or ""."""
        try:
            count = os.preadv(descriptor, [target], self.layout.slot_at(slot))
        except OSError as error:
            log.warning("slot %d of %s cannot be read: %s", slot, self.path, error.strerror)
            return "unreadable"
        return "" if count == self.block_bytes and checksum(target) == expected else "corrupt"

    def _drop(self, descriptor: int, key: BlockKey, slot: int, why: str) -> None:
        block = self.pool.resident.get(key)
        if block is None or block.page != slot:
            return  # another thread was first
        self.counters[why] += 1
        try:
            self._write_free(descriptor, slot)
        except OSError:
            log.warning("slot %d of %s cannot be freed; it will be found bad again", slot, self.path)
        self.pool.drop(block, why)

    def _have(self, descriptor: int, incoming: Incoming, hold: Hold) -> bool:
        """Have one block, stored now or before, and hold it. False: there is no room."""
        until = incoming.speculative_until
        with self._lock:
            held = self.pool.resident.get(incoming.key)
            if held is not None:
                self.pool.hold([held])
                hold.blocks.append(held)
                return True
            demand = Demand(incoming.tenant, until is not None, self.clock())
            reserved = self.pool.reserve(1, demand, or_fewer=True)
            if not reserved:
                return False
            hold.blocks += reserved
            self._sequence += 1
            sequence = self._sequence
        block = reserved[0]
        try:
            self._write(descriptor, block.page, incoming, sequence)
        except OSError as error:  # the hold's end frees the slot
            raise self._unavailable(error) from error
        with self._lock:
            self._sums[block.page] = incoming.checksum
            parent = self.pool.resident.get(incoming.parent)
            hold.blocks[-1] = self.pool.publish(block, incoming.key, parent, speculative_until=until)
            self.counters["stored"] += 1
        return True

    def _write(self, descriptor: int, slot: int, incoming: Incoming, sequence: int) -> None:
        """Unseal, write, seal. Raises OSError; then the slot is not sealed."""
        header = SlotHeader(
            SlotState.RESERVED,
            incoming.key,
            incoming.parent,
            incoming.tenant,
            sequence,
            incoming.checksum,
            self.block_bytes,
        )
        at = self.layout.header_at(slot)
        _write_all(descriptor, memoryview(encode(header)), at)
        _write_all(descriptor, incoming.data.cast("B"), self.layout.slot_at(slot))
        _write_all(descriptor, memoryview(encode(replace(header, state=SlotState.SEALED))), at)

    def _write_free(self, descriptor: int, slot: int) -> None:
        header = SlotHeader(SlotState.FREE, sequence=self._sequence)
        _write_all(descriptor, memoryview(encode(header)), self.layout.header_at(slot))

    def _rebuild(self, descriptor: int) -> None:
        size = os.fstat(descriptor).st_size
        found = scan(self._headers(descriptor), self.block_bytes)
        os.ftruncate(descriptor, self.layout.file_bytes)
        whole = {slot: h for slot, h in found.sealed.items() if self.layout.slot_at(slot) + self.block_bytes <= size}
        kept = [Kept(slot, header.key, header.parent, header.tenant) for slot, header in whole.items()]
        rebuild(self.pool, kept, {}, self.clock())
        for slot, header in whole.items():
            self._sums[slot] = header.checksum
        self._sequence = found.sequence
        bad = len(found.damaged) + len(found.sealed) - len(whole)
        self.counters["damaged"] += bad
        log.info("disk file %s: %d blocks found, %d damaged", self.path, len(kept), bad)

    def _headers(self, descriptor: int) -> Iterator[bytes]:
        """Of all slots; what a cut file lacks was never written."""
        for first in range(0, self.layout.slots, _AT_ONCE):
            size = min(_AT_ONCE, self.layout.slots - first) * HEADER_BYTES
            raw = os.pread(descriptor, size, self.layout.header_at(first)).ljust(size, b"\0")
            for at in range(0, size, HEADER_BYTES):
                yield raw[at : at + HEADER_BYTES]


def _write_all(descriptor: int, data: memoryview, at: int) -> None:
    """What is cut short goes on: the next write tells why."""
    while data:
        count = os.pwrite(descriptor, data, at)
        data, at = data[count:], at + count
