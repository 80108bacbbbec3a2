"""Room in Redis for the blocks of all nodes together, where they may have only so much: whose go, and which.

Promises
- What all nodes have charged is read at most once a second, and a twentieth of the time; what this node has stored
  and evicted since is added. So nodes together may be over the budget by what they store in a second: it is evicted
  when they store again.
- Who goes is for `cache.fair` to say: those furthest over their guarantee by weight, the tenant that stores among them.
  Of a tenant those blocks go that were stored or read longest ago; of one call's, the last first. A preload takes of
  its own tenant alone.
- Nodes may evict at the same time. Keys are popped, so that no two nodes have the same, and what a tenant needs for its
  guarantee is put back before any block is deleted. A node that dies in between leaves a round of blocks (`AT_ONCE`)
  uncounted until they are read, or expire.
- A block is deleted only if it says itself that it is that tenant's. Keys of what Redis has evicted by its own policy
  are charged until their turn comes, and bring no room. That policy knows no tenants: guarantees hold as long as
  Redis's `maxmemory` is above the budgets.
- Used and preloaded blocks are charged alike here.
- Thread-safe; one at a time makes room, and waits for Redis. Raises TierUnavailable, as the link does.
"""

import threading
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from math import inf
from typing import Any, NamedTuple

from kvprefetch.cache.fair import whose_blocks_go
from kvprefetch.cache.keys import BlockKey
from kvprefetch.cache.shares import Shares
from kvprefetch.errors import SettingsError, TierUnavailable
from kvprefetch.settings import parse_bytes
from kvprefetch.tiers.redis_block import HEADER_BYTES, Names, read_header
from kvprefetch.tiers.redis_charges import Charges
from kvprefetch.tiers.redis_link import Command, RedisLink, granted

AT_ONCE = 32
"""Blocks that go in one round."""
MOST_ROUNDS = 64
"""For one call: a budget that has become much smaller is met little by little."""
_READ_S = 1.0
_READING = 20  # of so many seconds, one may be spent on reading


class _Popped(NamedTuple):
    """What was taken out of one tenant's charges."""

    tenant: str
    scores: dict[BlockKey, float]  # the oldest first
    left: int  # blocks that are charged to it still


