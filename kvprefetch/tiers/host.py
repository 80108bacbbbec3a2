"""The host tier: blocks in the node's arena. The service's side of it.

Promises, beyond those of the contract
- The arena's headers are the truth that outlives the service: `HostTier(arena, …)` rebuilds its index from them.
  Damaged headers are dropped and counted, of two with one key the newer is kept. A slot that was reserved by a
  process that may still run is quarantined and listed in `orphans`, until `readmit`; if its owner is dead it is free.
- `reserve` gives slots with one reference each. `seal` passes the reference on to the block that it returns; `abandon`
  and `quarantine` take it; `resume` gives it back. A reserved slot is found by nobody.
- Whoever holds references is among `pool.holders` (law 5). Sequence numbers grow with every reservation, restarts
  included, and never go back.
- Nothing blocks but `load` and `store`, for as long as their copies take. One thread at a time.
"""

import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from kvprefetch.cache.block import Block, State
from kvprefetch.cache.chains import Chains, Run
from kvprefetch.cache.evict import Demand
from kvprefetch.cache.keys import BlockKey
from kvprefetch.cache.pool import BlockPool
from kvprefetch.cache.rebuild import Kept, rebuild
from kvprefetch.cache.shares import Shares
from kvprefetch.errors import AccountingError
from kvprefetch.tiers.arena import ArenaFile
from kvprefetch.tiers.contract import CLAIM_S, Incoming, Usage
from kvprefetch.tiers.paged import discard_unused, require_size, store_leading, usage_of
from kvprefetch.tiers.scan import scan
from kvprefetch.tiers.slots import Owner, SlotHeader, SlotState, who_may_write

log = logging.getLogger(__name__)
Clock = Callable[[], float]
_SERVICE = b"the service     "  # the instance of who has the file alone: a predecessor of ours writes no more
_NOBODY = bytes(16)


@dataclass(slots=True, eq=False)
class _Writing:
    """A reserved slot, and a holder: of the block before it, so that the sequence does not break meanwhile."""

    header: SlotHeader
    speculative_until: float | None  # by the tier's clock
    blocks: list[Block] = field(default_factory=list)


