"""One model's namespace on this node: its arena, who holds what of it, and the tiers behind it.

Promises
- All of it lives on the event loop's thread. What touches the index never awaits half-way, so that no step is seen
  unfinished; disk, Redis and other nodes work in threads, on slots that are reserved or held meanwhile.
- Nobody waits here for longer than `LONGEST_WAIT_S`. A lower tier that is slow, full or out of reach costs nobody
  anything but its blocks.
- `check()` proves that every slot is accounted for (law 5).
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass

from kvprefetch.cache.block import Block, Hold
from kvprefetch.cache.keys import BlockKey
from kvprefetch.cache.shares import Shares
from kvprefetch.service.announcer import Announcer
from kvprefetch.service.counts import Counts
from kvprefetch.service.frames import Sealed, most_blocks, pack
from kvprefetch.service.lane import Clock, Lane, Source
from kvprefetch.service.leases import Leases
from kvprefetch.service.packed import split
from kvprefetch.service.pins import Pins
from kvprefetch.service.promotion import Coming, Job, Promoter
from kvprefetch.service.write_behind import WriteBehind
from kvprefetch.tiers.host import HostTier
from kvprefetch.tiers.slots import Owner

log = logging.getLogger(__name__)

LONGEST_WAIT_S = 0.05
_PINNED_SHARE = 4  # a tenant's pins take at most 1/4 of the arena
_HELD_SHARE = 8  # blocks that wait to be written to a lower tier hold at most 1/8 of it


@dataclass(frozen=True, slots=True)
class Found:
    """What a look-up found. `slots` are packed, and on lease if `lease` is not 0."""

    lease: int
    slots: bytes
    count: int
    coming: int
    tier: str


@dataclass
class Behind:
    """What lies behind the arena. `lanes` are written to and read from, `nodes` is only read."""

    lanes: Sequence[Lane] = ()
    nodes: Source | None = None
    announcer: Announcer | None = None

    @property
    def sources(self) -> list[Source]:
        """In the order in which they are asked."""
        return [*self.lanes, *([self.nodes] if self.nodes is not None else [])]


class Shelf:
    """See the module's promises. `owner`: this process, that brings blocks into the arena."""

    def __init__(
        self,
        namespace: str,
        host: HostTier,
        behind: Behind,
        owner: Owner,
        numbers: Iterator[int],
        clock: Clock,
        block_tokens: int,
    ) -> None:
        self.namespace, self.host, self.behind, self.owner, self.clock = namespace, host, behind, owner, clock
        self.block_tokens, self.block_bytes = block_tokens, host.block_bytes
        self.leases = Leases(host, numbers)
        self.pins = Pins(host.pool, max(host.arena.slots // _PINNED_SHARE, 1))
        self.counts = Counts()
        self.tokens_per_s: dict[bytes, float] = {}  # by worker, as it reported
        slots = host.arena.slots
        most_held = max(slots // _HELD_SHARE, 1)
        self.writers = {lane.name: WriteBehind(host, lane, slots, most_held) for lane in behind.lanes}
        self.promoter = Promoter(host, self.leases, owner, behind.sources, clock, self.compute_s, self._brought)
        if behind.announcer is not None:
            self._announce_all(behind.announcer)

    # -- what workers ask for --------------------------------------------------------------------------
    async def look_up(
        self,
        packed: bytes,
        tenant: str,
        session: str,
        *,
        lease_for: bytes | None,
        wait_s: float = 0.0,
        hold_s: float | None = None,
    ) -> Found:
        """The leading blocks that the arena holds, on lease for the worker `lease_for`; None: only counted.

        Whoever holds the rest is asked for it meanwhile; that is waited for at most `wait_s`. With a `hold_s` nobody
        has asked for them: they count as unused, and what is brought keeps its place for so long. Raises
        LimitExceeded, NotPresent.
        """
        run, asked = self.host.longest(packed), len(packed) // 32
        coming = Coming()
        if run.count < asked and self.promoter.sources:
            job = self._want(packed, run.count, tenant, hold_s)
            if job is not None and wait_s > 0:
                job = await self._wait(packed, job, tenant, min(wait_s, LONGEST_WAIT_S), hold_s)
                run = self.host.longest(packed)  # what was found before may be gone: nothing held it
            coming = self.promoter.coming(job, asked - run.count)
        lease = 0
        if run.count and lease_for is not None:
            lease = self.leases.lease(lease_for, list(run.tails))
            if hold_s is None:
                self.host.chains.use(run, self.clock(), session)
        reason = self._reason(packed[32 * run.count : 32 * run.count + 32], coming.tier) if run.count < asked else ""
        self.counts.look_up(run.count, asked, reason)
        return Found(lease, run.pages if lease else b"", run.count, coming.count, coming.tier)

    def reserve(
        self, owner: Owner, parent: BlockKey, keys: Sequence[BlockKey], tenant: str, hold_s: float | None
    ) -> tuple[int, list[int | None]]:
        """A reservation's number and the slots of leading keys; None: held or written already.

        `hold_s`: nobody has asked for them, and they keep their place for so long. Raises LimitExceeded, NotPresent.
        """
        now = self.clock()
        until = None if hold_s is None else now + hold_s
        number, blocks = self.leases.reserve(owner, parent, keys, tenant, now=now, speculative_until=until)
        self.counts.reserved += sum(block is not None for block in blocks)
        self.counts.not_reserved["present"] += sum(block is None for block in blocks)
        self.counts.not_reserved["full"] += len(keys) - len(blocks)
        return number, [None if block is None else block.page for block in blocks]

    def commit(self, instance: bytes, number: int, checksums: Sequence[int]) -> int:
        """Let others find what was written; how many blocks. Raises UnknownReservation, ValueError."""
        sealed = self.leases.commit(instance, number, checksums)
        self.counts.committed += len(sealed)
        for writer in self.writers.values():
            writer.offer(sealed)
        self._announce(sealed)
        return len(sealed)

    def release(self, instance: bytes, leases: Sequence[int], reservations: Sequence[int], corrupt: set[int]) -> None:
        """Give back, and drop what was damaged. What is unknown is ignored."""
        dropped = self.leases.release(instance, leases, reservations, corrupt)
        if dropped:
            log.warning("%d blocks of %s were damaged; %s…", len(dropped), self.namespace, dropped[0][:4].hex())
            if self.behind.announcer is not None:
                self.behind.announcer.withdraw(dropped)

    def pin(self, tenant: str, packed: bytes, hold_s: float) -> int:
        """Keep leading blocks for `hold_s`; 0 unpins. How many are pinned. Raises LimitExceeded."""
        return self.pins.pin(tenant, split(packed), self.host.longest(packed), hold_s, self.clock())

    async def read(self, packed: bytes) -> AsyncIterator[bytes]:
        """Leading blocks, in frames. Each is held while it is copied; the next one is, while one is sent."""
        step = 32 * most_blocks(self.block_bytes)
        frames = deque([asyncio.create_task(self._frame(packed[:step]))])
        try:
            for at in range(step, len(packed) + step, step):
                frame, is_last = await frames[0]
                frames.popleft()
                if not is_last and at < len(packed):
                    frames.append(asyncio.create_task(self._frame(packed[at : at + step])))
                if frame:
                    yield frame
                if not frames:
                    return
        finally:  # the reader may have gone
            await asyncio.gather(*frames, return_exceptions=True)

    # -- figures, proof and end ------------------------------------------------------------------------
    def compute_s(self) -> float | None:
        """What a worker takes to compute one block, at the best rate that one reported; None: nobody knows."""
        return self.block_tokens / max(self.tokens_per_s.values()) if self.tokens_per_s else None

    def rule(self, shares: Shares) -> None:
        """What each tenant may count on from now on, in every tier. Evicts nothing at once."""
        self.pins.shares = shares
        self.host.rule(shares)
        for lane in self.behind.lanes:
            lane.rule(shares)

    def expire(self, now: float) -> None:
        """To be called about every second."""
        self.pins.expire(now)
        if self.behind.announcer is not None:
            self.behind.announcer.remind(lambda: list(self.host.pool.resident))

    def check(self) -> None:
        """Prove law 5 of the arena, or raise AccountingError."""
        self.host.check()
        self.leases.check()

    async def check_tiers(self) -> None:
        """Prove it of the tiers behind the arena. Raises AccountingError."""
        for lane in self.behind.lanes:
            await lane.run(lane.tier.check)

    async def drain(self) -> None:
        """Until nothing moves between tiers."""
        await self.promoter.drain()
        for writer in self.writers.values():
            await writer.drain()

    async def close(self) -> None:
        """Stop what runs and close all files; what is in the arena stays there. Calling it again does nothing."""
        await self.promoter.close()
        for writer in self.writers.values():
            await writer.close()
        self.pins.clear()
        if self.behind.announcer is not None:
            await self.behind.announcer.close()
        for source in self.behind.sources:
            await source.close()
        self.host.close()

    # -- within ----------------------------------------------------------------------------------------
    def _want(self, packed: bytes, found: int, tenant: str, hold_s: float | None) -> Job | None:
        rest = split(packed[found * 32 :])
        parent = packed[(found - 1) * 32 : found * 32] if found else b""
        return self.promoter.want(rest, parent, tenant, hold_s)

    async def _wait(self, packed: bytes, job: Job, tenant: str, wait_s: float, hold_s: float | None) -> Job | None:
        """Until all is there, nothing more comes, or the time is over."""
        self.counts.waited += 1
        until, asked = self.clock() + wait_s, len(packed) // 32
        current: Job | None = job
        while current is not None:
            left = until - self.clock()
            if left <= 0 or not await current.change(left):
                break
            found = self.host.longest(packed).count
            if found >= asked:
                break
            if current.is_over:
                current = self._want(packed, found, tenant, hold_s)
        return current

    def _reason(self, key: BlockKey, coming_from: str) -> str:
        """Why the first missing block is missing (law 6)."""
        pool = self.host.pool
        if coming_from:
            return f"in_{coming_from}"
        if self.host.is_being_written(key):
            return "in_flight"
        if key in pool.evicted:
            return "corrupt" if pool.evicted[key] == "corrupt" else "evicted"
        return "unknown" if pool.forgot_evictions else "never_seen"

    def _brought(self, blocks: list[Block], source: str) -> None:
        """Blocks came from a lower place: those nearer than it may keep them, too."""
        for name, writer in self.writers.items():
            if name == "disk" and source != "disk":
                writer.offer(blocks)
        self._announce(blocks)

    async def _frame(self, packed: bytes) -> tuple[bytes, bool]:
        """The leading blocks of these keys in one frame, b"" for none; and whether it ends here."""
        run = self.host.longest(packed)
        if not run.count:
            return b"", True
        hold = Hold(list(run.tails))
        self.host.pool.hold(hold.blocks)
        self.host.pool.holders.add(hold)
        try:
            frame = await asyncio.to_thread(self._pack, run.numbers())
        finally:
            self.host.pool.holders.discard(hold)
            self.host.pool.release(hold.blocks)
        self.counts.read += run.count
        return frame, 32 * run.count < len(packed)

    def _pack(self, slots: list[int]) -> bytes:
        arena = self.host.arena
        headers = [arena.header(slot) for slot in slots]
        return pack([Sealed(arena.slot(s), h.checksum if h else 0) for s, h in zip(slots, headers, strict=True)])

    def _announce(self, blocks: Sequence[Block]) -> None:
        if self.behind.announcer is not None and blocks:
            self.behind.announcer.announce([block.key for block in blocks])

    def _announce_all(self, announcer: Announcer) -> None:
        announcer.announce(list(self.host.pool.resident))
        self.host.pool.on_evict = _both(self.host.pool.on_evict, lambda block, _: announcer.withdraw([block.key]))


def _both(first: Callable[[Block, str], None], second: Callable[[Block, str], None]) -> Callable[[Block, str], None]:
    def both(block: Block, rule: str) -> None:
        first(block, rule)
        second(block, rule)

    return both
