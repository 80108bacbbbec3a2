"""Tenants over their guarantee stop paying for what they share, so that somebody else's guarantee is met.

Else a group's blocks would be out of reach for ever: those within their guarantee are protected because others pay
a part, and those others can give up nothing that is theirs alone. Pure.
"""

from collections.abc import Callable, Container, Iterator
from typing import NamedTuple

from kvprefetch.cache.accounts import Accounts
from kvprefetch.cache.block import Block


class _Part(NamedTuple):
    """What a tenant no longer pays."""

    block: Block
    tenant: str
    since: float
    answering: str  # who stood in line with the block


class Parting:
    """For one demand: which parts were given up for it, so far."""

    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts
        self._parts: list[_Part] = []
        self._seen = -1  # parts given up when the search began
        self._search: Iterator[tuple[Block, str]] = iter(())

    def __len__(self) -> int:
        return len(self._parts)

    def next(self, taken: Container[object], is_over: Callable[[str], bool]) -> Block | None:
        """A block, not among those taken, that one who is over pays for no more: that of the oldest use.

        None: there are no more. O(uses) for all, as often as somebody was over only by what others gave up.
        """
        while True:
            for block, tenant in self._search:
                if block not in taken and is_over(tenant):
                    answering = block.tenant
                    since = self._accounts.leave(block, tenant)
                    self._parts.append(_Part(block, tenant, since, answering))
                    return block
            if self._seen == len(self._parts):
                return None
            self._seen, self._search = len(self._parts), self._accounts.shared()

    def undo(self, kept: int) -> list[Block]:
        """All but the first `kept` were given up in vain: they are paid again. The blocks."""
        vain = self._parts[kept:]
        del self._parts[kept:]
        for part in reversed(vain):
            self._accounts.rejoin(part.block, part.tenant, part.since)
            part.block.tenant = part.answering
        self._seen, self._search = kept, iter(())
        return [part.block for part in vain]