class Budget:
    """See the module's promises. `evicted(n)` is told how many blocks were deleted. Raises SettingsError."""

    def __init__(
        self,
        link: RedisLink,
        names: Names,
        charges: Charges,
        size: str,
        block_bytes: int,
        evicted: Callable[[int], object],
    ) -> None:
        self.blocks = parse_bytes(size, "redis.size") // (HEADER_BYTES + block_bytes)  # that there may be
        if self.blocks < 1:
            raise SettingsError(f"redis.size {size!r} holds not one block of {block_bytes} bytes: set more")
        self.shares = Shares()
        self._link, self._names, self._charges, self._evicted = link, names, charges, evicted
        self._charged: Counter[str] = Counter()  # as it was read, and what was done since
        self._total = 0
        self._read_again = -inf
        self._lock = threading.Lock()

    def reserve(self, tenant: str, wanted: int, kept: Collection[BlockKey], *, is_preload: bool = False) -> int:
        """For how many of the `wanted` blocks that `tenant` is about to store there is room, or was made.

        They are charged from now on. `kept` are not evicted for it.
        """
        with self._lock:
            self._read()
            self._add(tenant, wanted)
            asked = wanted
            try:
                for _ in range(MOST_ROUNDS):
                    missing = min(self._total - self.blocks, AT_ONCE)
                    if missing <= 0 or not asked:
                        break
                    refused = self._make_room(tenant, missing, asked, kept, is_preload)
                    self._add(tenant, -refused)
                    asked -= refused
            except TierUnavailable:
                self._add(tenant, -asked)
                raise
            refused = min(max(self._total - self.blocks, 0), asked)
            self._add(tenant, -refused)
            return asked - refused

    def give_back(self, tenant: str, blocks: int) -> None:
        """So many of them were not stored after all."""
        with self._lock:
            self._add(tenant, -min(blocks, self._charged[tenant]))

    # -- what is charged -------------------------------------------------------------------------------
    def _read(self) -> None:
        began = self._link.clock()
        if began < self._read_again:
            return
        self._charged = Counter(self._charges.counted())
        self._total = self._charged.total()
        ended = self._link.clock()
        self._read_again = ended + max(_READ_S, _READING * (ended - began))

    def _add(self, tenant: str, blocks: int) -> None:
        self._charged[tenant] += blocks
        self._total += blocks
        if not self._charged[tenant]:
            del self._charged[tenant]

    # -- what goes -------------------------------------------------------------------------------------
    def _make_room(self, tenant: str, missing: int, asked: int, kept: Collection[BlockKey], is_preload: bool) -> int:
        """One round; how many of the blocks that `tenant` asks for have to stay out, as nothing else of it can go."""
        going = {tenant: missing}
        if not is_preload:
            going = whose_blocks_go(self._charged, self.shares, self.blocks, missing)
        mine = going.pop(tenant, 0)
        stored = self._charged[tenant] - asked
        if stored and mine:
            going[tenant] = min(mine, stored)
        gone = self._evict(going, kept, tenant, asked, is_preload)
        return min(max(mine - max(gone, stored + asked - self._charged[tenant]), 0), asked)

    def _evict(
        self, going: Mapping[str, int], kept: Collection[BlockKey], tenant: str, asked: int, is_preload: bool
    ) -> int:
        """Delete so many of the oldest blocks of these tenants, and see what is charged to each now.

        `asked`: blocks charged to `tenant` that are not stored yet. How many of its own went.
        """
        back: list[Command] = []
        deleted: list[tuple[str, BlockKey]] = []
        for victim, scores, left in self._pop(going):
            pending = asked if victim == tenant else 0
            least = 0 if is_preload else self.shares.guaranteed(victim, self.blocks) - pending
            spare = [key for key in scores if key not in kept]
            short = least - left - (len(scores) - len(spare))  # another node has taken some, too
            gone = set(spare[: len(spare) - min(max(short, 0), len(spare))])
            stays = {key: score for key, score in scores.items() if key not in gone}
            if stays:
                parts = [part for key, score in stays.items() for part in (score, key)]
                back.append(("ZADD", self._names.charged(victim), "NX", *parts))
            deleted += [(victim, key) for key in gone]
            self._add(victim, left + len(stays) + pending - self._charged[victim])
        self._run(back)
        self._delete(deleted)
        return sum(victim == tenant for victim, _ in deleted)

    def _pop(self, going: Mapping[str, int]) -> list[_Popped]:
        """Have the oldest blocks of each of these tenants, so many, charged no more."""
        now = self._charges.now()
        commands: list[Command] = []
        for tenant, count in going.items():
            name = self._names.charged(tenant)
            commands += [("ZREMRANGEBYSCORE", name, "-inf", now), ("ZPOPMIN", name, count), ("ZCARD", name)]
        answers = iter(self._run(commands))
        popped = []
        for tenant, (_, flat, left) in zip(going, zip(answers, answers, answers, strict=True), strict=True):
            scores = {bytes(key): float(score) for key, score in zip(flat[::2], flat[1::2], strict=True)}
            popped.append(_Popped(tenant, scores, int(left)))
        return popped

    def _delete(self, keys: list[tuple[str, BlockKey]]) -> None:
        """Those that are there, and that tenant's."""
        if not keys:
            return
        heads = self._link.run([("GETRANGE", self._names.block(key), 0, HEADER_BYTES - 1) for _, key in keys])
        names: list[Command] = []
        for (tenant, key), head in zip(keys, heads, strict=True):
            sealed = read_header(head, key) if isinstance(head, bytes) else None
            if sealed is not None and sealed.tenant == tenant:
                names.append(("UNLINK", self._names.block(key)))
        self._evicted(sum(self._run(names)))

    def _run(self, commands: list[Command]) -> list[Any]:
        return [granted(answer) for answer in self._link.run(commands)] if commands else []
