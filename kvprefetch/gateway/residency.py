"""Which tokens' KV an engine has said is in its cache. Pure: no I/O, no clock; belongs to one event loop.

An engine names its blocks by hashes of its own. They are kept under keys of ours, made of what a block stands for:
its tokens, all before them, and whatever else tells it from others (salt, adapter, images). So a prompt can be looked
up without knowing how the engine hashes.

Promises: what `cached` counts was stored, and was not said to be removed since: it is a lower bound, whatever was
missed. After messages were missed everything is forgotten, as a removal may have been among them, and only what is
stored from then on counts: blocks whose parent is unknown do not. What would need guessing is not counted either:
blocks of another size than the first one seen, and models whose cache has more than one group, of which a hit needs
blocks of all. At most `max_blocks` blocks of a rank are known (about 300 bytes each); the oldest are forgotten first.
"""

import hashlib
from array import array
from collections.abc import Hashable, Sequence, Set

import msgspec

MAX_BLOCKS, MAX_RANKS = 262_144, 64
_KEY_BYTES = 16
_ROOT = bytes(_KEY_BYTES)


class _Chain:
    """The keys of a prompt's blocks, each computed when it is first wanted."""

    def __init__(self, token_ids: Sequence[int], block_tokens: int, salt: str, adapter: str) -> None:
        self.token_ids, self.asked = token_ids, (block_tokens, salt, adapter)
        self._step, self._adapter = 8 * block_tokens, [adapter] if adapter else []
        self._first = [*self._adapter, *([salt] if salt else [])]  # the salt is in the first block alone
        self._packed = array("q", token_ids).tobytes()
        self._keys: list[bytes] = []

    def leading(self, resident: Set[bytes]) -> int:
        """How many of the first blocks are among these."""
        for at, key in enumerate(self._keys):
            if key not in resident:
                return at
        while len(self._keys) < len(self._packed) // self._step:
            if self._next() not in resident:
                return len(self._keys) - 1
        return len(self._keys)

    def _next(self) -> bytes:
        parent, extra = (self._keys[-1], self._adapter) if self._keys else (_ROOT, self._first)
        start = len(self._keys) * self._step
        key = _key(parent, self._packed[start : start + self._step], self.asked[2], extra or None)
        self._keys.append(key)
        return key


class Blocks:
    """Those of one data-parallel rank, whose cache is its own."""

    def __init__(self, max_blocks: int = MAX_BLOCKS) -> None:
        self.block_tokens = 0  # 0: none seen yet
        self.is_complete = True  # every block in its cache is known
        self.is_one_group = True
        self.seq: int | None = None  # of the latest message
        self._max_blocks, self._group = max_blocks, 0
        self._keys: dict[Hashable, bytes] = {}  # of each block, by the engine's hash of it; oldest first
        self._resident: set[bytes] = set()
        self._chain: _Chain | None = None  # of the prompt that was asked for last

    def __len__(self) -> int:
        return len(self._keys)

    def stored(
        self,
        hashes: Sequence[Hashable],
        parent: Hashable | None,
        token_ids: Sequence[int],
        block_tokens: int,
        *,
        adapter: str = "",
        extras: Sequence[object] | None = None,
        group: int = 0,
    ) -> None:
        """A run of blocks; `extras`: for each of them what it stands for besides its tokens, None for nothing."""
        self._in_group(group)
        self.block_tokens = self.block_tokens or block_tokens
        key = _ROOT if parent is None else self._keys.get(parent)
        is_whole = 0 < block_tokens == self.block_tokens and len(token_ids) == len(hashes) * block_tokens
        if key is None or not is_whole or (extras is not None and len(extras) != len(hashes)):
            self.is_complete = False
            return
        packed, step = array("q", token_ids).tobytes(), 8 * block_tokens
        for at, block in enumerate(hashes):
            key = _key(key, packed[at * step : at * step + step], adapter, extras[at] if extras is not None else None)
            self._put(block, key)

    def removed(self, hashes: Sequence[Hashable]) -> None:
        """These are gone; one that is not known is nothing new."""
        for block in hashes:
            self._resident.discard(self._keys.pop(block, b""))

    def cleared(self) -> None:
        """The whole cache is empty, so that nothing unknown is left in it."""
        self._keys.clear()
        self._resident.clear()
        self.is_complete = True

    def forget(self) -> None:
        """Messages were missed: nothing is known of its cache."""
        self.cleared()
        self.is_complete = False

    def cached(self, token_ids: Sequence[int], salt: str = "", adapter: str = "") -> int:
        """Leading tokens known to be there."""
        if not self.block_tokens or not self._resident:
            return 0
        chain, asked = self._chain, (self.block_tokens, salt, adapter)
        # a tuple never changes: what is warmed piece by piece is asked for again and again
        if chain is None or chain.token_ids is not token_ids or chain.asked != asked:
            chain = _Chain(token_ids, *asked)
            self._chain = chain if isinstance(token_ids, tuple) else None
        return chain.leading(self._resident) * self.block_tokens

    def _put(self, block: Hashable, key: bytes) -> None:
        self._resident.discard(self._keys.pop(block, b""))
        self._keys[block] = key
        self._resident.add(key)
        if len(self._keys) > self._max_blocks:
            self.removed([next(iter(self._keys))])
            self.is_complete = False

    def _in_group(self, group: int) -> None:
        if self.block_tokens and group != self._group:
            self.is_one_group = False
        self._group = group