class HostTier:
    """See the module's promises. `clock` is any monotonic clock, in seconds; `wall` is Unix time."""

    name = "host"

    def __init__(
        self,
        arena: ArenaFile,
        clock: Clock,
        *,
        is_alive: Callable[[int, int], bool] | None = None,
        verify: bool = True,
        wall: Clock = time.time,
        evicted_memory: int = 65_536,
        claim_s: float = CLAIM_S,
    ) -> None:
        self.arena, self.clock, self.wall, self.verify = arena, clock, wall, verify
        self.block_bytes = arena.block_bytes
        self.pool = BlockPool(arena.slots, evicted_memory=evicted_memory, claim_s=claim_s)
        self.chains = Chains(self.pool)
        self.counters: Counter[str] = Counter()
        self.orphans: list[tuple[Block, SlotHeader]] = []
        self._writing: dict[int, _Writing] = {}  # slot → what is being written there
        self._keys: dict[BlockKey, int] = {}  # key → slot in which it is being written
        pid = os.getpid()
        self._self = Owner(_SERVICE, pid, started_at(pid))
        self._sequence = 0
        self._rebuild(is_alive or may_run)
        self.pool.on_evict = self._evicted

    # -- for the service -------------------------------------------------------------------------------
    def longest(self, keys: bytes) -> Run:
        """The leading blocks of packed `keys` that are held. Takes no references."""
        return self.chains.longest(keys)

    def is_being_written(self, key: BlockKey) -> bool:
        """Whether a slot is reserved for this block, by somebody who has not vanished."""
        return key in self._keys

    def reserve(
        self,
        keys: Sequence[BlockKey],
        parent: BlockKey,
        tenant: str,
        owner: Owner,
        *,
        now: float,
        speculative_until: float | None = None,
    ) -> list[Block | None]:
        """Slots for a leading part of `keys`, each the successor of the one before, the first of `parent`.

        None in place of a block: it is held or being written already. Fewer than keys: there is no room for more.
        """
        demand = Demand(tenant, speculative_until is not None, now)
        reserved = self._reserve(keys, parent, demand, owner, speculative_until)
        self.counters["refused"] += len(keys) - len(reserved)
        return reserved

    def seal(self, block: Block, checksum: int) -> Block:
        """A reserved slot is written: from now on it is found. Returns the block to hold, which may be a twin."""
        writing = self._end(block)
        key, parent = writing.header.key, self.pool.resident.get(writing.header.parent)
        if key in self.pool.resident:
            self._free_header(block.page)
        else:
            whole = replace(
                writing.header, state=SlotState.SEALED, checksum=checksum, instance=_NOBODY, pid=0, started=0
            )
            self.arena.write_header(block.page, whole)
            self.counters["stored"] += 1
        return self.pool.publish(block, key, parent, speculative_until=writing.speculative_until)

    def abandon(self, block: Block) -> None:
        """Nobody writes to this reserved slot any more: it is free."""
        self._end(block)
        self._free_header(block.page)
        self.pool.release([block])

    def quarantine(self, block: Block) -> None:
        """The writer of this reserved slot has vanished and may still write."""
        self._let_go(self._writing[block.page], block)
        self.pool.quarantine(block)
        self.pool.release([block])

    def resume(self, block: Block) -> None:
        """The writer of a quarantined slot is back and goes on."""
        if block.page not in self._writing:
            raise ValueError(f"slot {block.page} was not reserved in this run")
        self.pool.hold([block])
        self.pool.resume(block)

    def readmit(self, block: Block) -> None:
        """The writer of a quarantined slot is proved gone: it is free."""
        self._writing.pop(block.page, None)
        self.orphans = [orphan for orphan in self.orphans if orphan[0] is not block]
        self._free_header(block.page)
        self.pool.readmit(block)

    def drop(self, slot: int, key: BlockKey) -> None:
        """The bytes of this block were found damaged: nobody finds it any more. Ignored if it is gone already.

        What follows it in its sequence stays, and is found again when the block has been computed and stored again.
        """
        block = self.pool.resident.get(key)
        if block is None or block.page != slot:
            return
        self.counters["corrupt"] += 1
        self._forget(block, "corrupt")

    # -- the contract ----------------------------------------------------------------------------------
    def find(self, keys: Sequence[BlockKey]) -> int:
        return self.longest(b"".join(keys)).count

    def load(self, keys: Sequence[BlockKey], into: Sequence[memoryview]) -> int:
        require_size(into, self.block_bytes)
        run = self.longest(b"".join(keys[: len(into)]))
        good = 0
        for slot, key, target in zip(run.numbers(), keys, into, strict=False):
            if not self.arena.read(slot, key, target, verify=self.verify):
                self.drop(slot, key)
                break
            good += 1
        self.chains.use(self.longest(b"".join(keys[:good])), self.clock())
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
        if set(self._writing) - set(self.pool.in_flight) - set(self.pool.quarantined):
            raise AccountingError("a slot counts as being written that is not reserved")
        for block in self.pool.blocks():
            header = self.arena.header(block.page)  # damaged: seen when it is read, or at the next start
            if header is not None and block.state is not State.DROPPED:
                wanted = SlotState.SEALED if block.state is State.RESIDENT else SlotState.RESERVED
                if header.state is not wanted or (block.key and header.key != block.key):
                    raise AccountingError(f"the header of slot {block.page} is not that of its block")

    def close(self) -> None:
        self.arena.close()

    # -- within ----------------------------------------------------------------------------------------
    def _reserve(
        self, keys: Sequence[BlockKey], parent: BlockKey, demand: Demand, owner: Owner, until: float | None
    ) -> list[Block | None]:
        wanted = self._wanted(keys)
        kept = [self.pool.resident[key] for key in (parent, *keys) if key in self.pool.resident]
        self.pool.hold(kept)  # so that making room does not take what this is the sequel of
        fresh = iter(self.pool.reserve(sum(wanted), demand, or_fewer=True))
        reserved: list[Block | None] = []
        for key, is_wanted in zip(keys, wanted, strict=True):
            block = next(fresh, None) if is_wanted else None
            if is_wanted and block is None:
                break
            if block is not None:
                self._begin(block, key, parent, owner, until)
            reserved.append(block)
            parent = key
        self.pool.release(kept)
        return reserved

    def _wanted(self, keys: Sequence[BlockKey]) -> list[bool]:
        seen: set[BlockKey] = set()
        wanted = []
        for key in keys:
            wanted.append(key not in self.pool.resident and key not in self._keys and key not in seen)
            seen.add(key)
        return wanted

    def _begin(self, block: Block, key: BlockKey, parent: BlockKey, owner: Owner, until: float | None) -> None:
        self._sequence += 1
        header = SlotHeader(
            SlotState.RESERVED,
            key,
            parent,
            block.tenant,
            self._sequence,
            length=self.block_bytes,
            instance=owner.instance,
            pid=owner.pid,
            started=owner.started,
            speculative_until_unix=0.0 if until is None else until - self.clock() + self.wall(),
        )
        self.arena.write_header(block.page, header)
        writing = self._writing[block.page] = _Writing(header, until)
        self._keys[key] = block.page
        before = self.pool.resident.get(parent)
        if before is not None:
            writing.blocks.append(before)
            self.pool.hold(writing.blocks)
            self.pool.holders.add(writing)

    def _end(self, block: Block) -> _Writing:
        """A reservation's last moment."""
        if block.page not in self.pool.in_flight:
            raise ValueError(f"slot {block.page} is not reserved")
        writing = self._writing.pop(block.page)
        self._let_go(writing, block)
        return writing

    def _let_go(self, writing: _Writing, block: Block) -> None:
        """Another may write this block from now on."""
        if self._keys.get(writing.header.key) == block.page:
            del self._keys[writing.header.key]
        self.pool.holders.discard(writing)
        self.pool.release(writing.blocks)
        writing.blocks = []

    def _store(self, incoming: Incoming) -> Block | None:
        """Write one block that is not held; None: there is no room, or somebody else is writing it."""
        until = incoming.speculative_until
        demand = Demand(incoming.tenant, until is not None, self.clock())
        reserved = self._reserve([incoming.key], incoming.parent, demand, self._self, until)
        if not reserved or reserved[0] is None:
            return None
        block = reserved[0]
        self.arena.put(block.page, incoming.data)
        return self.seal(block, incoming.checksum)

    def _forget(self, block: Block, rule: str) -> None:
        self._free_header(block.page)
        self.pool.drop(block, rule)

    def _evicted(self, block: Block, rule: str) -> None:
        self._free_header(block.page)
        self.counters["evicted"] += 1

    def _free_header(self, slot: int) -> None:
        self.arena.write_header(slot, SlotHeader(SlotState.FREE, sequence=self._sequence))

    def _rebuild(self, is_alive: Callable[[int, int], bool]) -> None:
        found = scan((self.arena.raw_header(slot) for slot in range(self.arena.slots)), self.block_bytes)
        self._sequence = max(found.sequence, int(self.wall() * 1e6))  # the highest may be among the damaged
        doubtful = dict(found.reserved)
        for slot, raw in found.damaged.items():
            owner = who_may_write(raw)
            if owner is not None:
                doubtful[slot] = SlotHeader(SlotState.RESERVED, **asdict(owner))
        for slot, header in list(doubtful.items()):
            if header.instance == _SERVICE or not is_alive(header.pid, header.started):
                del doubtful[slot]
        for slot in {*found.twins, *found.damaged, *found.reserved} - doubtful.keys():
            self._free_header(slot)
        now, ahead = self.clock(), self.clock() - self.wall()
        kept = []
        for slot, header in found.sealed.items():
            until = header.speculative_until_unix + ahead
            kept.append(Kept(slot, header.key, header.parent, header.tenant, until if until > now else None))
        tenants = {slot: header.tenant for slot, header in doubtful.items()}
        blocks = rebuild(self.pool, kept, tenants, now)
        self.orphans = [(block, doubtful[block.page]) for block in blocks]
        self.counters["damaged"] += len(found.damaged)
        log.info(
            "arena %s: %d blocks found, %d damaged headers, %d slots that somebody may still write to",
            self.arena.path,
            len(kept),
            len(found.damaged),
            len(blocks),
        )


def may_run(pid: int, started: int) -> bool:
    """Whether the process that started then may still run. A process that cannot be looked at may."""
    try:
        return started_at(pid) == started
    except (FileNotFoundError, ProcessLookupError):
        return False
    except OSError:
        return True


def started_at(pid: int) -> int:
    """Ticks since boot when a process started. Raises OSError."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    return int(fields[19])
