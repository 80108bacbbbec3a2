"""A fair pool under everything that may happen to it: groups, pins, preloads, new shares, a clock that goes back."""

from fractions import Fraction
from hashlib import sha256
from math import inf

import hypothesis.strategies as st
from fair_pools import SlowLine, keys, serve
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvprefetch.cache.block import Block, Hold
from kvprefetch.cache.evict import Demand
from kvprefetch.cache.keys import BlockKey
from kvprefetch.cache.orders import ByAge, ByIndex
from kvprefetch.cache.pool import BlockPool
from kvprefetch.cache.shares import Share, Shares
from kvprefetch.errors import PoolFull

PAGES = 9
TENANTS = ("ann", "bob", "cid", "dan")
GROUP = "all"

tenants = st.sampled_from(TENANTS)
prompts = st.text("ab", min_size=1, max_size=4)
spaces = st.sampled_from(["", "", GROUP])
small = st.integers(0, 7)
shares = st.builds(
    lambda promised, weights: Shares(
        {t: Share(w, n / PAGES) for t, n, w in zip(TENANTS, promised, weights, strict=False)}
    ),
    st.lists(st.integers(0, 3), max_size=3),
    st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=3, max_size=3),
)


def worth(block: Block, now: float) -> float:
    """Anything, but the same at all times, and never the same for two."""
    return int.from_bytes(sha256(block.key).digest()[:4], "big")