class Residency:
    """See the module's promises. Ranks that have said nothing are not known of."""

    def __init__(self, max_blocks: int = MAX_BLOCKS) -> None:
        self._max_blocks = max_blocks
        self._ranks: dict[int, Blocks] = {}

    @property
    def is_complete(self) -> bool:
        """Whether all that is cached is known, so that `cached` is exact."""
        return bool(self._ranks) and all(rank.is_complete and rank.is_one_group for rank in self._ranks.values())

    @property
    def block_tokens(self) -> int | None:
        """The engine's block size, once it is known."""
        return next((rank.block_tokens for rank in self._ranks.values() if rank.block_tokens), None)

    def __len__(self) -> int:
        return sum(map(len, self._ranks.values()))

    def message(self, rank: int, seq: int) -> Blocks | None:
        """The blocks of `rank`, for the events of its message `seq`; forgotten if it is not the next one.

        Messages are numbered from 0 by an engine that has just started. None: more ranks than can be known.
        """
        if rank not in self._ranks and len(self._ranks) == MAX_RANKS:
            return None
        blocks = self._ranks.get(rank)
        if blocks is None or seq == 0:
            blocks = self._ranks[rank] = Blocks(self._max_blocks)
        if seq != (0 if blocks.seq is None else blocks.seq + 1):
            blocks.forget()
        blocks.seq = seq
        return blocks

    def forget(self) -> None:
        """Nothing is known of any rank, until it says something."""
        self._ranks.clear()

    def cached(
        self, token_ids: Sequence[int], salt: str = "", adapter: str = "", rank: int | None = None
    ) -> int | None:
        """Leading tokens that are known to be cached: whole blocks; None while nothing is known at all.

        Without a `rank`: by each of those known of, as any of them may get the request. The engine computes a
        prompt's last token in any case, and so its last block where that ends with it.
        """
        asked = self._ranks.values() if rank is None else [self._ranks[rank]] if rank in self._ranks else []
        if not asked or not all(blocks.is_one_group for blocks in asked):
            return None
        return min(blocks.cached(token_ids, salt, adapter) for blocks in asked)


def _key(parent: bytes, tokens: bytes, adapter: str, extra: object) -> bytes:
    digest = hashlib.blake2b(parent, digest_size=_KEY_BYTES)
    digest.update(tokens)
    if adapter or extra is not None:
        digest.update(msgspec.msgpack.encode((adapter, extra)))
    return digest.digest()
