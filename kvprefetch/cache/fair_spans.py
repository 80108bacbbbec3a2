"""A pool in runs of blocks that evicts fairly, as `BlockPool` does: same accounts, same line.

`tests/cache/test_fair_spans.py` proves that both keep the same blocks, step by step.
"""

from kvprefetch.cache.accounts import Accounts
from kvprefetch.cache.block import Charge
from kvprefetch.cache.evict import Demand, lru
from kvprefetch.cache.line import CLAIM_S, Line, Order
from kvprefetch.cache.orders import ByAge
from kvprefetch.cache.shares import Shares
from kvprefetch.cache.spans import Path, Span, SpanPool
from kvprefetch.errors import AccountingError


class FairSpanPool(SpanPool):
    """A `SpanPool` whose victims stand in line. Promises of blocks are charged as what is in flight."""

    def __init__(
        self,
        capacity: int,
        order: Order[Span] | None = None,
        shares: Shares | None = None,
        claim_s: float = CLAIM_S,
        merges: bool = True,
    ) -> None:
        super().__init__(capacity, lru, merges)
        self.accounts = Accounts()
        self.line: Line[Span] = Line(order or ByAge(), self.accounts, capacity, claim_s)
        self.line.rule(shares or Shares(), capacity)

    def reserve(self, count: int, demand: Demand) -> None:
        """See `SpanPool`."""
        super().reserve(count, demand)
        if count:
            self.accounts.add(demand.tenant, Charge.IN_FLIGHT, count)

    def unreserve(self, count: int, tenant: str) -> None:
        """See `SpanPool`."""
        super().unreserve(count, tenant)
        if count:
            self.accounts.add(tenant, Charge.IN_FLIGHT, -count)

    def insert(
        self,
        path: Path,
        upto: int,
        tenant: str,
        session: str,
        now: float,
        speculative_until: float | None = None,
    ) -> int:
        """See `SpanPool`."""
        fresh = super().insert(path, upto, tenant, session, now, speculative_until)
        if fresh:
            self.accounts.add(tenant, Charge.USED if speculative_until is None else Charge.SPECULATIVE, fresh)
        return fresh

    def touch(self, path: Path, count: int, tenant: str, session: str, now: float) -> None:
        """See `SpanPool`."""
        for span in self.path_spans(path, count):
            if span.speculative or span.tenant != tenant:
                self.accounts.add(span.tenant, _charge(span), -span.count)
                self.accounts.add(tenant, Charge.USED, span.count)
        super().touch(path, count, tenant, session, now)
        for span in self.path_spans(path, count)[-1:]:
            self._note_leaf(span)

    def cut(self, span: Span, count: int) -> None:
        """See `SpanPool`."""
        tenant, charge = span.tenant, _charge(span)
        super().cut(span, count)
        self.accounts.add(tenant, charge, -count)

    def check(self) -> None:
        """See `SpanPool`."""
        super().check()
        taken = Accounts()
        for span in self.spans():
            taken.add(span.tenant, _charge(span), span.count)
        for tenant in {*taken.charged, *self.accounts.charged}:
            used = taken.of(tenant, Charge.USED), taken.of(tenant, Charge.SPECULATIVE)
            charged = self.accounts.of(tenant, Charge.USED), self.accounts.of(tenant, Charge.SPECULATIVE)
            if used != charged:
                raise AccountingError(f"tenant {tenant!r} is charged {charged}, its blocks are {used}")
        promised = sum(self.accounts.of(tenant, Charge.IN_FLIGHT) for tenant in self.accounts.charged)
        if promised != self.reserved:
            raise AccountingError(f"{promised} promised blocks are charged, there are {self.reserved}")

    # -- within ----------------------------------------------------------------------------------------
    def _choose(self, missing: int, demand: Demand) -> list[tuple[Span, int]] | None:
        victims = self.line.choose(missing, demand, asked=missing + self.free)
        return [(victim.leaf, victim.pages) for victim in victims] if victims else None

    def _note_leaf(self, span: Span) -> None:
        super()._note_leaf(span)
        if span in self.leaves:
            self.line.put(span)


def _charge(span: Span) -> Charge:
    return Charge.SPECULATIVE if span.speculative else Charge.USED
