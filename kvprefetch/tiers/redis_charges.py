"""Bytes that each tenant is charged for in Redis, counted by all nodes together.

Promises
- For each tenant a sorted set holds the keys of its blocks by the time when they expire: what expires, uncounts
  itself. What Redis evicted before its time is found by asking for a sample of the blocks each time that the bytes
  are read; those gone are taken out, and the count of the others is scaled by the share that was there.
- So a figure is exact as long as all blocks fit the sample (`SAMPLE`), and an estimate beyond.
- A block is charged to the first who stored it, for as long as it stays.
- `counted` is what the sets say, with what Redis has evicted before its time: for whoever asks every second.
- Nothing reads the whole keyspace. Raises TierUnavailable, as the link does. Unix time, which nodes must agree on to
  within the time that blocks live.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import count, islice
from typing import TypeVar

from kvprefetch.cache.keys import BlockKey
from kvprefetch.tiers.redis_block import Names
from kvprefetch.tiers.redis_link import BATCH, Command, Exchange, RedisLink, granted

T = TypeVar("T")

SAMPLE = 4_096  # blocks asked for by one reading, of all tenants
LEAST = 64  # of each tenant
AT_ONCE = 512  # keys in one command
_APART_S = 1e-6  # of one call's blocks each is older than the one before it: the end of a sequence is evicted first


class Charges:
    """See the module's promises. Thread-safe."""

    def __init__(
        self, link: RedisLink, names: Names, block_bytes: int, ttl_s: float, now: Callable[[], float] = time.time
    ) -> None:
        self._link, self._names, self._block_bytes, self._ttl_s, self.now = link, names, block_bytes, ttl_s, now

    def charge(self, keys: Mapping[str, Sequence[BlockKey]]) -> list[Command]:
        """The commands that charge `keys[tenant]` to each tenant from now on; to be run, whatever they answer."""
        now = self.now()
        expiry, stays_ms = now + self._ttl_s, int(1_000 * self._ttl_s) + 1_000
        commands: list[Command] = []
        for tenant, blocks in keys.items():
            charged = self._names.charged(tenant)
            scores = count(expiry, -_APART_S)
            for batch in _batches(blocks):
                scored = [part for key in batch for part in (next(scores), key)]
                commands.append(("ZADD", charged, *scored))
            commands.append(("PEXPIRE", charged, stays_ms))
            commands.append(("ZADD", self._names.tenants, expiry, tenant.encode()))
        if commands:
            commands.append(("PEXPIRE", self._names.tenants, stays_ms))
        return commands

    def refund(self, keys: Mapping[str, Sequence[BlockKey]]) -> list[Command]:
        """The commands that charge `keys[tenant]` to that tenant no more."""
        return [
            ("ZREM", self._names.charged(tenant), *batch)
            for tenant, blocks in keys.items()
            for batch in _batches(blocks)
        ]

    def counted(self) -> dict[str, int]:
        """Blocks charged to each tenant by all nodes, some of which may be gone. One short command for each tenant."""
        now, counts = self.now(), list[int]()
        with self._link.exchange() as exchange:
            tenants = self._tenants(exchange)
            for batch in _batches(tenants, BATCH):
                exchange.limit.renew()
                asked = [("ZCOUNT", self._names.charged(tenant), now, "+inf") for tenant in batch]
                counts += [int(granted(answer)) for answer in exchange.run(asked)]
        return {tenant: count for tenant, count in zip(tenants, counts, strict=True) if count}

    def by_tenant(self) -> dict[str, int]:
        """Bytes charged to each tenant now, by all nodes."""
        with self._link.exchange() as exchange:
            tenants = self._tenants(exchange)
            size = max(LEAST, SAMPLE // max(len(tenants), 1))
            counts = {tenant: self._count(exchange, tenant, size) for tenant in tenants}
        return {tenant: count * self._block_bytes for tenant, count in counts.items() if count}

    def _tenants(self, exchange: Exchange) -> list[str]:
        name = self._names.tenants
        _, members = exchange.run([("ZREMRANGEBYSCORE", name, "-inf", self.now()), ("ZRANGE", name, 0, -1)])
        return [member.decode(errors="replace") for member in granted(members)]

    def _count(self, exchange: Exchange, tenant: str, size: int) -> int:
        """Blocks of `tenant` that are there, by a sample of `size`; those of it that are gone are uncounted."""
        name = self._names.charged(tenant)
        exchange.limit.renew()
        _, cardinality, sample = exchange.run(
            [("ZREMRANGEBYSCORE", name, "-inf", self.now()), ("ZCARD", name), ("ZRANDMEMBER", name, size)]
        )
        count, sampled = int(granted(cardinality)), list(granted(sample))
        held = [granted(answer) for answer in exchange.run([("EXISTS", self._names.block(key)) for key in sampled])]
        gone = [key for key, is_held in zip(sampled, held, strict=True) if not is_held]
        if gone:
            exchange.run(self.refund({tenant: gone}))
        here = len(sampled) - len(gone)
        return here + round((count - len(sampled)) * here / max(len(sampled), 1))


def _batches(things: Iterable[T], size: int = AT_ONCE) -> Iterable[list[T]]:
    rest = iter(things)
    while batch := list(islice(rest, size)):
        yield batch
