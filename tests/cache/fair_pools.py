"""Words for stories of several tenants: whole requests on tiny pools, a letter a block; and a slow line to compare."""

from kvprefetch.cache.accounts import parts
from kvprefetch.cache.block import Block, State
from kvprefetch.cache.evict import Demand
from kvprefetch.cache.keys import BlockKey
from kvprefetch.cache.pool import BlockPool
from kvprefetch.cache.shares import Share, Shares
from kvprefetch.errors import PoolFull


def guaranteed(pages: int, **promised: int) -> Shares:
    """Shares by which these tenants have so many of a pool's `pages`, all of weight 1."""
    return Shares({tenant: Share(guarantee=own / pages) for tenant, own in promised.items()})


def keys(space: str, text: str) -> list[BlockKey]:
    """Keys of a sequence in a tenant's or a group's namespace, a letter a block."""
    return [f"{space}:{text[: end + 1]}".encode() for end in range(len(text))]


def serve(
    pool: BlockPool,
    tenant: str,
    text: str,
    now: float,
    *,
    group: str = "",
    until: float | None = None,
    patient: bool = False,
) -> bool:
    """A whole request of `tenant`, or preload on hold `until`; of a group's namespace if one is named.

    False: it was refused, and nothing is changed.
    """
    names = keys(group or tenant, text)
    found = pool.match(names)
    demand = Demand(tenant, until is not None, now, patient=patient, shared=bool(group))
    pool.hold(found)
    try:
        unused = sum(block.speculative for block in found) if until is None else 0
        fresh = pool.reserve(len(names) - len(found), demand, beside=unused)
    except PoolFull:
        pool.release(reversed(found))
        return False
    held = list(found)
    for block, name in zip(fresh, names[len(found) :], strict=True):
        held.append(pool.publish(block, name, held[-1] if held else None, speculative_until=until))
    if until is None:
        pool.touch(held, now, tenant, tenant)
    pool.release(reversed(held))
    return True


def used(pool: BlockPool, space: str) -> set[BlockKey]:
    """Keys of the resident blocks of one namespace that a live request has used."""
    prefix = f"{space}:".encode()
    return {key for key, block in pool.resident.items() if key.startswith(prefix) and not block.speculative}


def texts(pool: BlockPool, space: str) -> list[str]:
    """All sequences of one namespace that the pool holds, beginnings included, in alphabetical order."""
    prefix = f"{space}:"
    return sorted(key.decode()[len(prefix) :] for key in pool.resident if key.decode().startswith(prefix))