class Machine(RuleBasedStateMachine):
    """Four tenants and a group of them all on nine pages."""

    @initialize(by_index=st.booleans(), shares=shares, claim_s=st.sampled_from([2.0, 60.0]))
    def start(self, by_index: bool, shares: Shares, claim_s: float) -> None:
        """Where an index rules, what is unclaimed may be hidden behind what is not: it is not compared."""
        self.pool = BlockPool(PAGES, ByIndex(worth) if by_index else ByAge(), claim_s=inf if by_index else claim_s)
        self.pool.shares = shares
        self.pool.on_evict = self.note_eviction
        self.gone: list[tuple[BlockKey, str]] = []
        self.holds: list[Hold] = []
        self.time, self.ticks = 100.0, 0

    @property
    def now(self) -> float:
        """No two moments are the same, wherever the clock has been."""
        self.ticks += 1
        return self.time + self.ticks / 2**16

    # -- demands ---------------------------------------------------------------------------------------
    @rule(tenant=tenants, text=prompts, group=spaces, patient=st.booleans())
    def serve(self, tenant: str, text: str, group: str, patient: bool) -> None:
        self.demand(tenant, text, group, until=None, patient=patient)

    @rule(tenant=tenants, text=prompts, group=spaces)
    def preload(self, tenant: str, text: str, group: str) -> None:
        self.demand(tenant, text, group, until=self.now + 3)

    def demand(self, tenant: str, text: str, group: str, until: float | None, patient: bool = False) -> None:
        pool, now = self.pool, self.now
        pool.line.age(now)
        found = pool.match(keys(group or tenant, text))
        missing = len(text) - len(found) - pool.free_pages
        unused = sum(block.speculative for block in found) if until is None else 0
        asked = len(text) - len(found) + unused
        pool.hold(found)
        slow = SlowLine(pool, Demand(tenant, until is not None, now, patient=patient), asked)
        expected = slow.choose(missing) if missing > 0 else []
        pool.release(reversed(found))
        paid = {key: dict(block.payers or {block.tenant: 0}) for key, block in pool.resident.items()}
        was_used = {key for key, block in pool.resident.items() if not block.speculative}
        self.gone.clear()
        is_served = serve(pool, tenant, text, now, group=group, until=until, patient=patient)
        if expected is not None:
            assert self.gone == expected
            assert is_served == (missing <= 0 or bool(expected))
        for key, reason in self.gone:
            others = paid[key].keys() - {tenant}
            if until is not None:
                assert not others, "somebody else pays for a preload"
            elif key in was_used and reason in ("over_share", "unclaimed"):
                for other in others:
                    self.judge_loss(other)

    def note_eviction(self, block: Block, rule: str) -> None:
        self.gone.append((block.key, rule))
        taken = self.pool.blocks()
        self.left = {}
        for tenant in TENANTS:
            paid = [b for b in taken if tenant in (b.payers or (b.tenant,))]
            over = self.pool.accounts.used(tenant) - self.pool.shares.guaranteed(tenant, self.pool.pages)
            self.left[tenant] = over, all(len(b.payers or "1") == 1 for b in paid)

    def judge_loss(self, tenant: str) -> None:
        """Who lost a block was over its guarantee, and where it pays for whole pages it has all of it still."""
        over, is_whole = self.left[tenant]
        assert over >= 0 if is_whole else over > -1

    # -- what else happens -----------------------------------------------------------------------------
    @rule(tenant=tenants, text=prompts, group=spaces)
    def hold(self, tenant: str, text: str, group: str) -> None:
        """Somebody goes on using the beginning of this."""
        found = self.pool.match(keys(group or tenant, text))
        if found and len(self.holds) < 3:
            self.pool.hold(found)
            self.pool.touch(found, self.now, "s", tenant)
            self.holds.append(Hold(found))
            self.pool.holders.add(self.holds[-1])

    @rule(tenant=tenants, shared=st.booleans())
    def reserve(self, tenant: str, shared: bool) -> None:
        if len(self.holds) < 3:
            try:
                taken = self.pool.reserve(1, Demand(tenant, False, self.now, shared=shared), or_fewer=True)
            except PoolFull:
                return
            self.holds.append(Hold(taken))
            self.pool.holders.add(self.holds[-1])

    @precondition(lambda self: self.holds)
    @rule(which=small)
    def let_go(self, which: int) -> None:
        hold = self.holds.pop(which % len(self.holds))
        self.pool.holders.discard(hold)
        self.pool.release(reversed(hold.blocks))

    @precondition(lambda self: self.pool.resident)
    @rule(which=small)
    def drop(self, which: int) -> None:
        """The end of a sequence, held or not."""
        found = sorted(key for key, block in self.pool.resident.items() if not block.fanout)
        self.pool.drop(self.pool.resident[found[which % len(found)]], "damaged")

    @rule(tenant=tenants, text=prompts, group=spaces)
    def extend_hold(self, tenant: str, text: str, group: str) -> None:
        self.pool.extend_hold(self.pool.match(keys(group or tenant, text)), self.now + 5, tenant)

    @rule(shares=shares)
    def change_shares(self, shares: Shares) -> None:
        before = self.pool.evictions
        self.pool.shares = shares
        assert self.pool.evictions == before

    @rule(pages=st.integers(1, PAGES))
    def resize(self, pages: int) -> None:
        if pages >= self.pool.pages:
            self.pool.resize(pages)
            return
        try:
            self.pool.vacate(self.pool.pages - pages, self.now)
        except PoolFull:
            return
        taken = sorted(block.page for block in self.pool.blocks())
        if all(page < pages for page in taken):
            self.pool.resize(pages)
        else:
            self.pool.shares = self.pool.shares
            self.pool.line.rule(self.pool.shares, self.pool.pages)

    @rule(seconds=st.sampled_from([0.25, 1.5, 40.0, 400.0, -1.0, -50.0]))
    def pass_time(self, seconds: float) -> None:
        self.time += seconds

    # -- what holds after every step -------------------------------------------------------------------
    @invariant()
    def every_page_is_accounted_for(self) -> None:
        self.pool.check()

    @invariant()
    def those_who_pay_are_those_who_use(self) -> None:
        owed: dict[str, Fraction] = {}
        for block in self.pool.blocks():
            payers = block.payers if block.payers is not None else {block.tenant: 0.0}
            assert payers
            for tenant in payers:
                owed[tenant] = owed.get(tenant, Fraction(0)) + Fraction(1, len(payers))
        for tenant in TENANTS:
            paid = sum(self.pool.charges().get(tenant, {}).values())
            assert abs(paid - owed.get(tenant, 0)) < PAGES * 2**-20


Machine.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestFairPool = Machine.TestCase
