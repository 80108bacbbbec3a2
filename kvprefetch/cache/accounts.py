"""Who pays for the pages of a pool.

Promises
- Every page that is not free is charged: a tenant's own blocks, pinned and in-flight ones included, to it; public ones
  to the operator; those of a group to the tenants of the group that use them, in equal parts (law 5).
- Charges are exact: they add up to the pages taken, at every moment. A part is a whole number of `PART`s of a page.
- A part is due from a tenant's use on, and for `AGE_S` after its latest one; the last to have used a block goes on to
  pay for it. Whoever has the benefit has used it: there is no hit without a use. Who had it computed has used it; who
  only preloaded it pays until somebody does.
- Pure, raises nothing. What a clock that goes backwards says is taken for the latest moment known.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence

from kvprefetch.cache.block import Block, Charge

PART = 2.0**-20
"""Of a page. Multiples of it add up exactly in a double."""
AGE_S = 600.0
_SOON_S = AGE_S / 8
"""Uses that follow each other sooner count as the first of them: so few are kept in mind."""


class Accounts:
    """See the module's promises. Owned by one pool."""

    def __init__(self) -> None:
        self.charged: defaultdict[str, Counter[Charge]] = defaultdict(Counter)  # tenant → pages
        self.changed: set[str] = set()  # tenants whose charges changed; whoever ranks them empties it
        self.now = 0.0
        self._uses: deque[tuple[float, str, Block]] = deque()  # of groups' blocks, the oldest first

    def of(self, tenant: str, kind: Charge) -> float:
        """Pages that it pays for as this."""
        kinds = self.charged.get(tenant)
        return kinds[kind] if kinds is not None else 0

    def used(self, tenant: str) -> float:
        """All that it pays for but unused speculation: what counts towards its guarantee."""
        kinds = self.charged.get(tenant)
        return sum(kinds.values()) - kinds.get(Charge.SPECULATIVE, 0) if kinds is not None else 0

    def add(self, tenant: str, kind: Charge, pages: float) -> None:
        """It pays for so many more from now on, or fewer."""
        kinds = self.charged[tenant]
        left = kinds.get(kind, 0) + pages
        if left:
            kinds[kind] = left  # type: ignore[assignment]  # parts of pages are exact, too
        else:
            kinds.pop(kind, None)
            if not kinds:
                del self.charged[tenant]
        self.changed.add(tenant)

    # -- blocks ----------------------------------------------------------------------------------------
    def charge(self, block: Block) -> None:
        """Whoever pays for it does so from now on."""
        if block.payers is None:
            self.add(block.tenant, block.charge, 1)
        else:
            for tenant, part in parts(block.payers):
                self.add(tenant, block.charge, part)

    def refund(self, block: Block) -> None:
        """Nobody pays for it any more, as it is now."""
        if block.payers is None:
            self.add(block.tenant, block.charge, -1)
        else:
            for tenant, part in parts(block.payers):
                self.add(tenant, block.charge, -part)

    def close(self, block: Block) -> None:
        """Its page is free: nobody pays for it, now or ever."""
        self.refund(block)
        block.payers = None

    def share(self, block: Block, now: float) -> None:
        """A block that nobody pays for yet is a group's: its tenant pays, and whoever uses it."""
        now = self.now = max(self.now, now)
        block.payers = {block.tenant: now}
        self._uses.append((now, block.tenant, block))
        self.charge(block)

    def use_first(self, block: Block, tenant: str, now: float) -> None:
        """A live request of `tenant` uses unused speculation. A group's: who preloaded it pays no more."""
        self.refund(block)
        block.unused = None
        if block.payers is not None and tenant:
            block.tenant = tenant
            self.share(block, now)
        else:
            self.charge(block)

    def use(self, block: Block, tenant: str, now: float) -> None:
        """A live request of `tenant` uses a group's block: it is among those who pay."""
        payers = block.payers
        if payers is None:
            return
        now = self.now = max(self.now, now)
        block.tenant = tenant
        if tenant in payers and payers[tenant] > now - _SOON_S:
            return
        self.refund(block)
        for other in [other for other, at in payers.items() if at <= now - AGE_S]:
            del payers[other]
        payers[tenant] = now
        self.charge(block)
        self._uses.append((now, tenant, block))

    def leave(self, block: Block, tenant: str) -> float:
        """It pays for this block no more; others who do pay its part. Returns when it used it."""
        assert block.payers is not None
        self.refund(block)
        at = block.payers.pop(tenant)
        if block.tenant == tenant:
            block.tenant = max(block.payers, key=block.payers.__getitem__)
        self.charge(block)
        return at

    def rejoin(self, block: Block, tenant: str, at: float) -> None:
        """It had not left: it pays its part since `at`."""
        assert block.payers is not None
        self.refund(block)
        block.payers[tenant] = at
        self.charge(block)

    def age(self, now: float) -> list[Block]:
        """Take out those who used blocks too long ago. The blocks that another answers for from now on."""
        now = self.now = max(self.now, now)
        passed = []
        while self._uses and self._uses[0][0] <= now - AGE_S:
            at, tenant, block = self._uses.popleft()
            payers = block.payers
            if payers is None or payers.get(tenant) != at or len(payers) == 1:
                continue
            answered = block.tenant
            self.leave(block, tenant)
            if block.tenant != answered:
                passed.append(block)
        return passed

    def shared(self) -> Iterator[tuple[Block, str]]:
        """Blocks that several pay for, with each who does: those of the oldest use first. O(uses)."""
        for at, tenant, block in self._uses:
            if block.payers is not None and len(block.payers) > 1 and block.payers.get(tenant) == at:
                yield block, tenant


def parts(payers: dict[str, float]) -> Sequence[tuple[str, float]]:
    """What part of a page each of these pays."""
    even, left = divmod(round(1 / PART), len(payers))
    return [(tenant, PART * (even + (at < left))) for at, tenant in enumerate(payers)]
