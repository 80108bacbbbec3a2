"""Bytes that each tenant is charged for in Redis, counted by all nodes together.

Promises
- For each tenant a sorted set holds the keys of its blocks by the time when they expire: what expires, uncounts
  itself. What Redis evicted before its time is found by asking for a sample of the blocks each time that the bytes
  are read; those gone are taken out, and the count of the others is scaled by the share that was there.
- So a figure is exact as long as all blocks fit the sample (`SAMPLE`), and an estimate beyond.
- A block is charged to the first who stored it, for as long as it stays.
- Nothing reads the whole keyspace. Raises TierUnavailable, as the link does. Unix time, which nodes must agree on to
  within the time that blocks live.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice

from kvprefetch.cache.keys import BlockKey
from kvprefetch.tiers.redis_block import Names
from kvprefetch.tiers.redis_link import Command, Exchange, RedisLink, granted

SAMPLE = 4_096  # blocks asked for by one reading, of all tenants
LEAST = 64  # of each tenant
AT_ONCE = 512  # keys in one command


class Charges:
    """See the module's promises. Thread-safe."""

    def __init__(
        self, link: RedisLink, names: Names, block_bytes: int, ttl_s: float, now: Callable[[], float] = time.time
    ) -> None:
        self._link, self._names, self._block_bytes, self._ttl_s, self._now = link, names, block_bytes, ttl_s, now

    def charge(self, keys: Mapping[str, Sequence[BlockKey]]) -> list[Command]:
        """The commands that charge `keys[tenant]` to each tenant from now on; to be run, whatever they answer."""
        now = self._now()
        expiry, stays_ms = now + self._ttl_s, int(1_000 * self._ttl_s) + 1_000
        commands: list[Command] = []
        for tenant, blocks in keys.items():
            charged = self._names.charged(tenant)
            for batch in _batches(blocks):
                scored = [part for key in batch for part in (expiry, key)]
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

    def by_tenant(self) -> dict[str, int]:
        """Bytes charged to each tenant now, by all nodes."""
        with self._link.exchange() as exchange:
            tenants = self._tenants(exchange)
            size = max(LEAST, SAMPLE // max(len(tenants), 1))
            counts = {tenant: self._count(exchange, tenant, size) for tenant in tenants}
        return {tenant: count * self._block_bytes for tenant, count in counts.items() if count}

    def _tenants(self, exchange: Exchange) -> list[str]:
        name = self._names.tenants
        _, members = exchange.run([("ZREMRANGEBYSCORE", name, "-inf", self._now()), ("ZRANGE", name, 0, -1)])
        return [member.decode(errors="replace") for member in granted(members)]

    def _count(self, exchange: Exchange, tenant: str, size: int) -> int:
        """Blocks of `tenant` that are there, by a sample of `size`; those of it that are gone are uncounted."""
        name = self._names.charged(tenant)
        exchange.limit.renew()
        _, cardinality, sample = exchange.run(
            [("ZREMRANGEBYSCORE", name, "-inf", self._now()), ("ZCARD", name), ("ZRANDMEMBER", name, size)]
        )
        count, sampled = int(granted(cardinality)), list(granted(sample))
        held = [granted(answer) for answer in exchange.run([("EXISTS", self._names.block(key)) for key in sampled])]
        gone = [key for key, is_held in zip(sampled, held, strict=True) if not is_held]
        if gone:
            exchange.run(self.refund({tenant: gone}))
        here = len(sampled) - len(gone)
        return here + round((count - len(sampled)) * here / max(len(sampled), 1))


def _batches(keys: Iterable[BlockKey]) -> Iterable[list[BlockKey]]:
    rest = iter(keys)
    while batch := list(islice(rest, AT_ONCE)):
        yield batch
