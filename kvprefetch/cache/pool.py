"""Page accounting of one pool: which block is in which page, who holds it, whom it is charged to.

Promises
- Owns every `Block` it returns; callers read them and change them only through these methods.
- `reserve` is all-or-nothing, unless fewer will do: it returns `count` private in-flight blocks, or raises PoolFull
  having changed nothing. `publish` makes one visible, once its bytes are written; until then nobody can match it.
- Eviction takes unreferenced leaves alone, so whoever holds a block has all blocks before it in the sequence, too:
  holding the last one is enough. A block counts as used when the last of those behind it was: touching the tail is.
- Knows pages by number only; the bytes are in `kvprefetch.tiers`. Nothing here blocks; no clock: `now`
  is an argument, in seconds of any monotonic clock.
- `check()` proves law 5.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from kvprefetch.cache.accounts import Accounts
from kvprefetch.cache.block import Block, Hold, Holder, State, Unused
from kvprefetch.cache.check import check_pool
from kvprefetch.cache.evict import Demand
from kvprefetch.cache.keys import BlockKey
from kvprefetch.cache.line import CLAIM_S, Line, Order
from kvprefetch.cache.orders import ByAge
from kvprefetch.cache.shares import OPERATOR, Shares
from kvprefetch.errors import PoolFull


class Dropped(NamedTuple):
    """A block that is gone, but for its page."""

    block: Block
    readers: list[Block]  # while anybody holds one of these, the page may be read
    before: Hold  # of the block before it, which is read by the same


class BlockPool:
    """Blocks in `pages` pages. See the module's promises."""

    def __init__(
        self, pages: int, order: Order[Block] | None = None, evicted_memory: int = 65_536, claim_s: float = CLAIM_S
    ) -> None:
        self.pages = pages
        self.accounts = Accounts()
        self.line: Line[Block] = Line(order or ByAge(), self.accounts, pages, claim_s)
        self.resident: dict[BlockKey, Block] = {}
        self.in_flight: dict[int, Block] = {}
        self.quarantined: dict[int, Block] = {}
        self.dropped: dict[int, Dropped] = {}
        self.moved = 0  # times that blocks changed their page or place in a sequence: what was noted of them is void
        self.holders: set[Holder] = set()
        self.announced: Counter[BlockKey] = Counter()  # keys that holders are computing right now
        self.evicted: OrderedDict[BlockKey, str] = OrderedDict()  # bounded: key → rule that evicted it
        self.forgot_evictions = False
        self.evictions = 0
        self.on_evict: Callable[[Block, str], None] = lambda block, rule: None
        self._evicted_memory = evicted_memory
        self.free = list(range(pages - 1, -1, -1))  # a stack, lowest page on top
        self.leaves: dict[int, Block] = {}  # page → unreferenced resident block without children

    @property
    def order(self) -> Order[Block]:
        """How each tenant's blocks stand in line."""
        return self.line.order

    @order.setter
    def order(self, order: Order[Block]) -> None:
        self.line.order = order
        self._line_up()

    @property
    def shares(self) -> Shares:
        """What each tenant may count on. Where they change nothing is evicted at once: it goes as room is needed."""
        return self.line.shares

    @shares.setter
    def shares(self, shares: Shares) -> None:
        self.line.rule(shares, self.pages)

    # -- looking ---------------------------------------------------------------------------------------
    @property
    def free_pages(self) -> int:
        """Pages that hold nothing."""
        return len(self.free)

    def match(self, keys: Sequence[BlockKey]) -> list[Block]:
        """The longest resident prefix of `keys`. Takes no references and counts as no use."""
        found = []
        for key in keys:
            block = self.resident.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def is_in_use(self, block: Block) -> bool:
        """Whether anybody holds it, or holds something behind it."""
        return any(other.refs for other in _with_descendants(block))

    def charges(self) -> dict[str, Counter[str]]:
        """Pages by tenant: "used", "speculative", "in_flight", "quarantined"; parts of pages in groups. O(tenants)."""
        charged = self.accounts.charged
        return {tenant: Counter({kind.value: n for kind, n in kinds.items()}) for tenant, kinds in charged.items()}

    # -- taking and giving back ------------------------------------------------------------------------
    def reserve(self, count: int, demand: Demand, *, or_fewer: bool = False, beside: int = 0) -> list[Block]:
        """`count` in-flight blocks with one reference each, charged to `demand.tenant`; or PoolFull.

        `beside`: pages of its unused speculation that are about to be used with them, and count already.
        """
        self.make_room(count, demand, or_less=or_fewer, beside=beside)
        taken = []
        for _ in range(min(count, len(self.free))):
            block = Block(self.free.pop(), demand.tenant, State.IN_FLIGHT, demand.now, refs=1)
            self.in_flight[block.page] = block
            if demand.shared:
                self.accounts.share(block, demand.now)
            else:
                self.accounts.charge(block)
            taken.append(block)
        return taken

    def make_room(self, count: int, demand: Demand, *, or_less: bool = False, beside: int = 0) -> None:
        """Evict until `count` pages are free; or PoolFull, having changed nothing. `or_less`: as far as it goes."""
        missing = count - len(self.free)
        if missing <= 0:
            return
        victims = self.line.choose(missing, demand, or_less, count + beside)
        if len(victims) < missing and not or_less:
            raise PoolFull(f"{count} pages wanted, {len(self.free)} free, too few may be evicted")
        for block, _, rule in victims:
            self.evict(block, rule)

    def vacate(self, count: int, now: float) -> None:
        """Evict until `count` pages are free, to do without them: guarantees are of those that are left, from now on.

        PoolFull, having changed nothing.
        """
        self.line.rule(self.shares, self.pages - count)
        missing = max(count - len(self.free), 0)
        victims = self.line.choose(missing, Demand(OPERATOR, speculative=False, now=now), asked=0)
        if len(victims) < missing:
            self.line.rule(self.shares, self.pages)
            raise PoolFull(f"{count} pages too many, {len(self.free)} free, too few may be evicted")
        for block, _, rule in victims:
            self.evict(block, rule)

    def publish(
        self, block: Block, key: BlockKey, parent: Block | None, *, speculative_until: float | None = None
    ) -> Block:
        """Make a written in-flight block resident under `key`, behind `parent` (None: the first of its sequence).

        With `speculative_until` it is charged as speculation on hold until that time. Returns the block to
        hold from now on: if another holder published the same key first, that one, with a reference for the
        caller, and the duplicate's page is freed.
        """
        del self.in_flight[block.page]
        twin = self.resident.get(key)
        if twin is not None:
            self._free_page(block)
            self.hold([twin])
            return twin
        self.accounts.refund(block)
        block.state, block.key, block.parent = State.RESIDENT, key, parent
        if speculative_until is not None:
            block.unused = Unused(speculative_until)
        self.accounts.charge(block)
        self.resident[key] = block
        self.evicted.pop(key, None)
        if parent is not None:
            parent.adopt(block)
            self.leaves.pop(parent.page, None)  # where nobody held it
            block.depth = parent.depth + 1
        return block

    def charge_to(self, block: Block, tenant: str, *, shared: bool = False) -> None:
        """Somebody else pays for this in-flight block from now on; `shared`: it is to be a group's."""
        self.accounts.close(block)
        block.tenant = tenant
        if shared:
            self.accounts.share(block, block.last_used)
        else:
            self.accounts.charge(block)

    def hold(self, blocks: Iterable[Block]) -> None:
        """Add one reference to each."""
        for block in blocks:
            block.refs += 1
            self.leaves.pop(block.page, None)

    def release(self, blocks: Iterable[Block]) -> None:
        """Drop one reference of each; an in-flight block without references is freed."""
        for block in blocks:
            block.refs -= 1
            if block.state is State.IN_FLIGHT and block.refs == 0:
                del self.in_flight[block.page]
                self._free_page(block)
            else:
                self._note_leaf(block)
        if self.dropped:
            self._free_dropped()

    def touch(self, blocks: Iterable[Block], now: float, session: str = "", tenant: str = "") -> int:
        """A live request of `session` uses these; returns how many were speculative and unused until now.

        `tenant`: whose request it is, who pays its part of a group's blocks; all of a sequence must be among these.
        """
        first_used, is_shared = 0, False
        for block in blocks:
            block.last_used = max(block.last_used, now)
            block.session = session
            if block.unused is not None:
                first_used += 1
                self.accounts.use_first(block, tenant, now)
            if block.payers is not None and tenant:
                is_shared = True
                self.accounts.use(block, tenant, now)
            if block.page in self.leaves:
                self.line.put(block)
        if is_shared:
            self.line.age(now)
        return first_used

    def extend_hold(self, blocks: Iterable[Block], until: float, tenant: str) -> None:
        """Unused speculative blocks of the tenant's among these keep their place at least until then."""
        for block in blocks:
            if block.unused is not None and block.tenant == tenant:
                block.unused.hold_until = max(block.unused.hold_until, until)

    def evict(self, block: Block, rule: str) -> None:
        """Forget an unreferenced resident leaf; its page becomes free and its key is remembered."""
        if not block.is_leaf:
            raise ValueError(f"page {block.page} is not an unreferenced resident leaf")
        if block.parent is not None and not block.speculative:
            block.parent.last_used = max(block.parent.last_used, block.last_used)
        self._unlink(block)
        self._remember(block.key, rule)
        self._free_page(block)
        self.evictions += 1
        self.on_evict(block, rule)

    def quarantine(self, block: Block) -> None:
        """Take an in-flight block's page out of use: its bytes may still be written by somebody."""
        del self.in_flight[block.page]
        self.accounts.refund(block)
        block.state = State.QUARANTINED
        self.accounts.charge(block)
        self.quarantined[block.page] = block

    def resume(self, block: Block) -> None:
        """The writer of a quarantined page is back and goes on: its block is in flight again."""
        if not block.refs:
            raise ValueError(f"quarantined page {block.page} has no holder to go on")
        del self.quarantined[block.page]
        self.accounts.refund(block)
        block.state = State.IN_FLIGHT
        self.accounts.charge(block)
        self.in_flight[block.page] = block

    def readmit(self, block: Block) -> None:
        """The writer of a quarantined page is proved gone: free the page. References must be dropped."""
        if block.refs:
            raise ValueError(f"quarantined page {block.page} is still referenced")
        del self.quarantined[block.page]
        self._free_page(block)

    def drop(self, block: Block, rule: str) -> None:
        """Forget a resident block, leaf or not (its bytes are damaged, say): its children begin sequences.

        Its page is free when all have let go who hold it or something behind it: they may be reading it, and what is
        before it, which is held for them.
        """
        if block.state is not State.RESIDENT:
            raise ValueError(f"page {block.page} is not resident")
        readers = [other for other in _with_descendants(block) if other.refs]
        before = Hold([block.parent] if block.parent is not None and readers else [])
        self.hold(before.blocks)
        if before.blocks:
            self.holders.add(before)
        orphans = block.children
        block.disown(orphans)
        for child in orphans:
            child.parent = None
            for other in _with_descendants(child):
                other.depth -= block.depth + 1
        self._unlink(block)
        self._remember(block.key, rule)
        block.parent = None
        self.accounts.refund(block)
        block.state = State.DROPPED
        self.accounts.charge(block)
        self.dropped[block.page] = Dropped(block, readers, before)
        self.moved += 1
        self._free_dropped()

    def take_in(self, blocks: Sequence[Block]) -> None:
        """Blocks that lie in free pages already, as `cache.rebuild` makes them: resident or quarantined, unheld.

        Raises ValueError, having changed nothing, where a page is not free or two blocks have one page or key.
        """
        pages, free = {block.page for block in blocks}, set(self.free)
        keys = {block.key for block in blocks if block.state is State.RESIDENT}
        known = sum(block.state is State.RESIDENT for block in blocks)
        if len(pages) < len(blocks) or not pages <= free or len(keys) < known or keys & self.resident.keys():
            raise ValueError("these blocks do not fit: a page is taken, or a key or page is named twice")
        self.free = sorted(free - pages, reverse=True)
        for block in blocks:
            if block.payers is None:
                self.accounts.charge(block)
            else:
                self.accounts.share(block, block.last_used)
            if block.state is State.RESIDENT:
                self.resident[block.key] = block
                self._note_leaf(block)
            else:
                self.quarantined[block.page] = block

    def clear(self) -> None:
        """Evict every unreferenced resident block."""
        while self.leaves:
            for block in list(self.leaves.values()):
                self.evict(block, "cleared")

    def relocate(self, moves: Iterable[tuple[int, int]]) -> None:
        """The bytes of unheld resident blocks were copied from page to free page: publish where they are now.

        The pages they leave are free. Raises ValueError, having changed nothing, for a page that is held, not
        resident, or not free.
        """
        moving: list[tuple[Block, int]] = []
        at = {block.page: block for block in self.resident.values()}
        free = set(self.free)
        for source, target in moves:
            block = at.pop(source, None)  # it moves once
            if block is None or block.refs:
                raise ValueError(f"page {source} holds no resident block that may move")
            if target not in free:
                raise ValueError(f"page {target} is not free")
            free.discard(target)
            moving.append((block, target))
        for block, target in moving:
            self.leaves.pop(block.page, None)
            free.add(block.page)
            block.page = target
        for block, _ in moving:
            self._note_leaf(block)
        self.moved += 1
        self.free = sorted(free, reverse=True)

    def resize(self, pages: int) -> None:
        """Have pages 0 to `pages` − 1 from now on.

        Raises ValueError, having changed nothing, where one of those to be cut off is not free.
        """
        kept = [page for page in self.free if page < pages]
        if len(self.free) - len(kept) < self.pages - pages:
            raise ValueError(f"of {self.pages} pages, not all from {pages} on are free")
        self.free = sorted([*kept, *range(self.pages, pages)], reverse=True)
        self.pages = pages
        self.line.rule(self.shares, pages)

    def sequences(self) -> list[list[Block]]:
        """Resident blocks as runs that follow each other: from a first block or a fork to the next fork or end."""
        starts = [b for b in self.resident.values() if b.parent is None or b.parent.fanout > 1]
        found = []
        for block in starts:
            run = [block]
            while run[-1].fanout == 1:
                run += run[-1].children
            found.append(run)
        return found

    def blocks(self) -> list[Block]:
        """Every block that occupies a page."""
        dropped = [gone.block for gone in self.dropped.values()]
        return [*self.resident.values(), *self.in_flight.values(), *self.quarantined.values(), *dropped]

    def check(self) -> None:
        """Prove law 5, or raise AccountingError naming what does not add up. O(pages)."""
        check_pool(self)

    # -- within ----------------------------------------------------------------------------------------
    def _free_page(self, block: Block) -> None:
        self.accounts.close(block)
        block.state = State.GONE
        self.free.append(block.page)

    def _free_dropped(self) -> None:
        for page, gone in list(self.dropped.items()):
            if page in self.dropped and not any(reader.refs for reader in gone.readers):
                del self.dropped[page]
                self._free_page(gone.block)
                self.holders.discard(gone.before)
                self.release(gone.before.blocks)  # one that was dropped, too, may be free now

    def _note_leaf(self, block: Block) -> None:
        if block.is_leaf and block.page not in self.leaves:
            self.leaves[block.page] = block
            self.line.put(block)

    def _line_up(self) -> None:
        """All leaves anew."""
        for block in self.leaves.values():
            self.line.put(block)

    def _unlink(self, block: Block) -> None:
        del self.resident[block.key]
        self.leaves.pop(block.page, None)
        if block.parent is not None:
            block.parent.disown([block])
            self._note_leaf(block.parent)

    def _remember(self, key: BlockKey, rule: str) -> None:
        self.evicted[key] = rule
        if len(self.evicted) > self._evicted_memory:
            self.evicted.popitem(last=False)
            self.forgot_evictions = True


def _with_descendants(block: Block) -> list[Block]:
    found = [block]
    for other in found:
        found.extend(other.children)
    return found
