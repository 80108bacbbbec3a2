"""Packed fields of the wire: keys of 32 bytes, slots of a little-endian uint32, checksums of a little-endian uint64.

They raise InvalidRequest for what has another length, naming the field.
"""

from collections.abc import Sequence
from struct import pack, unpack

from kvprefetch.cache.keys import BlockKey
from kvprefetch.errors import InvalidRequest
from kvprefetch.tiers.contract import KEY_BYTES

TAKEN = 0xFFFFFFFF
"""In place of a slot: somebody holds or writes that block already."""


def split(packed: bytes) -> tuple[BlockKey, ...]:
    """The keys in `packed`, of which `count_keys` has said that they are whole."""
    return unpack(f"{KEY_BYTES}s" * (len(packed) // KEY_BYTES), packed)


def count_keys(packed: bytes, most: int) -> int:
    """How many keys there are. Raises InvalidRequest for a part of a key, or more than `most` (service.max_blocks)."""
    count, rest = divmod(len(packed), KEY_BYTES)
    if rest:
        raise InvalidRequest(f"keys: {len(packed)} bytes are not whole keys of {KEY_BYTES} bytes each")
    if count > most:
        raise InvalidRequest(f"keys: {count} in one call; send at most {most} at a time (service.max_blocks)")
    return count


def pack_slots(slots: Sequence[int | None]) -> bytes:
    """Slots, TAKEN for None."""
    return pack(f"<{len(slots)}I", *(TAKEN if slot is None else slot for slot in slots))


def unpack_slots(packed: bytes) -> tuple[int, ...]:
    """Slots. Raises InvalidRequest."""
    return _unpack(packed, "I", 4, "slots")


def unpack_checksums(packed: bytes) -> tuple[int, ...]:
    """Checksums. Raises InvalidRequest."""
    return _unpack(packed, "Q", 8, "checksums")


def _unpack(packed: bytes, code: str, size: int, what: str) -> tuple[int, ...]:
    if len(packed) % size:
        raise InvalidRequest(f"{what}: {len(packed)} bytes are not whole numbers of {size} bytes each")
    return unpack(f"<{len(packed) // size}{code}", packed)
