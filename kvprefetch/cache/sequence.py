"""The page table of one token sequence: a shared resident prefix, then private pages.

Promises
- Holds one reference on every block in `blocks` from `open` to `close`, so a waiting or preempted
  sequence cannot lose its prefix.
- `computed` tokens have their KV in pages; `written` of them are in shared pages that nobody may write.
  A fully cached prompt has `computed = len(tokens) − 1`: its last token is run again for its logits, and
  `written` keeps that run from writing into the shared page.
- The last sampled token has no KV yet: only `complete` moves `computed`.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

from kvprefetch.cache.block import Block
from kvprefetch.cache.evict import Demand
from kvprefetch.cache.keys import BlockKey, extend_keys
from kvprefetch.cache.pool import BlockPool
from kvprefetch.errors import PoolTooSmall


@dataclass(frozen=True)
class Owner:
    """Whose sequences these are: the root of their keys and who is charged."""

    root: BlockKey
    tenant: str


class PagedSequence:
    """See the module's promises. Create with `open`."""

    def __init__(
        self,
        pool: BlockPool,
        owner: Owner,
        tokens: Seq[int],
        block_tokens: int,
        keys: Seq[BlockKey] = (),  # of the leading blocks, where already known
    ) -> None:
        self.pool, self.owner, self.block_tokens = pool, owner, block_tokens
        self.tokens = list(tokens)
        self.keys = extend_keys(list(keys), owner.root, self.tokens, block_tokens)
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
            fresh = self.pool.reserve(wanted - len(found), demand)
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
        extend_keys(self.keys, self.owner.root, self.tokens, self.block_tokens)
        published = []
        while (self.shared + 1) * self.block_tokens <= end:
            at, key = self.shared, self.keys[self.shared]
            parent = self.blocks[at - 1] if at else None
            mine = self.blocks[at]
            block = self.pool.publish(mine, key, parent, speculative_until=speculative_until)
            self.blocks[at] = block
            if block is mine:
                published.append(block)
            self._withdraw(at)
            self.shared += 1
        return published

    def loaded(self, blocks: int, *, speculative_until: float | None = None) -> list[Block]:
        """The next `blocks` pages hold what somebody else computed: publish them. Nothing beyond is computed yet."""
        published = self.complete((self.shared + blocks) * self.block_tokens, speculative_until=speculative_until)
        self.computed = min(self.computed, len(self.tokens) - 1)
        return published

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
