"""The tier that nodes share: blocks in Redis or Valkey (6.2 or later), single or Cluster, each with a time to live.

Promises, beyond the contract's
- Thread-safe. A call blocks while blocks come or go; where none did for `timeout_s`, it ends. It raises
  TierUnavailable if it has done nothing until then, else it says how far it came.
- A block stays for `ttl_s` after it was stored or read last, unless Redis evicts it. Reads are pipelined, with at most
  `WINDOW_BYTES` (two blocks at least) under way.
- Each value carries its checksum. One that fails is deleted and counted as corrupt.
- A Redis that takes no blocks (full without evicting, read-only, no rights) is offered none for a while: they count
  as refused. It is still read.
- Charges are shared by all nodes and mend themselves (`redis_charges`).
- With `settings.size` all nodes together keep about so many bytes of blocks, and tenants within their guarantee of them
  lose none to others (`redis_budget`). Without, Redis evicts by its own policy, which knows no tenants.
- Redis must be trusted: whoever can write to it can write blocks.
"""

import logging
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import groupby
from typing import Any

from redis.exceptions import ResponseError

from kvprefetch.cache.keys import BlockKey
from kvprefetch.cache.shares import Shares
from kvprefetch.errors import TierUnavailable
from kvprefetch.settings import RedisSettings
from kvprefetch.tiers.breaker import Breaker
from kvprefetch.tiers.checksum import checksum
from kvprefetch.tiers.contract import Incoming, Usage
from kvprefetch.tiers.paged import require_size
from kvprefetch.tiers.redis_block import HEADER_BYTES, Names, Sealed, read_header, value_of
from kvprefetch.tiers.redis_budget import Budget
from kvprefetch.tiers.redis_charges import Charges
from kvprefetch.tiers.redis_connection import FILLED
from kvprefetch.tiers.redis_link import BATCH, MOVED, Command, RedisLink, granted

log = logging.getLogger(__name__)

WINDOW_BYTES = 4 * 2**20
FIRST_LOOK = 64  # keys; most prefixes end soon
REFRESHES = 64  # batches of blocks that were read and wait for their longer life


