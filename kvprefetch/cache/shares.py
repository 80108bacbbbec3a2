"""What each tenant may count on in a pool: its guarantee, and its weight in all that nobody is guaranteed.

Immutable: who changes a share makes new `Shares`. Pure. Guarantees are fractions of a pool, so that one set of them
rules pools of every size, on every tier and node.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import isfinite
from typing import NamedTuple

from kvprefetch.errors import InvalidRequest
from kvprefetch.settings import Settings

OPERATOR = ""
"""Whom public blocks are charged to. No tenant has that name."""


@dataclass(frozen=True, slots=True)
class Share:
    """One tenant's. Raises InvalidRequest for what is no share."""

    weight: float = 1.0
    guarantee: float = 0.0  # of every pool, from 0 to 1

    def __post_init__(self) -> None:
        if not (isfinite(self.weight) and self.weight > 0):
            raise InvalidRequest(f"a weight is a finite number above 0, not {self.weight}")
        if not 0 <= self.guarantee <= 1:
            raise InvalidRequest(f"a guarantee is a fraction of the pool from 0 to 1, not {self.guarantee}")


NOTHING = Share()


class Claims(NamedTuple):
    """Of several tenants, added up."""

    weight: float
    guarantee: float


@dataclass(frozen=True)
class Shares:
    """See the module's promises. Raises InvalidRequest where more than all of a pool is guaranteed.

    Who is not named has weight 1 and no guarantee.
    """

    named: Mapping[str, Share] = field(default_factory=dict)

    def __post_init__(self) -> None:
        total = sum(share.guarantee for share in self.named.values())
        if total > 1 + 1e-9:
            raise InvalidRequest(f"guarantees add up to {total:.1%} of a pool: lower some")

    def of(self, tenant: str) -> Share:
        """The tenant's share."""
        return self.named.get(tenant, NOTHING)

    def weight(self, tenant: str) -> float:
        """Its weight."""
        return self.of(tenant).weight

    def guaranteed(self, tenant: str, pages: int) -> int:
        """Pages of a pool of `pages` that are its own whenever it wants them."""
        return int(self.of(tenant).guarantee * pages + 1e-6)

    def claims(self, tenants: Iterable[str]) -> "Claims":
        """What these have together."""
        shares = [self.of(tenant) for tenant in tenants]
        return Claims(sum(share.weight for share in shares), sum(share.guarantee for share in shares))

    def part(self, tenant: str, pages: int, among: "Claims | None" = None) -> float:
        """Pages of its guarantee and of its weighted part of the rest, if all wanted theirs whose claims these are.

        `among`: its own included; by default, of all who are named.
        """
        share = self.of(tenant)
        if among is None:
            among = self._named
            if tenant not in self.named:
                among = Claims(among.weight + share.weight, among.guarantee)
        return pages * (
            share.guarantee + max(1 - among.guarantee, 0.0) * share.weight / max(among.weight, share.weight)
        )

    @cached_property
    def _named(self) -> "Claims":
        return self.claims(self.named)

    def require_fit(self, pages: int) -> None:
        """Raise InvalidRequest where somebody's guarantee is less than one page of a pool of `pages`."""
        for tenant, share in self.named.items():
            if share.guarantee and not self.guaranteed(tenant, pages):
                raise InvalidRequest(
                    f"the guarantee of {tenant!r} ({share.guarantee:.3%}) is less than one of {pages} pages"
                )


def shares_of(settings: Settings) -> Shares:
    """Those of the settings: tenants by name, and every other tenant with a credential by `fairness.guarantee`."""
    named = {each.name: Share(each.weight, each.guarantee) for each in settings.tenants}
    others = {each.name for each in settings.credentials if each.role == "tenant"} - named.keys()
    left = max(1 - sum(share.guarantee for share in named.values()), 0.0)
    for tenant in sorted(others):
        named[tenant] = Share(guarantee=settings.fairness.guarantee * left / len(others))
    return Shares(named)
