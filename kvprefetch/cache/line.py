"""Who goes next when pages are needed: every tenant's blocks in line, and between tenants weighted max-min.

For a live request, in this order
1. unused speculation whose hold has passed, anybody's;
2. other tenants' unused speculation, of the tenant that has the most of it by weight (law 3);
3. used blocks of tenants over their guarantee: first what nobody has used for `claim_s`, the oldest of all, then the
   block first in line of the tenant that is furthest over its guarantee by weight. The tenant that asks is among them,
   and what it asks for counts as its own already. Before another's used block goes, its own unused speculation does;
4. its own.
A preload takes of its own tenant alone: holds that have passed, then what is worth less than it.

Promises
- A tenant within its guarantee loses no used block to another's need. A group's block stays as long as one of those
  who pay for it is within; where nothing else can go, those who are over stop paying for what they share, until one
  who pays for it is over, too.
- Leaves first: a block goes when nothing follows it.
- O(log n) for a block, n leaves or tenants: what changed is noted, and looked at when somebody asks. An order whose
  keys fade is looked at anew every `lasts_s`, one tenant at a time.
- Pure, and raises nothing.
"""

from collections.abc import Iterable
from math import ceil, inf
from typing import Generic

from kvprefetch.cache.accounts import Accounts, parts
from kvprefetch.cache.block import Block, Charge
from kvprefetch.cache.evict import Demand
from kvprefetch.cache.parting import Parting
from kvprefetch.cache.queues import Draft, L, Order, Queue, Victim
from kvprefetch.cache.ranking import Ranking
from kvprefetch.cache.shares import Shares

__all__ = ["CLAIM_S", "Line", "Order", "Victim"]

CLAIM_S = 300.0
_GRAINS = 65_536
"""Of a pool, in which it is shared: where many tenants have much the same, another would be first at each page."""


