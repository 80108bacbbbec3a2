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
from typing import Any

from kvprefetch.cache.fair import whose_blocks_go
from kvprefetch.cache.keys import BlockKey
from kvprefetch.cache.shares import Shares
from kvprefetch.tiers.redis_block import HEADER_BYTES, Names, read_header
from kvprefetch.tiers.redis_charges import Charges
from kvprefetch.tiers.redis_link import Command, RedisLink, granted

AT_ONCE = 32
"""Blocks that go in one round."""
MOST_ROUNDS = 64
"""For one call: a budget that has become much smaller is met little by little."""
_READ_S = 1.0
_READING = 20  # of so many seconds, one may be spent on reading


class Budget:
    """See the module's promises. `blocks`: how many there may be. `evicted(n)` is told how many were deleted."""

    def __init__(
        self, link: RedisLink, names: Names, charges: Charges, blocks: int, evicted: Callable[[int], None]
    ) -> None:
        self.blocks, self.shares = blocks, Shares()
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
            asked = wanted
            self._add(tenant, asked)
            for _ in range(MOST_ROUNDS):
                missing = min(self._total - self.blocks, AT_ONCE)
                if missing <= 0 or not asked:
                    break
                going = {tenant: missing} if is_preload else self._whose(missing)
                mine = going.pop(tenant, 0)
                stored = self._charged[tenant] - asked
                if stored and mine:
                    going[tenant] = min(mine, stored)
                self._evict(going, kept, tenant, asked, 0 if is_preload else self._guaranteed(tenant))
                refused = min(max(mine - (stored + asked - self._charged[tenant]), 0), asked)
                self._add(tenant, -refused)  # nothing else of it can go
                asked -= refused
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

    def _whose(self, missing: int) -> dict[str, int]:
        return whose_blocks_go(self._charged, self.shares, self.blocks, missing)

    def _guaranteed(self, tenant: str) -> int:
        return self.shares.guaranteed(tenant, self.blocks)

    # -- what goes -------------------------------------------------------------------------------------
    def _evict(self, going: Mapping[str, int], kept: Collection[BlockKey], tenant: str, asked: int, floor: int) -> None:
        """Delete so many of the oldest blocks of these tenants, and see what is charged to each now.

        `asked`: blocks charged to `tenant` that are not stored yet; it keeps `floor` with them.
        """
        back: list[Command] = []
        deleted: list[tuple[str, BlockKey]] = []
        for victim, scores, left in self._pop(going):
            pending, least = (asked, floor) if victim == tenant else (0, self._guaranteed(victim))
            spare = [key for key in scores if key not in kept]
            short = least - pending - left - (len(scores) - len(spare))  # another node has taken some, too
            gone = spare[: len(spare) - min(max(short, 0), len(spare))]
            stays = {key: score for key, score in scores.items() if key not in set(gone)}
            if stays:
                parts = [part for key, score in stays.items() for part in (score, key)]
                back.append(("ZADD", self._names.charged(victim), "NX", *parts))
            deleted += [(victim, key) for key in gone]
            self._add(victim, left + len(stays) + pending - self._charged[victim])
        self._run(back)
        self._delete(deleted)

    def _pop(self, going: Mapping[str, int]) -> list[tuple[str, dict[BlockKey, float], int]]:
        """Of each tenant: the keys of so many of its oldest blocks, charged no more; how many it has left."""
        now = self._charges.now()
        commands: list[Command] = []
        for tenant, count in going.items():
            name = self._names.charged(tenant)
            commands += [("ZREMRANGEBYSCORE", name, "-inf", now), ("ZPOPMIN", name, count), ("ZCARD", name)]
        answers = self._run(commands)
        found = []
        for at, tenant in enumerate(going):
            popped, left = answers[3 * at + 1 : 3 * at + 3]
            found.append(
                (
                    tenant,
                    {bytes(key): float(score) for key, score in zip(popped[::2], popped[1::2], strict=True)},
                    int(left),
                )
            )
        return found

    def _delete(self, keys: list[tuple[str, BlockKey]]) -> None:
        """Those that are there, and that tenant's."""
        heads = self._link.run([("GETRANGE", self._names.block(key), 0, HEADER_BYTES - 1) for _, key in keys])
        names: list[Command] = []
        for (tenant, key), head in zip(keys, heads, strict=True):
            sealed = read_header(head, key) if isinstance(head, bytes) else None
            if sealed is not None and sealed.tenant == tenant:
                names.append(("UNLINK", self._names.block(key)))
        self._evicted(sum(self._run(names)))

    def _run(self, commands: list[Command]) -> list[Any]:
        return [granted(answer) for answer in self._link.run(commands)] if commands else []
