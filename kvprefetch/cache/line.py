"""Who goes next when pages are needed: every tenant's blocks in line, and between tenants weighted max-min.

For a live request, in this order
1. unused speculation whose hold has passed, anybody's;
2. other tenants' unused speculation, of the tenant that has the most of it by weight (law 3);
3. used blocks of tenants over their guarantee: first what nobody has used for `claim_s`, the oldest of all, then the
   block first in line of the tenant that is furthest over its guarantee by weight. The tenant that asks is among them,
   and what it asks for counts as its own already;
4. its own.
A preload takes of its own tenant alone: holds that have passed, then what is worth less than it.

Promises
- A tenant within its guarantee loses no used block to another's need.
- Leaves first: a block goes when nothing follows it.
- O(log n) for a block, n leaves or tenants: what changed is noted, and looked at when somebody asks. An order whose
  keys fade is looked at anew every `lasts_s`, one tenant at a time.
- Pure, and raises nothing.
"""

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush, heapreplace
from itertools import count as from_zero
from math import ceil, inf
from typing import Generic, NamedTuple, Protocol, Self, TypeVar

from kvprefetch.cache.accounts import Accounts
from kvprefetch.cache.block import Charge
from kvprefetch.cache.evict import Demand
from kvprefetch.cache.ranking import Ranking
from kvprefetch.cache.shares import Shares


class Leaf(Protocol):
    """A block, or a run of blocks that share their fate."""

    @property
    def count(self) -> int: ...
    @property
    def tenant(self) -> str: ...
    @property
    def last_used(self) -> float: ...
    @property
    def speculative(self) -> bool: ...
    @property
    def hold_until(self) -> float: ...
    @property
    def refs(self) -> int: ...
    @property
    def is_leaf(self) -> bool: ...
    @property
    def fanout(self) -> int: ...
    @property
    def parent(self) -> Self | None: ...
    @property
    def payers(self) -> dict[str, float] | None: ...


CLAIM_S = 300.0
_FEW = 64

L = TypeVar("L", bound=Leaf)
L_contra = TypeVar("L_contra", bound=Leaf, contravariant=True)


class Order(Protocol[L_contra]):
    """How the blocks of one tenant stand in line."""

    rule: str  # the reason of an eviction by it
    lasts_s: float  # a key may have become less after so long

    def first_key(self, leaf: L_contra) -> float:
        """A key that is at most the true one, without looking."""

    def key(self, leaf: L_contra, now: float) -> float:
        """The least goes first."""

    def epoch(self, tenant: str) -> Hashable:
        """Changes when all of its keys do."""

    def weighs(self, tenant: str) -> bool:
        """Whether keys are on the scale of a preload's worth."""


class Victim(NamedTuple, Generic[L]):
    """Its last `pages` blocks go."""

    leaf: L
    pages: int
    rule: str


@dataclass(slots=True)
class _Queue(Generic[L]):
    """One tenant's leaves, and some that are none any more."""

    ranked: list[tuple[float, int, L]] = field(default_factory=list)  # by the order's key
    fresh: list[tuple[float, int, L]] = field(default_factory=list)  # unused speculation, by the end of its hold
    sweep_at: int = _FEW
    ranked_at: float = -inf
    epoch: Hashable = None


@dataclass(slots=True)
class _Draft(Generic[L]):
    """What one demand would take, before anything is taken."""

    asking: str = ""
    wanted: int = 0
    taken: dict[L, int] = field(default_factory=dict)  # pages of each, children before parents
    rules: dict[L, str] = field(default_factory=dict)
    opened: set[L] = field(default_factory=set)  # that nothing would follow any more
    closed: Counter[L] = field(default_factory=Counter)  # by parent: children taken
    used: Counter[str] = field(default_factory=Counter)  # by tenant: pages that it would give up
    fresh: Counter[str] = field(default_factory=Counter)


