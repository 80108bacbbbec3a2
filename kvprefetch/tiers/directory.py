"""Who has what: the nodes that hold a block in their arena or on their disk, so that others can read it from them.

Promises
- What is announced is forgotten `ttl_s` later, unless it is announced again: a node that died is soon gone from here.
  It is a hint: a node may have evicted the block since.
- Thread-safe; one batch of commands a call, within the link's `timeout_s`. Raises TierUnavailable, as the link does.
- Unix time, which nodes must agree on to within `ttl_s`.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence

from kvprefetch.cache.keys import BlockKey
from kvprefetch.settings import RedisSettings
from kvprefetch.tiers.redis_block import Names
from kvprefetch.tiers.redis_link import BATCH, Command, RedisLink, granted

FIRST_LOOK = 64  # keys; most prefixes end soon


class Directory:
    """See the module's promises. Without a `link` it opens, and closes, one of its own."""

    def __init__(
        self,
        settings: RedisSettings,
        namespace: str,
        *,
        link: RedisLink | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.link = link or RedisLink(settings)
        self._owns_link = link is None
        self._names = Names(settings.prefix, namespace)
        self._ttl_s, self._now = settings.ttl_s, now

    def announce(self, keys: Sequence[BlockKey], address: str) -> None:
        """The node at `address` ("host:port") has these, and will for a while."""
        now = self._now()
        commands: list[Command] = []
        for name in map(self._names.holders, keys):
            commands.append(("ZADD", name, now + self._ttl_s, address))
            commands.append(("ZREMRANGEBYSCORE", name, "-inf", now))
            commands.append(("PEXPIRE", name, int(1_000 * self._ttl_s)))
        self._run(commands)

    def withdraw(self, keys: Sequence[BlockKey], address: str) -> None:
        """The node at `address` has these no more."""
        self._run([("ZREM", self._names.holders(key), address) for key in keys])

    def who_has(self, keys: Sequence[BlockKey]) -> list[list[str]]:
        """For each leading key that any node has: the addresses of those that do, most lately announced first.

        Of very many keys, as far as it comes in half of `timeout_s`.
        """
        found: list[list[str]] = []
        size = FIRST_LOOK
        with self.link.exchange() as exchange:
            while some := keys[len(found) : len(found) + size]:
                now = self._now()
                asked = [("ZRANGEBYSCORE", self._names.holders(key), now, "+inf") for key in some]
                for answer in exchange.run(asked):
                    addresses = [address.decode() for address in granted(answer)]
                    if not addresses:
                        return found
                    found.append(addresses[::-1])
                if exchange.limit.is_short:
                    break
                size = BATCH
        return found

    def close(self) -> None:
        """Let go of the link, if it is its own."""
        if self._owns_link:
            self.link.close()

    def _run(self, commands: Sequence[Command]) -> None:
        for answer in self.link.run(commands):
            granted(answer)


def longest_run(found: Sequence[Sequence[str]], but: str = "") -> tuple[str, int]:
    """Of `who_has`: the address, other than `but`, that has most leading blocks, and how many; ("", 0) for nobody."""
    runs: Counter[str] = Counter()
    for n, addresses in enumerate(found):
        for address in addresses:
            if address != but and runs[address] == n:
                runs[address] = n + 1
    return max(runs.items(), key=lambda run: run[1], default=("", 0))
