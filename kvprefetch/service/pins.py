"""Blocks that somebody wants kept in the arena for some seconds, whether used or not. Pure: `now` is an argument.

Promises: every pin ends by itself. A tenant's pins hold at most `most_slots` slots together, and no more than its
guarantee and its weighted part of what nobody is guaranteed, among those named and itself (LimitExceeded). All pins
together leave others what they are guaranteed; but one block of each tenant may always be pinned.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from kvprefetch.cache.block import Block
from kvprefetch.cache.chains import Run
from kvprefetch.cache.keys import BlockKey
from kvprefetch.cache.pool import BlockPool
from kvprefetch.cache.shares import Shares
from kvprefetch.errors import LimitExceeded

LONGEST_S = 3_600.0


@dataclass(eq=False, slots=True)
class Pin:
    """A holder of the pool's."""

    blocks: list[Block]  # the run's tails
    slots: int
    until: float


class Pins:
    """See the module's promises."""

    def __init__(self, pool: BlockPool, most_slots: int) -> None:
        self.pool, self.most_slots = pool, most_slots
        self.shares = Shares()
        self._pins: dict[tuple[str, BlockKey], Pin] = {}  # by tenant and last key

    def __len__(self) -> int:
        return len(self._pins)

    def pin(self, tenant: str, keys: tuple[BlockKey, ...], run: Run, hold_s: float, now: float) -> int:
        """Keep `run`, the leading ones of `keys`, for `hold_s`; 0 unpins. How many are pinned. LimitExceeded."""
        self.expire(now)
        if hold_s <= 0:
            for key in keys:
                self._drop((tenant, key))
            return 0
        if not run.count:
            return 0
        name = tenant, keys[run.count - 1]
        old = self._pins.get(name)
        pinned = self._pinned()
        mine, most = pinned[tenant] - (old.slots if old else 0), self._most(tenant, pinned)
        if mine + run.count > most:
            raise LimitExceeded(f"{mine} blocks of {tenant!r} are pinned, of {most}: unpin some")
        until = now + min(hold_s, LONGEST_S)
        pin = self._pins[name] = Pin(run.tails, run.count, max(until, old.until) if old else until)
        self.pool.hold(pin.blocks)
        self.pool.holders.add(pin)
        if old is not None:
            self._let_go(old)
        return run.count

    def expire(self, now: float) -> None:
        """End those whose time is over."""
        for name in [name for name, pin in self._pins.items() if pin.until <= now]:
            self._drop(name)

    def clear(self) -> None:
        """End all."""
        for name in list(self._pins):
            self._drop(name)

    # -- within ----------------------------------------------------------------------------------------
    def _pinned(self) -> Counter[str]:
        """Slots by tenant."""
        pinned: Counter[str] = Counter()
        for (tenant, _), pin in self._pins.items():
            pinned[tenant] += pin.slots
        return pinned

    def _most(self, tenant: str, pinned: Mapping[str, int]) -> int:
        """Slots that this tenant's pins may hold. O(tenants)."""
        pages, shares = self.pool.pages, self.shares
        others = (shares.named.keys() | pinned.keys()) - {tenant}
        left = pages - sum(max(shares.guaranteed(other, pages), pinned.get(other, 0)) for other in others)
        return max(min(self.most_slots, int(shares.part(tenant, pages)), left), 1)

    def _drop(self, name: tuple[str, BlockKey]) -> None:
        pin = self._pins.pop(name, None)
        if pin is not None:
            self._let_go(pin)

    def _let_go(self, pin: Pin) -> None:
        self.pool.holders.discard(pin)
        self.pool.release(pin.blocks)
