"""What lies in Redis: the names of keys, and the header before a block's bytes.

Names are `prefix:LAYOUT:namespace:…`, and the header says its layout once more: what another version wrote under
other rules is never found, and never taken for ours. A change of either raises LAYOUT.

    header = magic and layout (8 bytes) ‖ length ‖ XXH3-64 of the bytes ‖ first 8 bytes of the key ‖ tenant (64, NUL)

Numbers are little-endian unsigned 64 bits. Every field of it is compared with what it must be when a block is read,
but for the tenant, whose only use is to be charged.
"""

import struct
from dataclasses import dataclass

from kvprefetch.cache.keys import BlockKey
from kvprefetch.tiers.contract import Incoming

LAYOUT = 1
_HEADER = struct.Struct("<8sQQ8s64s")
_MAGIC = b"kvblock" + bytes([LAYOUT])
HEADER_BYTES = _HEADER.size


@dataclass(frozen=True, slots=True)
class Names:
    """The names of one namespace's keys."""

    prefix: str
    namespace: str

    def block(self, key: BlockKey) -> str:
        """Of a block's bytes."""
        return f"{self.prefix}:{LAYOUT}:{self.namespace}:b:{key.hex()}"

    def holders(self, key: BlockKey) -> str:
        """Of the nodes that have a block: a sorted set, address by expiry."""
        return f"{self.prefix}:{LAYOUT}:{self.namespace}:n:{key.hex()}"

    def charged(self, tenant: str) -> str:
        """Of what a tenant is charged for: a sorted set, block's key by expiry."""
        return f"{self.prefix}:{LAYOUT}:{self.namespace}:t:{tenant}"

    @property
    def tenants(self) -> str:
        """Of those who are charged for anything: a sorted set, tenant by expiry."""
        return f"{self.prefix}:{LAYOUT}:{self.namespace}:tenants"


@dataclass(frozen=True, slots=True)
class Sealed:
    """What a header says."""

    length: int
    checksum: int
    tenant: str


def value_of(block: Incoming) -> bytes:
    """Header and bytes."""
    data = block.data.cast("B")
    tenant = block.tenant.encode()[:64]
    return b"".join((_HEADER.pack(_MAGIC, len(data), block.checksum, block.key[:8], tenant), data))


def read_header(value: bytes | memoryview, key: BlockKey) -> Sealed | None:
    """What the header of `value`, found under `key`, says; None if it is no header of a block under that key."""
    if len(value) < HEADER_BYTES:
        return None
    magic, length, checksum, tag, tenant = _HEADER.unpack_from(value)
    if magic != _MAGIC or tag != key[:8]:
        return None
    return Sealed(length, checksum, tenant.rstrip(b"\0").decode(errors="replace"))