class SlowLine:
    """What `Line.choose` promises, by looking at all blocks for each page. Changes nothing.

    `choose` returns None where a tenant would have to give up its part of a group's block, or where speculation past
    its hold is hidden behind some that is not: it may then go in its tenant's turn.
    """

    def __init__(self, pool: BlockPool, demand: Demand, asked: int) -> None:
        self.pool, self.demand, self.asked = pool, demand, asked
        self.answering = {block: block.tenant for block in pool.resident.values()}
        self.taken: dict[Block, str] = {}

    def choose(self, wanted: int) -> list[tuple[BlockKey, str]] | None:
        now = self.demand.now
        if any(b.speculative and b.children and b.hold_until <= now for b in self.pool.resident.values()):
            return None
        while len(self.taken) < wanted:
            found = self.next()
            if found is None:
                break
            self.taken[found[0]] = found[1]
        if len(self.taken) < wanted:
            return None if self.could_part() else []
        return [(block.key, rule) for block, rule in self.taken.items()]

    def next(self) -> tuple[Block, str] | None:
        own, now = self.demand.tenant, self.demand.now
        expired = [b for b in self.fresh() if b.hold_until <= now]
        if self.demand.speculative:
            expired = [b for b in expired if self.answering[b] == own]
        if expired:
            return min(expired, key=lambda b: (b.hold_until, self.answering[b])), "hold_expired"
        if self.demand.speculative:
            return self.next_for_preload()
        others = {self.answering[b] for b in self.fresh()} - {own}
        if others:
            most = min(others, key=lambda t: (-self.speculative(t) / self.pool.shares.weight(t), t))
            return self.first_fresh(most), "speculative_of_other_tenant"
        return self.next_over() or (None if self.could_part() else self.next_own())

    def next_over(self) -> tuple[Block, str] | None:
        own, line = self.demand.tenant, self.pool.line
        while over := {t for t in self.answering.values() if self.excess(t) > 0 and self.in_line(t)}:
            passed = {t: self.in_line(t)[0].last_used for t in over}
            unclaimed = {t: at for t, at in passed.items() if at <= self.demand.now - line.claim_s}
            if unclaimed:
                tenant, why = min(unclaimed, key=lambda t: (unclaimed[t], t)), "unclaimed"
            else:
                tenant, why = min(over, key=lambda t: (-self.level(t), t)), "over_share"
                if self.demand.patient and self.level(tenant) < self.level(own):
                    return None
            if tenant != own and any(self.answering[b] == own for b in self.fresh()):
                return self.first_fresh(own), "own_speculation"
            leaf = self.in_line(tenant)[0]
            if not self.passes(leaf):
                return leaf, line.order.rule if tenant == own else why
        return None

    def next_own(self) -> tuple[Block, str] | None:
        while line := self.in_line(self.demand.tenant):
            if not self.passes(line[0]):
                return line[0], self.pool.order.rule
        return None

    def next_for_preload(self) -> tuple[Block, str] | None:
        own, weighs = self.demand.tenant, self.pool.order.weighs(self.demand.tenant)
        if not weighs and any(self.answering[b] == own for b in self.fresh()):
            return self.first_fresh(own), "newer_preload"
        while line := self.in_line(own):
            if weighs and self.key(line[0]) >= self.demand.worth:
                return None
            if not self.passes(line[0]):
                return line[0], self.pool.order.rule
        return None

    # -- what there is ---------------------------------------------------------------------------------
    def open(self) -> list[Block]:
        return [
            b
            for b in self.pool.resident.values()
            if not b.refs and b not in self.taken and all(child in self.taken for child in b.children)
        ]

    def fresh(self) -> list[Block]:
        return [b for b in self.open() if b.speculative]

    def first_fresh(self, tenant: str) -> Block:
        return min((b for b in self.fresh() if self.answering[b] == tenant), key=lambda b: b.hold_until)

    def key(self, block: Block) -> float:
        return self.pool.order.key(block, self.demand.now)

    def in_line(self, tenant: str) -> list[Block]:
        return sorted((b for b in self.open() if self.answering[b] == tenant), key=self.key)

    def paid(self, tenant: str, *, speculative: bool) -> float:
        return sum(
            part
            for block in self.pool.blocks()
            if block not in self.taken and (block.speculative and block.state is State.RESIDENT) == speculative
            for payer, part in (parts(block.payers) if block.payers is not None else [(block.tenant, 1)])
            if payer == tenant
        )

    def speculative(self, tenant: str) -> float:
        return self.paid(tenant, speculative=True)

    def excess(self, tenant: str) -> float:
        asked = self.asked if tenant == self.demand.tenant else 0
        return self.paid(tenant, speculative=False) + asked - self.pool.shares.guaranteed(tenant, self.pool.pages)

    def level(self, tenant: str) -> float:
        return self.excess(tenant) / self.pool.shares.weight(tenant)

    def passes(self, block: Block) -> bool:
        """Whether another who pays for it must not lose it: then that one answers for it."""
        for other in block.payers or ():
            if other != self.answering[block] and (self.demand.speculative or self.excess(other) <= 0):
                self.answering[block] = other
                return True
        return False

    def could_part(self) -> bool:
        if self.demand.speculative:
            return False
        shared = [b for b in self.pool.blocks() if b not in self.taken and len(b.payers or ()) > 1]
        return any(self.excess(payer) > 0 for block in shared for payer in block.payers or ())