class Line(Generic[L]):
    """See the module's promises. Belongs to one pool, whose blocks and accounts it reads."""

    def __init__(self, order: Order[L], accounts: Accounts, pages: int, claim_s: float = CLAIM_S) -> None:
        self.order, self.accounts, self.pages, self.claim_s = order, accounts, pages, claim_s
        self.shares = Shares()
        self._queues: dict[str, Queue[L]] = {}
        self._changed: set[str] = set()  # tenants to look at again, beside those whose charges changed
        self._expiring, self._hoarding, self._idle, self._over = Ranking(), Ranking(), Ranking(), Ranking()
        self._draft: Draft[L] = Draft()
        self._put: set[L] = set()  # that stand in line before they are leaves: as soon as what was chosen is gone
        self._parting = Parting(accounts)

    def rule(self, shares: Shares, pages: int) -> None:
        """These shares of so many pages from now on."""
        self.shares, self.pages = shares, pages
        self._changed.update(self._queues)

    def leaves(self) -> set[L]:
        """All that stand in line, and some that do no more. O(leaves)."""
        return {leaf for queue in self._queues.values() for leaf in queue.leaves()}

    def put(self, leaf: L) -> None:
        """It is a leaf now, or one that was used again."""
        if leaf in self._put:
            self._put.discard(leaf)
            return
        queue = self._queues.get(leaf.tenant)
        if queue is None:
            queue = self._queues[leaf.tenant] = Queue(leaf.tenant)
        queue.put(leaf, self.order, self._draft)
        self._changed.add(leaf.tenant)

    def age(self, now: float) -> None:
        """Groups' blocks for which another tenant answers from now on stand in that one's line."""
        self._put_blocks(self.accounts.age(now))

    def choose(self, wanted: int, demand: Demand, or_fewer: bool = False, asked: int | None = None) -> list[Victim[L]]:
        """Who is to be evicted for `wanted` pages, children before parents; none, or fewer, where too few may be.

        `asked`: with the free ones that the demand takes; 0: it is for nobody. What is returned must be evicted.
        O(wanted · log n).
        """
        self._put = set()
        self.age(demand.now)
        draft = self._draft = Draft(demand.tenant, wanted if asked is None else asked)
        self._parting = Parting(self.accounts)
        self._changed.add(demand.tenant)
        self._settle(demand.now)
        missing = wanted
        while missing > 0 and (taken := self._take_turn(missing, demand)):
            missing -= taken
        self._draft = Draft()
        self._changed.update(draft.used, draft.fresh, (demand.tenant,))
        if missing <= 0 or or_fewer:
            self._put = draft.opened
            return list(draft.victims.values())
        self._put_blocks(self._parting.undo(0))
        for leaf in draft.victims:
            if leaf.is_leaf:
                self.put(leaf)
        return []

    # -- whose turn it is ------------------------------------------------------------------------------
    def _take_turn(self, missing: int, demand: Demand) -> int:
        """Take some of one tenant's: as many as its turn lasts; 0: nobody's may be taken."""
        if demand.speculative:
            expired = self._take_fresh(demand.tenant, missing, demand, "hold_expired", until=demand.now)
            return expired or self._take_for_preload(missing, demand)
        return (
            self._take_expired(missing, demand)
            or self._take_speculation(missing, demand)
            or self._take_unclaimed(missing, demand)
            or self._take_over(missing, demand)
            or self._take_parted(missing, demand)
            or self._take_own(missing, demand)
        )

    def _take_expired(self, missing: int, demand: Demand) -> int:
        """Speculation whose hold has passed, the one first that passed first."""
        while (first := self._expiring.first()) is not None and first[0] <= demand.now:
            until = min(demand.now, max(first[0], self._expiring.second()))
            taken = self._take_fresh(first[1], missing, demand, "hold_expired", until=until)
            if taken:
                return taken
        return 0

    def _take_speculation(self, missing: int, demand: Demand) -> int:
        """Of the other tenant that has the most of it, until another has."""
        while True:
            self._hoarding.drop(demand.tenant)
            first = self._hoarding.first()
            if first is None:
                return 0
            most = min(missing, self._turn(self._hoarding, *first))
            taken = self._take_fresh(first[1], most, demand, "speculative_of_other_tenant")
            if taken:
                return taken

    def _take_unclaimed(self, missing: int, demand: Demand) -> int:
        """What nobody has used for long, of whoever is over the guarantee: the oldest, until another is older."""
        limit = demand.now - self.claim_s
        while (first := self._idle.first()) is not None and first[0] <= limit:
            used, tenant = first
            if self._refresh(tenant, demand.now):
                continue
            most = min(missing, ceil(self._excess(tenant)))
            oldest = min(limit, max(used, self._idle.second()))
            taken = self._take_used(tenant, most, demand, "unclaimed", oldest=oldest)
            if taken:
                return taken
        return 0

    def _take_over(self, missing: int, demand: Demand) -> int:
        """Of who is furthest over the guarantee, until another is."""
        while (first := self._over.first()) is not None:
            tenant = first[1]
            if self._refresh(tenant, demand.now):
                continue
            most = min(missing, ceil(self._excess(tenant)), self._turn(self._over, *first))
            if demand.patient and tenant != demand.tenant:
                weight = self.shares.weight
                ahead = -first[0] - self._excess(demand.tenant) / weight(demand.tenant)
                if ahead < 0:
                    return 0
                most = min(most, int(ahead * weight(tenant)) + 1)
            taken = self._take_used(tenant, most, demand, "over_share")
            if taken:
                return taken
        return 0

    def _take_used(self, tenant: str, most: int, demand: Demand, rule: str, *, oldest: float = inf) -> int:
        """Of this tenant's; for another's need, that one's own unused speculation goes before a used block."""
        if tenant == demand.tenant:
            return self._take(tenant, most, demand, self.order.rule, oldest=oldest)
        return self._take_fresh(demand.tenant, most, demand, "own_speculation") or self._take(
            tenant, most, demand, rule, oldest=oldest
        )

    def _take_parted(self, missing: int, demand: Demand) -> int:
        """Have tenants over their guarantee stop paying for what they share, until somebody else is over, too."""
        victims, before = self._draft.victims, len(self._parting)
        while (block := self._parting.next(victims, lambda tenant: self._excess(tenant) > 0)) is not None:
            self._put_blocks([block])
            self._settle(demand.now)
            taken = self._take_over(missing, demand)
            if taken:
                return taken
        self._put_blocks(self._parting.undo(before))
        self._settle(demand.now)
        return 0

    def _take_own(self, missing: int, demand: Demand) -> int:
        self._refresh(demand.tenant, demand.now)
        return self._take(demand.tenant, missing, demand, self.order.rule)

    def _take_for_preload(self, missing: int, demand: Demand) -> int:
        """Its own tenant's: where keys weigh, what is worth less; else first what was preloaded before it."""
        own, rule = demand.tenant, self.order.rule
        self._refresh(own, demand.now)
        if self.order.weighs(own):
            return self._take(own, missing, demand, rule, worth=demand.worth)
        return self._take_fresh(own, missing, demand, "newer_preload") or self._take(own, missing, demand, rule)

    # -- out of one tenant's line ----------------------------------------------------------------------
    def _take(
        self, tenant: str, most: int, demand: Demand, rule: str, *, oldest: float = inf, worth: float | None = None
    ) -> int:
        """Up to `most` blocks from its line, last used by `oldest` and of keys below `worth`; how many."""
        queue, draft, taken = self._queues.get(tenant), self._draft, 0
        while queue is not None and taken < most:
            first = queue.first(self.order, demand.now, draft)
            if first is None:
                break
            key, _, leaf = first
            if leaf.last_used > oldest or (worth is not None and key >= worth):
                break
            if leaf.payers is not None and self._pass_on(leaf, demand):
                continue
            count, opened = self._pick(leaf, most - taken, rule)
            taken += count
            if opened is None:
                continue
            if opened.tenant != tenant:
                self.put(opened)
                break  # it may be that one's turn
            queue.follow(opened, self.order)
        self._changed.add(tenant)
        self._settle(demand.now)
        return taken

    def _take_fresh(self, tenant: str, most: int, demand: Demand, rule: str, *, until: float = inf) -> int:
        """Up to `most` blocks of its unused speculation, of holds that end by `until`; how many."""
        queue, taken = self._queues.get(tenant), 0
        while queue is not None and taken < most:
            first = queue.first_fresh(self._draft)
            if first is None or first[0] > until:
                break
            why = "hold_expired" if first[0] <= demand.now else rule
            count, opened = self._pick(first[2], most - taken, why)
            taken += count
            if opened is None:
                continue
            self.put(opened)
            if opened.tenant != tenant:
                break
        self._changed.add(tenant)
        self._settle(demand.now)
        return taken

    def _pass_on(self, leaf: L, demand: Demand) -> bool:
        """Have another who pays for a group's block stand in line with it, where it must not go; whether that is so."""
        assert leaf.payers is not None
        for other in leaf.payers:
            if other != leaf.tenant and (demand.speculative or self._excess(other) <= 0):
                leaf.tenant = other
                self.put(leaf)
                return True
        return False

    def _pick(self, leaf: L, most: int, rule: str) -> tuple[int, L | None]:
        """This one, or the end of it; how many blocks, and what is a leaf without it."""
        draft = self._draft
        count, opened = draft.take(leaf, most, rule)
        given = draft.fresh if leaf.speculative else draft.used
        if leaf.payers is None:
            given[leaf.tenant] = given.get(leaf.tenant, 0) + count
        else:
            for tenant, part in parts(leaf.payers):
                given[tenant] = given.get(tenant, 0) + part
                self._changed.add(tenant)
        return count, opened

    def _put_blocks(self, blocks: Iterable[Block]) -> None:
        """Of a group, which only pools of blocks have: those that are leaves, or would be."""
        for block in blocks:
            if block.is_leaf or block in self._draft.opened:
                self.put(block)  # type: ignore[arg-type]

    # -- what is known of tenants ----------------------------------------------------------------------
    def _excess(self, tenant: str) -> float:
        """Pages of it over its guarantee, with what it asks for."""
        draft = self._draft
        used = self.accounts.used(tenant) - draft.used.get(tenant, 0)
        if tenant == draft.asking:
            used += draft.asked
        return used - self.shares.guaranteed(tenant, self.pages)

    def _turn(self, ranking: Ranking, value: float, tenant: str) -> int:
        """Pages of the first of those ranked by weight, until another is first; at least a grain."""
        gap = (ranking.second() - value) * self.shares.weight(tenant)
        return max(int(min(gap, self.pages)), self.pages // _GRAINS, 1)

    def _refresh(self, tenant: str, now: float) -> bool:
        """Rank its leaves anew where their keys may have become less; whether that was so."""
        queue = self._queues.get(tenant)
        if queue is None or not queue.refresh(self.order, now, self._draft):
            return False
        self._changed.add(tenant)
        self._settle(now)
        return True

    def _settle(self, now: float) -> None:
        """Have those that changed where they belong among the others."""
        changed = self._changed
        if self.accounts.changed:
            changed |= self.accounts.changed
            self.accounts.changed.clear()
        for tenant in changed:
            self._rank(tenant, now)
        changed.clear()

    def _rank(self, tenant: str, now: float) -> None:
        queue = self._queues.get(tenant)
        first = fresh = None
        if queue is not None:
            first, fresh = queue.first(self.order, now, self._draft), queue.first_fresh(self._draft)
            if not queue:
                del self._queues[tenant]
        excess = self._excess(tenant) if first is not None else 0
        if first is not None and excess > 0:
            self._over.put(tenant, -excess / self.shares.weight(tenant))
            self._idle.put(tenant, first[2].last_used)
        else:
            self._over.drop(tenant)
            self._idle.drop(tenant)
        if fresh is not None:
            pages = self.accounts.of(tenant, Charge.SPECULATIVE) - self._draft.fresh.get(tenant, 0)
            self._hoarding.put(tenant, -pages / self.shares.weight(tenant))
            self._expiring.put(tenant, fresh[0])
        else:
            self._hoarding.drop(tenant)
            self._expiring.drop(tenant)
