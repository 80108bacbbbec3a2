"""Who pays for the pages of a pool.

Promises
- Every page that is not free is charged: a tenant's own blocks, pinned and in-flight ones included, to it; public ones
  to the operator; those of a group to the tenants of the group that use them, in equal parts (law 5).
- Charges are exact: they add up to the pages taken, at every moment. A part is a whole number of `PART`s of a page.
- A part is due from a tenant's use on, and for `AGE_S` after its latest one; the last to have used a block goes on to
  pay for it. Whoever has the benefit has used it: there is no hit without a use.
- Pure, raises nothing. What a clock that goes backwards says is taken for the latest moment known.
"""

from collections import Counter, defaultdict, deque

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
        return kinds.total() - kinds[Charge.SPECULATIVE] if kinds is not None else 0

    def add(self, tenant: str, kind: Charge, pages: float) -> None:
        """It pays for so many more from now on, or fewer."""
        kinds = self.charged[tenant]
        kinds[kind] += pages  # type: ignore[assignment]  # parts of pages are exact, too
        if not kinds[kind]:
            del kinds[kind]
            if not kinds:
                del self.charged[tenant]
        self.changed.add(tenant)

    # -- blocks ----------------------------------------------------------------------------------------
    def charge(self, block: Block) -> None:
        """Whoever pays for it does so from now on."""
        if block.payers is None:
            self.add(block.tenant, block.charge, 1)
        else:
            self._share(block, 1)

    def refund(self, block: Block) -> None:
        """Nobody pays for it any more, as it is now."""
        if block.payers is None:
            self.add(block.tenant, block.charge, -1)
        else:
            self._share(block, -1)

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

    def leave(self, block: Block, tenant: str) -> None:
        """It pays for this block no more; others who do pay its part."""
        assert block.payers is not None
        self.refund(block)
        del block.payers[tenant]
        if block.tenant == tenant:
            block.tenant = max(block.payers, key=block.payers.__getitem__)
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

    def shared_by(self, tenants: set[str]) -> list[tuple[Block, str]]:
        """Blocks that one of these pays for together with others, those of the oldest use first. O(uses)."""
        found = []
        for at, tenant, block in self._uses:
            if tenant in tenants and block.payers is not None and block.payers.get(tenant) == at:
                found.append((block, tenant))
        return found

    def _share(self, block: Block, sign: int) -> None:
        payers = block.payers
        assert payers is not None
        parts, left = divmod(round(1 / PART), len(payers))
        for at, tenant in enumerate(payers):
            self.add(tenant, block.charge, sign * PART * (parts + (at < left)))
