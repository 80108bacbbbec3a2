"""What is believed of an engine's prefix cache: which prompts' beginnings it holds.

The engine evicts by its own rule, the least recently used first; this pool does the same with the same traffic, and is
put right by what the engine says of each request (`cached_tokens`). A block is a run of `BLOCK_BYTES` of canonical
bytes, taken for `BLOCK_UNITS` tokens, which is near enough to weigh preloads; what is really sent is counted in real
tokens elsewhere. Pure: no clock, no I/O. Blocks are never held between calls.
"""

import hmac
from collections.abc import Iterable, Sequence
from hashlib import sha256

from kvprefetch.cache.block import Block
from kvprefetch.cache.evict import Demand, Evictable, Rank, choose_victims
from kvprefetch.cache.keys import BlockKey
from kvprefetch.cache.pool import BlockPool

BLOCK_BYTES, BLOCK_UNITS = 512, 128
_MOST = 65_536  # blocks that are remembered, whatever the engine can hold
_DOUBTS = 3  # contradictions in a row that are believed
_SLACK = 32  # blocks that are evicted beyond what is needed: looking for victims costs more than one of them
_NOBODY = Demand("", speculative=False, now=0.0)  # the engine's rule asks nothing of whom room is made for


def prompt_root(secret: bytes, tenant: str, model: str, salt: str) -> BlockKey:
    """Where the keys of one tenant's prompts begin, for one model and one salt."""
    parts = b"".join(len(part).to_bytes(4, "big") + part for part in (s.encode() for s in (tenant, model, salt)))
    return hmac.digest(secret, parts, "sha256")


def prompt_keys(root: BlockKey, canonical: Iterable[bytes]) -> list[BlockKey]:
    """Keys of the whole blocks of these bytes, in order."""
    data, key = b"".join(canonical), root
    keys: list[BlockKey] = []
    for end in range(BLOCK_BYTES, len(data) + 1, BLOCK_BYTES):
        key = sha256(key + data[end - BLOCK_BYTES : end]).digest()
        keys.append(key)
    return keys


def _as_the_engine_does(block: Evictable, demand: Demand) -> Rank | None:
    return Rank(0, block.last_used, "lru_of_the_engine")


class Replica(BlockPool):
    """See the module's promises."""

    def __init__(self, capacity_tokens: int | None, most: int = _MOST) -> None:
        super().__init__(most)
        self._doubts = 0
        self.set_capacity(capacity_tokens)

    def set_capacity(self, tokens: int | None) -> None:
        """What the engine can hold; None: it does not say, and it is learnt from what it has lost."""
        self.is_known = tokens is not None
        self.limit = self.pages if tokens is None else min(max(tokens // BLOCK_UNITS, 1), self.pages)
        self.make_room(0, _NOBODY)

    @property
    def free_pages(self) -> int:
        """Blocks that the engine can take in without losing others, as far as is known."""
        return max(self.limit - len(self.resident), 0)

    def make_room(self, count: int, demand: Demand, *, or_less: bool = False, beside: int = 0) -> None:
        """Forget what the engine will have evicted, whoever is charged for it."""
        beyond = len(self.resident) + count - self.limit
        missing = count - len(self.free)
        if beyond > 0:
            missing = beyond + min(_SLACK, self.limit // 8)
        for block, rule in choose_victims(self.leaves.values(), missing, _as_the_engine_does, demand):
            self.evict(block, rule)

    def store(
        self, keys: Sequence[BlockKey], demand: Demand, session: str, kind: str = "", until: float = 0.0
    ) -> list[Block]:
        """The engine has all of these now; returns the blocks that it had not. With `until`, they are speculation."""
        keys = keys[: self.limit]
        found = self.match(keys)
        self.hold(found)
        parent = found[-1] if found else None
        fresh: list[Block] = []
        reserved = self.reserve(len(keys) - len(found), demand, or_fewer=True)
        for block, key in zip(reserved, keys[len(found) :], strict=False):
            parent = self.publish(block, key, parent, speculative_until=until if demand.speculative else None)
            parent.preloaded_for(session, kind)
            fresh.append(block)
        for block in found:  # the engine has read them again, if for nobody yet
            block.last_used = max(block.last_used, demand.now)
        self.release(reversed(found + fresh))
        return fresh

    def use(self, keys: Sequence[BlockKey], now: float, session: str) -> list[Block]:
        """A live request has found its beginning; returns the speculative blocks that it is the first to use."""
        found = self.match(keys)
        first = [block for block in found if block.speculative]
        self.hold(found)
        self.touch(found, now, session)
        self.release(reversed(found))
        return first

    def correct(self, keys: Sequence[BlockKey], cached: int) -> int:
        """The engine had only the first `cached` of these; returns how many more it was believed to have.

        One such word may have other reasons: a template with the time of day, another engine behind the same address.
        Where it is said again and again, what is older than the block that was lost must be lost, too, and where its
        capacity is not known, the engine holds so much less than was thought.
        """
        found = self.match(keys)
        kept, lost = found[:cached], found[cached:]
        if not lost:
            return 0
        oldest = lost[0].last_used
        self._doubts += 1
        self.hold(kept)
        self._forget(lost[0])
        if self._doubts >= _DOUBTS:
            self._forget_older_than(oldest)
        self.release(reversed(kept))
        if self._doubts >= _DOUBTS and not self.is_known:
            self.limit = min(max(len(self.resident), len(keys), 1), self.pages)
        return len(lost)

    def agreed(self) -> None:
        """The engine had what it was believed to have."""
        self._doubts = 0

    def confirm(self, keys: Sequence[BlockKey], cached: int, demand: Demand, session: str) -> None:
        """The engine said that it had the first `cached` of these: it holds more than was thought, perhaps."""
        missing = cached - len(self.match(keys[:cached]))
        if missing > 0:
            if not self.is_known:
                self.limit = min(self.limit + missing, self.pages)
            self.store(keys[:cached], demand, session)

    def _forget_older_than(self, oldest: float) -> None:
        for leaf in [leaf for leaf in self.leaves.values() if leaf.last_used < oldest]:
            chain: Block | None = leaf
            while chain is not None and not chain.fanout and not chain.refs and chain.last_used < oldest:
                parent = chain.parent
                self.evict(chain, "lru_of_the_engine")
                chain = parent

    def _forget(self, block: Block) -> None:
        """This block and all behind it."""
        stack = [block]
        for other in stack:
            stack.extend(other.children)
        for other in reversed(stack):
            if not other.refs:
                self.evict(other, "lru_of_the_engine")