class Line(Generic[L]):
    """See the module's promises. Belongs to one pool, whose blocks and accounts it reads."""

    def __init__(self, order: Order[L], accounts: Accounts, pages: int, claim_s: float = CLAIM_S) -> None:
        self.order, self.accounts, self.pages, self.claim_s = order, accounts, pages, claim_s
        self.shares = Shares()
        self._queues: dict[str, _Queue[L]] = {}
        self._changed: set[str] = set()  # tenants to look at again, beside those whose charges changed
        self._expiring, self._hoarding, self._idle, self._over = Ranking(), Ranking(), Ranking(), Ranking()
        self._number = from_zero()
        self._draft: _Draft[L] = _Draft()

    def rule(self, shares: Shares, pages: int) -> None:
        """These shares of so many pages from now on."""
        self.shares, self.pages = shares, pages
        self._changed.update(self._queues)

    def put(self, leaf: L) -> None:
        """It is a leaf now, or one that was used again."""
        queue = self._queues.get(leaf.tenant)
        if queue is None:
            queue = self._queues[leaf.tenant] = _Queue()
        heappush(queue.ranked, (self.order.first_key(leaf), next(self._number), leaf))
        if leaf.speculative:
            heappush(queue.fresh, (leaf.hold_until, next(self._number), leaf))
        if len(queue.ranked) > queue.sweep_at:
            self._sweep(queue, leaf.tenant)
        self._changed.add(leaf.tenant)

    def choose(self, wanted: int, demand: Demand, or_fewer: bool = False) -> list[Victim[L]]:
        """Who is to be evicted for `wanted` pages, children before parents; none, or fewer, where too few may be.

        What is returned must be evicted. O(wanted · log n).
        """
        now, draft = demand.now, _Draft[L](demand.tenant, wanted)
        self._age(now)
        self._draft = draft
        self._settle_changed(demand)
        missing = wanted
        while missing > 0 and (taken := self._take_turn(missing, demand)):
            missing -= taken
        is_enough = missing <= 0 or or_fewer
        self._draft = _Draft()
        self._changed.update(draft.used, draft.fresh, (demand.tenant,))
        if is_enough:
            return [Victim(leaf, pages, draft.rules[leaf]) for leaf, pages in draft.taken.items()]
        for leaf in draft.taken:
            if leaf.is_leaf:
                self.put(leaf)
        return []

    # -- whose turn it is ------------------------------------------------------------------------------
    def _take_turn(self, missing: int, demand: Demand) -> int:
        """Take some of one tenant's: as many as its turn lasts; 0: nobody's may be taken."""
        now, own = demand.now, demand.tenant
        if demand.speculative:
            return self._take_fresh(own, missing, now, "hold_expired", until=now) or self._take_own(missing, demand)
        return (
            self._take_expired(missing, now)
            or self._take_speculation(own, now)
            or self._take_unclaimed(missing, demand)
            or self._take_over(missing, demand)
            or (self._part_shared(demand) and self._take_turn(missing, demand))
            or self._take(own, missing, now, self.order.rule)
        )

    def _take_expired(self, missing: int, now: float) -> int:
        """Speculation whose hold has passed, the one first that passed first."""
        while (first := self._expiring.first()) is not None and first[0] <= now:
            taken = self._take_fresh(first[1], missing, now, "hold_expired", until=now)
            if taken:
                return taken
        return 0

    def _take_speculation(self, own: str, now: float) -> int:
        """Of the other tenant that has the most of it."""
        while True:
            self._hoarding.drop(own)
            first = self._hoarding.first()
            if first is None:
                return 0
            taken = self._take_fresh(first[1], 1, now, "speculative_of_other_tenant")
            if taken:
                return taken

    def _take_unclaimed(self, missing: int, demand: Demand) -> int:
        """What nobody has used for long, of whoever is over the guarantee."""
        oldest = demand.now - self.claim_s
        while (first := self._idle.first()) is not None and first[0] <= oldest:
            tenant = first[1]
            if self._refresh(tenant, demand.now):
                continue
            rule = self.order.rule if tenant == demand.tenant else "unclaimed"
            taken = self._take(tenant, min(missing, ceil(self._excess(tenant))), demand.now, rule, oldest=oldest)
            if taken:
                return taken
        return 0

    def _take_over(self, missing: int, demand: Demand) -> int:
        """Of who is furthest over the guarantee, until another is."""
        while (first := self._over.first()) is not None:
            value, tenant = first
            if self._refresh(tenant, demand.now):
                continue
            most = min(missing, ceil(self._excess(tenant)))
            gap = (self._over.second() - value) * self.shares.weight(tenant)
            if gap < most:
                most = max(int(gap), 1)
            rule = self.order.rule if tenant == demand.tenant else "over_share"
            taken = self._take(tenant, most, demand.now, rule)
            if taken:
                return taken
        return 0

    def _take_own(self, missing: int, demand: Demand) -> int:
        """A preload's own tenant's: where keys weigh, what is worth less; else first what was preloaded before it."""
        own, now, rule = demand.tenant, demand.now, self.order.rule
        self._refresh(own, now)
        if self.order.weighs(own):
            return self._take(own, missing, now, rule, worth=demand.worth)
        return self._take_fresh(own, missing, now, "newer_preload") or self._take(own, missing, now, rule)

    def _part_shared(self, demand: Demand) -> bool:
        """Where nothing else can go: have one who is over the guarantee stop paying for a block that others pay for.

        Those others may then be over theirs.
        """
        tenants = {tenant for tenant in self.accounts.charged if self._excess(tenant) > 0}
        for block, tenant in self.accounts.shared_by(tenants):
            self.accounts.leave(block, tenant)
            self._settle_changed(demand)
            return True
        return False

    # -- out of one tenant's line ----------------------------------------------------------------------
    def _take(self, tenant: str, most: int, now: float, rule: str, *, oldest: float = inf, worth: float = inf) -> int:
        """Up to `most` blocks from its line, last used by `oldest` and of keys below `worth`; how many."""
        queue, taken = self._queues.get(tenant), 0
        while queue is not None and taken < most:
            first = self._first(queue, tenant, now)
            if first is None or first[2].last_used > oldest or first[0] >= worth:
                break
            taken += self._pick(first[2], most - taken, rule)
        self._settle(tenant, now)
        return taken

    def _take_fresh(self, tenant: str, most: int, now: float, rule: str, *, until: float = inf) -> int:
        """Up to `most` blocks of its unused speculation, of holds that end by `until`; how many."""
        queue, taken = self._queues.get(tenant), 0
        while queue is not None and taken < most:
            first = self._first_fresh(queue, tenant)
            if first is None or first[0] > until:
                break
            taken += self._pick(first[2], most - taken, rule)
        self._settle(tenant, now)
        return taken

    def _pick(self, leaf: L, most: int, rule: str) -> int:
        """This one, or the end of it; how many blocks."""
        draft, parent, before = self._draft, leaf.parent, self._draft.taken.get(leaf, 0)
        count = min(leaf.count - before, most)
        draft.taken[leaf] = before + count
        draft.rules.setdefault(leaf, rule)
        (draft.fresh if leaf.speculative else draft.used)[leaf.tenant] += count
        if before + count == leaf.count and parent is not None:
            draft.closed[parent] += 1
            if draft.closed[parent] == parent.fanout and not parent.refs:
                draft.opened.add(parent)
                self.put(parent)
        return count

    def _first(self, queue: _Queue[L], tenant: str, now: float) -> tuple[float, int, L] | None:
        """The first in line, by its key as it is now."""
        ranked = queue.ranked
        while ranked:
            key, number, leaf = ranked[0]
            if not self._is_in_line(leaf, tenant):
                heappop(ranked)
                continue
            true = self.order.key(leaf, now)
            if true <= key:
                return ranked[0]
            heapreplace(ranked, (true, number, leaf))
        return None

    def _first_fresh(self, queue: _Queue[L], tenant: str) -> tuple[float, int, L] | None:
        fresh = queue.fresh
        while fresh:
            until, number, leaf = fresh[0]
            if not (leaf.speculative and self._is_in_line(leaf, tenant)):
                heappop(fresh)
            elif leaf.hold_until > until:
                heapreplace(fresh, (leaf.hold_until, number, leaf))
            else:
                return fresh[0]
        return None

    def _is_in_line(self, leaf: L, tenant: str) -> bool:
        draft = self._draft
        is_open = leaf.is_leaf or leaf in draft.opened
        return is_open and leaf.tenant == tenant and draft.taken.get(leaf, 0) < leaf.count

    # -- what is known of tenants ----------------------------------------------------------------------
    def _excess(self, tenant: str) -> float:
        """Pages of it over its guarantee, with what it asks for."""
        draft = self._draft
        used = self.accounts.used(tenant) - draft.used[tenant] + (draft.wanted if tenant == draft.asking else 0)
        return used - self.shares.guaranteed(tenant, self.pages)

    def _settle_changed(self, demand: Demand) -> None:
        changed = self._changed | self.accounts.changed | {demand.tenant}
        self._changed.clear()
        self.accounts.changed.clear()
        for tenant in changed:
            self._settle(tenant, demand.now)

    def _settle(self, tenant: str, now: float) -> None:
        """Have it where it belongs among the others."""
        queue = self._queues.get(tenant)
        first = self._first(queue, tenant, now) if queue is not None else None
        excess = self._excess(tenant)
        if first is not None and excess > 0:
            self._over.put(tenant, -excess / self.shares.weight(tenant))
            self._idle.put(tenant, first[2].last_used)
        else:
            self._over.drop(tenant)
            self._idle.drop(tenant)
        fresh = self._first_fresh(queue, tenant) if queue is not None else None
        if fresh is not None:
            pages = self.accounts.of(tenant, Charge.SPECULATIVE) - self._draft.fresh[tenant]
            self._hoarding.put(tenant, -pages / self.shares.weight(tenant))
            self._expiring.put(tenant, fresh[0])
        else:
            self._hoarding.drop(tenant)
            self._expiring.drop(tenant)
        if queue is not None and not queue.ranked and not queue.fresh:
            del self._queues[tenant]

    def _refresh(self, tenant: str, now: float) -> bool:
        """Rank its leaves anew where their keys may have become less; whether that was so."""
        queue = self._queues.get(tenant)
        if queue is None:
            return False
        epoch = self.order.epoch(tenant)
        if queue.epoch == epoch and now < queue.ranked_at + self.order.lasts_s:
            return False
        queue.epoch, queue.ranked_at = epoch, now
        self._sweep(queue, tenant)
        self._settle(tenant, now)
        return True

    def _sweep(self, queue: _Queue[L], tenant: str) -> None:
        """Each leaf once, with the least key that it may have."""
        for heap in (queue.ranked, queue.fresh):
            leaves = {leaf: number for _, number, leaf in heap if self._is_in_line(leaf, tenant)}
            if heap is queue.fresh:
                heap[:] = [(leaf.hold_until, number, leaf) for leaf, number in leaves.items() if leaf.speculative]
            else:
                heap[:] = [(self.order.first_key(leaf), number, leaf) for leaf, number in leaves.items()]
            heapify(heap)
        queue.sweep_at = 2 * len(queue.ranked) + _FEW

    def _age(self, now: float) -> None:
        """Groups' blocks for which another tenant answers from now on stand in that one's line."""
        for block in self.accounts.age(now):
            if block.is_leaf:
                self.put(block)  # type: ignore[arg-type]  # only pools of blocks have such
