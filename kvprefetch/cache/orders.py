"""How the blocks of one tenant stand in line: by age, or by what it pays to keep them (DESIGN §7.3)."""

from collections.abc import Callable, Hashable
from math import inf, nextafter
from typing import Generic, TypeVar

from kvprefetch.cache.evict import Evictable
from kvprefetch.cache.guard import Guard

E_contra = TypeVar("E_contra", bound=Evictable, contravariant=True)


class ByAge:
    """Least recently used first."""

    rule = "lru"
    lasts_s = inf

    def first_key(self, leaf: Evictable) -> float:
        """Its last use."""
        return leaf.last_used

    def key(self, leaf: Evictable, now: float) -> float:
        """Its last use."""
        return leaf.last_used

    def epoch(self, tenant: str) -> Hashable:
        """A last use only grows."""
        return None

    def weighs(self, tenant: str) -> bool:
        """An age says nothing of worth."""
        return False


class ByIndex(Generic[E_contra]):
    """Lowest `index(leaf, now)` first, of equal ones speculation; by age for tenants whom the guard wants served so."""

    rule = "index"
    lasts_s = 1.0

    def __init__(self, index: Callable[[E_contra, float], float], guard: Guard | None = None) -> None:
        self.index, self.guard = index, guard

    def first_key(self, leaf: E_contra) -> float:
        """It is looked at when its turn comes."""
        return -inf

    def key(self, leaf: E_contra, now: float) -> float:
        """How well it pays to hold it, per second; or its last use."""
        if not self.weighs(leaf.tenant):
            return leaf.last_used
        value = self.index(leaf, now)
        return nextafter(value, -inf) if leaf.speculative else value

    def epoch(self, tenant: str) -> Hashable:
        """Whether the guard trusts the index."""
        return self.weighs(tenant)

    def weighs(self, tenant: str) -> bool:
        """Where the index is followed."""
        return self.guard is None or not self.guard.prefers_lru(tenant)
