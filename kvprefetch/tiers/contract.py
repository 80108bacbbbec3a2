"""The one contract of every place where blocks' bytes lie: `gpu`, `host`, `disk` and `redis`.

Promises of all of them
- A block is found under its key with exactly the bytes that were stored, or it is not found: every load verifies the
  checksum that was sealed with the block. A block that fails is dropped and counted as corrupt.
- Keys are 32 bytes that the tier did not derive and does not understand. Blocks of one tier all have `block_bytes`.
- A tier never grows past its capacity: to store, it evicts what is wanted least. What it evicts is gone.
- While a tenant is within its guarantee, nobody else's store evicts what it has used; a preload evicts nothing of
  another. Beyond guarantees it is weighted max-min, and no room stays empty while anybody wants it.
- A block is charged whole to the tenant for whom it was stored. So is a group's: only in a worker's pool do all who use
  it pay a part.
- Calls block for as long as the place takes (memory: not at all; Redis: its timeout) and may be made by one thread at
  a time, unless the tier says otherwise. They raise TierUnavailable where the place is out of reach or full for
  reasons of its own, having changed nothing that counts; ValueError for buffers of another size; never anything else.
- `tests/tiers/test_conformance.py` runs over each.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kvprefetch.cache.keys import BlockKey
from kvprefetch.cache.shares import Shares

KEY_BYTES = 32
CLAIM_S = 3_600.0
"""What nobody has used for so long is nobody's claim: beyond guarantees it goes first."""


@dataclass(frozen=True, slots=True)
class Incoming:
    """A block to be stored. `data`: C-contiguous, `block_bytes` bytes, the caller's until `store` returns."""

    key: BlockKey
    parent: BlockKey  # key of the block before it in its sequence; b"" if it is the first
    tenant: str  # who is charged
    data: memoryview
    checksum: int  # `tiers.checksum.checksum(data)`
    speculative_until: float | None = None  # nobody has asked for it yet; it keeps its place until then


@dataclass(frozen=True, slots=True)
class Usage:
    """What a tier holds now, and has counted since it was opened. Bytes; `capacity` 0: not bounded by us."""

    blocks: int
    bytes: int
    capacity: int
    by_tenant: dict[str, int]  # bytes charged
    counters: dict[str, int] = field(default_factory=dict)  # "stored", "loaded", "evicted", "corrupt", "refused", …


class Tier(Protocol):
    """See the module's promises."""

    name: str
    block_bytes: int
    counters: Counter[str]  # as in `Usage`, at once and without asking anybody

    def find(self, keys: Sequence[BlockKey]) -> int:
        """How many leading keys are held. Takes nothing, promises nothing."""

    def load(self, keys: Sequence[BlockKey], into: Sequence[memoryview]) -> int:
        """Copy leading blocks into `into[0]`, `into[1]`, … and verify the copies; how many were good.

        Ends at the first that is missing or corrupt; what is in `into` from there on is garbage.
        """

    def store(self, blocks: Sequence[Incoming]) -> int:
        """Take leading blocks; how many of them are held now, stored or held before."""

    def discard(self, keys: Sequence[BlockKey]) -> int:
        """Forget these blocks, as far as nobody is using them; how many were forgotten."""

    def rule(self, shares: Shares) -> None:
        """What each tenant may count on from now on. Evicts nothing at once: it goes as room is needed."""

    def usage(self) -> Usage:
        """Figures for people and metrics."""

    def check(self) -> None:
        """Prove that everything is accounted for (law 5), or raise AccountingError."""

    def close(self) -> None:
        """Let go of files and connections; what is stored stays. Calling it again does nothing."""
