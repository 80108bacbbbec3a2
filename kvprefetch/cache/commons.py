"""Namespaces that more than one tenant reads, and which of their blocks were filled.

Promises
- A sequence may begin with blocks of shared namespaces (`borrow`); behind them it goes on with its own: the KV of a
  block depends on its tokens alone, so a private block may follow a public one.
- Reading fills nothing: who borrows a block names it by a key that somebody entitled has published (law 4).
- Bounded: `most` keys, those filled first forgotten. Reading is for any thread, changing for the pool's.
- Where nothing is filled, nothing is hashed.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from kvprefetch.cache.keys import BlockKey, Scope, next_key, spans_of


@dataclass
class Commons:
    """See the module's promises."""

    most: int = 262_144
    _filled: dict[BlockKey, bool] = field(default_factory=dict)  # key → of a group's

    def __len__(self) -> int:
        return len(self._filled)

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._filled

    def is_group(self, key: BlockKey) -> bool:
        """Whether those who use this block pay for it; else the operator does."""
        return self._filled.get(key, False)

    def fill(self, key: BlockKey, *, is_group: bool) -> None:
        """A block is there under this key."""
        self._filled.pop(key, None)
        self._filled[key] = is_group
        if len(self._filled) > self.most:
            del self._filled[next(iter(self._filled))]

    def forget(self, keys: Iterable[BlockKey]) -> None:
        """They are gone from every tier that is looked at."""
        for key in keys:
            self._filled.pop(key, None)

    def clear(self) -> None:
        """All are gone."""
        self._filled.clear()


@dataclass(frozen=True)
class Owner:
    """Whose sequences these are: the root of their keys, and who is charged."""

    root: BlockKey
    tenant: str
    scope: Scope = Scope.PRIVATE  # of that root
    shared: tuple[BlockKey, ...] = ()  # roots of namespaces that its sequences may begin with, the foremost first
    commons: Commons | None = None  # of its worker; None: nothing is shared

    @property
    def is_group(self) -> bool:
        """Whether those who use its blocks pay for them in parts."""
        return self.scope is Scope.GROUP

    def filled(self, key: BlockKey) -> None:
        """A block of its sequences is published under this key; where others may read it, that is noted."""
        if self.commons is not None and self.scope is not Scope.PRIVATE:
            self.commons.fill(key, is_group=self.is_group)


def borrow(owner: Owner, tokens: Sequence[int], block_tokens: int) -> list[BlockKey]:
    """Keys of the leading blocks of `tokens` that are filled under one of the owner's shared roots."""
    commons = owner.commons
    if not commons or not owner.shared:
        return []
    keys: list[BlockKey] = []
    latest = list(owner.shared)
    for data in spans_of(tokens, block_tokens):
        latest = [next_key(key, data) for key in latest]
        known = next((key for key in latest if key in commons), None)
        if known is None:
            break
        keys.append(known)
    return keys
