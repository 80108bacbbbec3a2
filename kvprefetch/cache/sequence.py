"""The page table of one token sequence: a shared resident prefix, then private pages.

Promises
- Holds one reference on every block in `blocks` from `open` to `close`, so a waiting or preempted
  sequence cannot lose its prefix.
- `computed` tokens have their KV in pages; `written` of them are in shared pages that nobody may write.
  A fully cached prompt has `computed = len(tokens) − 1`: its last token is run again for its logits, and
  `written` keeps that run from writing into the shared page.
- The last sampled token has no KV yet: only `complete` moves `computed`.
- Its first blocks may be borrowed from shared namespaces (`cache.commons`), in the pool or loaded from another tier.
  What it computes itself is published under its owner's own root, whatever it borrowed before (law 4).
"""

from collections.abc import Sequence as Seq

from kvprefetch.cache.block import Block
from kvprefetch.cache.commons import Owner, borrow
from kvprefetch.cache.evict import Demand
from kvprefetch.cache.keys import BlockKey, extend_keys
from kvprefetch.cache.pool import BlockPool
from kvprefetch.cache.shares import OPERATOR
from kvprefetch.errors import PoolTooSmall

__all__ = ["Owner", "PagedSequence"]


class PagedSequence:
    """See the module's promises. Create with `open`."""

    def __init__(
        self,
        pool: BlockPool,
        owner: Owner,
        tokens: Seq[int],
        block_tokens: int,
        chain: Seq[BlockKey] = (),  # of the leading blocks, where already known
    ) -> None:
        self.pool, self.owner, self.block_tokens = pool, owner, block_tokens
        self.tokens = list(tokens)
        self.chain = extend_keys(list(chain), owner.root, self.tokens, block_tokens)  # what it is known by
        borrowed = borrow(owner, self.tokens, block_tokens)
        self.borrowed = len(borrowed)  # leading keys of shared namespaces
        self.keys = [*borrowed, *self.chain[self.borrowed :]] if borrowed else self.chain  # where its blocks are found
        self.blocks: list[Block] = []
        self.computed = 0
        self.shared = 0  # leading blocks that are resident
        self._announced = 0  # keys before this one were announced, unless found resident

    @property
    def written(self) -> int:
        """Tokens whose KV lies in published blocks."""
        return self.shared * self.block_tokens

    @property
    def pages(self) -> list[int]:
        """Physical pages in sequence order."""
        return [block.page for block in self.blocks]

    def settle(self, elsewhere: int = 0) -> None:
        """Before `open`: what was known of shared blocks may be gone; borrow what is there now.

        The first `elsewhere` keys lie in another tier, from which they will be loaded.
        """
        for at, key in enumerate(self.keys[: self.borrowed]):
            if at >= elsewhere and key not in self.pool.resident:
                self._own_from(at)
                return

    def open(self, capacity: int, demand: Demand) -> int:
        """Hold the resident prefix and reserve pages up to `capacity` tokens, all or nothing.

        Returns the tokens found resident. Raises PoolTooSmall if an empty pool could not give it, PoolFull
        if this one cannot now; then nothing is held.
        """
        wanted = -(-capacity // self.block_tokens)
        if wanted > self.pool.pages - len(self.pool.quarantined):
            raise PoolTooSmall(
                f"{capacity} tokens need {wanted} pages of {self.block_tokens}; the pool has {self.pool.pages}"
            )
        found = self.pool.match(self.keys[:wanted])
        self.pool.hold(found)
        try:
            unused = sum(block.speculative for block in found) if not demand.speculative else 0
            fresh = self.pool.reserve(wanted - len(found), demand, beside=unused)
        except BaseException:
            self.pool.release(reversed(found))
            raise
        self.blocks, self.shared = found + fresh, len(found)
        self.pool.holders.add(self)
        self.pool.announced.update(self.keys[self.shared : wanted])
        self._announced = min(len(self.keys), wanted)
        self._skip_cached()
        return self.written

    def adopt(self) -> int:
        """Take over blocks that somebody else published meanwhile; returns the tokens saved."""
        before = self.computed
        while self.shared < len(self.keys) and self.shared < len(self.blocks):
            twin = self.pool.resident.get(self.keys[self.shared])
            if twin is None or self.computed > self.written:
                break
            mine = self.blocks[self.shared]
            self.pool.hold([twin])
            self.blocks[self.shared] = twin
            self.pool.release([mine])
            self._withdraw(self.shared)
            self.shared += 1
        self._skip_cached()
        return self.computed - before

    def append(self, token: int) -> None:
        """A sampled token; it has no KV until a forward has run it."""
        self.tokens.append(token)

    def complete(self, end: int, *, speculative_until: float | None = None) -> list[Block]:
        """The KV of tokens up to `end` is written: publish every full block. Returns the newly resident.

        With `speculative_until`, they are charged as speculation on hold until that time.
        """
        self.computed = end
        self._own_from(self.shared)
        extend_keys(self.chain, self.owner.root, self.tokens, self.block_tokens)
        if self.keys is not self.chain:
            self.keys += self.chain[len(self.keys) :]
        return self._publish(end // self.block_tokens, speculative_until)

    def loaded(self, blocks: int, *, speculative_until: float | None = None) -> list[Block]:
        """The next `blocks` pages hold what somebody else computed: publish them. Nothing beyond is computed yet."""
        upto = self.shared + blocks
        self.computed = min(upto * self.block_tokens, len(self.tokens) - 1)
        return self._publish(upto, speculative_until)

    def close(self, *, quarantine: bool = False) -> list[Block]:
        """Drop all references; unpublished pages are freed, or quarantined (and returned). Idempotent."""
        doubtful = self.blocks[self.shared :] if quarantine else []
        for block in doubtful:
            self.pool.quarantine(block)
        self.pool.release(reversed(self.blocks))
        for at in range(self.shared, len(self.blocks)):
            self._withdraw(at)
        self.blocks = []
        self.pool.holders.discard(self)
        return doubtful

    def _publish(self, upto: int, speculative_until: float | None) -> list[Block]:
        published = []
        for at in range(self.shared, upto):
            mine, key = self.blocks[at], self.keys[at]
            if at < self.borrowed:
                self._charge_its_payer(mine, key)
            parent = self.blocks[at - 1] if at else None
            block = self.pool.publish(mine, key, parent, speculative_until=speculative_until)
            self.blocks[at] = block
            if block is mine:
                published.append(block)
            if at >= self.borrowed:
                self.owner.filled(key)
            self._withdraw(at)
            self.shared += 1
        return published

    def _charge_its_payer(self, block: Block, key: BlockKey) -> None:
        """A borrowed block was loaded into a page of ours."""
        is_group = self.owner.commons is not None and self.owner.commons.is_group(key)
        self.pool.charge_to(block, self.owner.tenant if is_group else OPERATOR, shared=is_group)

    def _own_from(self, at: int) -> None:
        """No block from this one on is borrowed."""
        if at >= self.borrowed:
            return
        announced = range(at, min(self.borrowed, self._announced))
        for each in announced:
            self._withdraw(each)
        self.keys = [*self.keys[:at], *self.chain[at:]] if at else self.chain
        self.pool.announced.update(self.keys[each] for each in announced)
        self.borrowed = at

    def _skip_cached(self) -> None:
        self.computed = max(self.computed, min(self.written, len(self.tokens) - 1))

    def _withdraw(self, at: int) -> None:
        """Block `at` is no longer in flight here. Keys of sampled tokens were announced by others, if at all."""
        if at >= self._announced:
            return
        key = self.keys[at]
        if self.pool.announced[key] > 1:
            self.pool.announced[key] -= 1
        else:
            self.pool.announced.pop(key, None)