class RedisTier:
    """See the module's promises. Without a `link` it opens, and closes, one of its own."""

    name = "redis"

    def __init__(
        self, settings: RedisSettings, namespace: str, block_bytes: int, *, link: RedisLink | None = None
    ) -> None:
        self.block_bytes = block_bytes
        self.link = link or RedisLink(settings)
        self.names = Names(settings.prefix, namespace)
        self.charges = Charges(self.link, self.names, block_bytes, settings.ttl_s)
        self._owns_link = link is None
        self._ttl_ms = int(1_000 * settings.ttl_s)
        self._window = min(max(WINDOW_BYTES // block_bytes, 2), 64)
        self._room = Breaker(first_s=1.0)  # open: it takes no blocks
        self.counters: Counter[str] = Counter(stored=0, loaded=0, corrupt=0, refused=0)
        self._last_known: dict[str, int] = {}  # charged by tenant
        self.budget: Budget | None = None
        if settings.size:
            self.budget = Budget(self.link, self.names, self.charges, settings.size, block_bytes, self._count_evicted)
        self._refresher = ThreadPoolExecutor(1, "kvprefetch-redis-refresh")
        self._waiting = 0  # for the refresher
        self._lock = threading.Lock()

    # -- the contract ----------------------------------------------------------------------------------
    def find(self, keys: Sequence[BlockKey]) -> int:
        """See the contract. Of very many keys, as far as it comes in half of `timeout_s`."""
        found, size = 0, FIRST_LOOK
        with self.link.exchange() as exchange:
            while some := keys[found : found + size]:
                held = exchange.run([("EXISTS", self.names.block(key)) for key in some])
                run = next((n for n, answer in enumerate(held) if not granted(answer)), len(some))
                found, size = found + run, BATCH
                if run < len(some) or exchange.limit.is_short:
                    break
        return found

    def load(self, keys: Sequence[BlockKey], into: Sequence[memoryview]) -> int:
        """See the contract."""
        require_size(into, self.block_bytes)
        read: list[Sealed] = []
        is_corrupt = False
        header = memoryview(bytearray(HEADER_BYTES))
        wanted = (("GET", self.names.block(key)) for key in keys)
        bodies = [view.cast("B") for view in into]
        places = ((header, body) for body in bodies)
        try:
            with self.link.exchange() as exchange:
                for key, body, answer in zip(keys, bodies, exchange.stream(wanted, self._window, places), strict=False):
                    value = answer if answer is FILLED else _bytes_of(answer)
                    if value is None:
                        break
                    sealed = self._unpack(value, header, body, key)
                    if is_corrupt := sealed is None:
                        break
                    read.append(sealed)
        except TierUnavailable:
            if not read:
                raise
        self._count(loaded=len(read))
        if is_corrupt:
            self._drop_corrupt(keys[len(read)])
        if read:
            self._refresh(keys, read)
        return len(read)

    def store(self, blocks: Sequence[Incoming]) -> int:
        """See the contract. Blocks that are held already are not sent again, and live longer from now on."""
        require_size([block.data for block in blocks], self.block_bytes)
        held = self._headers([block.key for block in blocks])
        missing = [block for block, sealed in zip(blocks, held, strict=True) if sealed is None]
        room = self._reserve(missing, {b.key: s.tenant for b, s in zip(blocks, held, strict=True) if s is not None})
        written = {block.key for block in self._write_within(missing, room)}
        tenants = {
            block.key: block.tenant if sealed is None else sealed.tenant
            for block, sealed in zip(blocks, held, strict=True)
            if sealed is not None or block.key in written
        }
        with suppress(TierUnavailable):
            self.link.run(self._life(tenants))
        count = next((n for n, block in enumerate(blocks) if block.key not in tenants), len(blocks))
        if blocks and not count and room:
            raise TierUnavailable("Redis takes no blocks now")
        return count

    def discard(self, keys: Sequence[BlockKey]) -> int:
        """See the contract."""
        held = self._headers(keys)
        answers = self.link.run([("UNLINK", self.names.block(key)) for key in keys])
        owners: defaultdict[str, list[BlockKey]] = defaultdict(list)
        for key, sealed in zip(keys, held, strict=True):
            if sealed is not None:
                owners[sealed.tenant].append(key)
        self.link.run(self.charges.refund(owners))
        return sum(int(answer) for answer in answers if isinstance(answer, int))

    def rule(self, shares: Shares) -> None:
        """See the contract. Of no effect where Redis alone bounds what it holds."""
        if self.budget is not None:
            self.budget.shares = shares

    def usage(self) -> Usage:
        """See the contract. Where Redis is out of reach, what was known last; never raises."""
        with suppress(TierUnavailable):
            self._last_known = self.charges.by_tenant()
        charged = dict(self._last_known)
        with self._lock:
            counters = dict(self.counters)
        counters["failures"] = self.link.breaker.failures
        size = sum(charged.values())
        capacity = self.budget.blocks * self.block_bytes if self.budget is not None else 0
        return Usage(size // self.block_bytes, size, capacity, charged, counters)

    def check(self) -> None:
        """See the contract. Blocks are Redis's to keep or to evict; ours are the connections."""
        self.link.check()

    def close(self) -> None:
        """See the contract."""
        self._refresher.shutdown(wait=False, cancel_futures=True)
        if self._owns_link:
            self.link.close()

    # -- reading ---------------------------------------------------------------------------------------
    def _unpack(self, value: Any, header: memoryview, body: memoryview, key: BlockKey) -> Sealed | None:
        """What the header says of the bytes in `body`; None if they are not what was sealed."""
        if value is not FILLED:
            if len(value) != HEADER_BYTES + self.block_bytes:
                return None
            header[:], body[:] = memoryview(value)[:HEADER_BYTES], memoryview(value)[HEADER_BYTES:]
        sealed = read_header(header, key)
        if sealed is None or sealed.length != self.block_bytes:
            return None
        return sealed if checksum(body) == sealed.checksum else None

    def _headers(self, keys: Sequence[BlockKey]) -> list[Sealed | None]:
        """Of blocks that are held. Does not verify their bytes."""
        answers = self.link.run([("GETRANGE", self.names.block(key), 0, HEADER_BYTES - 1) for key in keys])
        return [read_header(_bytes_of(answer) or b"", key) for key, answer in zip(keys, answers, strict=True)]

    def _drop_corrupt(self, key: BlockKey) -> None:
        log.warning("a block in Redis failed its checksum and is deleted: %s", key[:4].hex())
        self._count(corrupt=1)
        with suppress(TierUnavailable):
            self.discard([key])

    def _refresh(self, keys: Sequence[BlockKey], read: Sequence[Sealed]) -> None:
        """Have blocks that were read live longer, without having the reader wait for it."""
        tenants = {key: sealed.tenant for key, sealed in zip(keys, read, strict=False)}

        def refresh() -> None:
            with self._lock:
                self._waiting -= 1
            with suppress(TierUnavailable):
                self.link.run(self._life(tenants))

        with self._lock:
            if self._waiting >= REFRESHES:
                return
            self._waiting += 1
        with suppress(RuntimeError):  # closed meanwhile
            self._refresher.submit(refresh)

    # -- writing ---------------------------------------------------------------------------------------
    def _reserve(self, blocks: Sequence[Incoming], held: dict[BlockKey, str]) -> int:
        """For how many leading ones there is room beside those of the call that are `held`, by tenant, already."""
        if self.budget is None or not blocks:
            return len(blocks)
        self.link.run(self._life(held))  # they are not to be the oldest
        room = 0
        for (tenant, is_preload), run in groupby(
            blocks, lambda each: (each.tenant, each.speculative_until is not None)
        ):
            wanted = len(list(run))
            given = self.budget.reserve(tenant, wanted, held, is_preload=is_preload)
            room += given
            if given < wanted:
                break
        self._count(refused=len(blocks) - room)
        return room

    def _write_within(self, blocks: Sequence[Incoming], room: int) -> Sequence[Incoming]:
        """Send the first `room` blocks; those that were taken."""
        written = 0
        try:
            written = self._write(blocks[:room])
        finally:
            if self.budget is not None:
                for block in blocks[written:room]:
                    self.budget.give_back(block.tenant, 1)
        return blocks[:written]

    def _write(self, blocks: Sequence[Incoming]) -> int:
        """Send them until one is refused; how many were taken."""
        now = self.link.clock()
        if not blocks:
            return 0
        if not self._room.allows(now):
            self._count(refused=len(blocks))
            return 0
        stored = 0
        refusal: ResponseError | None = None
        sets = (("SET", self.names.block(block.key), value_of(block), "PX", self._ttl_ms) for block in blocks)
        try:
            with self.link.exchange() as exchange:
                for answer in exchange.stream(sets, self._window):
                    if isinstance(answer, ResponseError) and not isinstance(answer, MOVED):
                        refusal = answer
                        break
                    granted(answer)
                    stored += 1
        except TierUnavailable:
            if not stored:
                raise
        self._count(stored=stored, refused=len(blocks) - stored if refusal else 0)
        self._note_room(refusal, now)
        return stored

    def _note_room(self, refusal: ResponseError | None, now: float) -> None:
        if refusal is None:
            self._room.succeeded()
            return
        if not self._room.is_open:
            log.warning("Redis takes no blocks: %s", refusal)
        self._room.failed(now)

    def _life(self, tenants: dict[BlockKey, str]) -> list[Command]:
        """The commands that have blocks live for another while, and charge them as long."""
        owners: defaultdict[str, list[BlockKey]] = defaultdict(list)
        for key, tenant in tenants.items():
            owners[tenant].append(key)
        stay: Iterable[Command] = (("PEXPIRE", self.names.block(key), self._ttl_ms) for key in tenants)
        return [*stay, *self.charges.charge(owners)]

    def _count_evicted(self, blocks: int) -> None:
        self._count(evicted=blocks)

    def _count(self, **more: int) -> None:
        with self._lock:
            self.counters.update(more)


def _bytes_of(answer: Any) -> bytes | None:
    """What was read, or None. What is no string is no block of ours: as good as no bytes."""
    if isinstance(answer, ResponseError) and str(answer).startswith("WRONGTYPE"):
        return b""
    value: bytes | None = granted(answer)
    return value
