"""The header of a slot: 256 bytes that say which block lies there and whether it is whole. Pure.

All numbers little-endian. A header carries a checksum of its own; 256 zero bytes are a slot that was never used.

    0    state (1 byte), bytes of the tenant's name, bytes of the parent's key (0 or 32), 5 unused
    8    sequence, checksum, length (8 each)
    32   key (32), parent (32), instance (16)
    112  pid (4), 4 unused, started (8), speculative until (8, Unix time)
    136  tenant (64, UTF-8)
    248  XXH3-64 of the 248 bytes before
"""

import struct
from dataclasses import dataclass
from enum import IntEnum

from kvprefetch.tiers.checksum import checksum

HEADER_BYTES = 256
IN_TRANSIT = 0xFF
"""What stands for the state while a header is being written: no header with it is valid."""
_BODY = struct.Struct("<BBB5xQQQ32s32s16sI4xQd64s48x")
_SUM = struct.Struct("<Q")
_CHECKSUM_AND_LENGTH = struct.Struct("<QQ")
_NEVER_USED = bytes(HEADER_BYTES)
_MOST_SEQUENCE = 2**63  # which nobody ever reaches: a header that says so would leave no number for those after it


class SlotState(IntEnum):
    """FREE: nothing lies there. RESERVED: its owner may be writing. SEALED: a whole block."""

    FREE = 0
    RESERVED = 1
    SEALED = 2


_SEALED = int(SlotState.SEALED)


@dataclass(frozen=True, slots=True)
class Owner:
    """The process that may write to a slot. `started`: ticks since boot, because pids are reused."""

    instance: bytes  # 16 bytes
    pid: int
    started: int


@dataclass(frozen=True, slots=True)
class SlotHeader:
    """What is known of a slot. `sequence` grows with each reservation in its file and never goes back."""

    state: SlotState
    key: bytes = bytes(32)
    parent: bytes = b""  # b"": the first of its sequence
    tenant: str = ""
    sequence: int = 0
    checksum: int = 0
    length: int = 0  # bytes
    instance: bytes = bytes(16)
    pid: int = 0  # 0: nobody writes
    started: int = 0
    speculative_until_unix: float = 0.0  # seconds; 0: not speculative


def encode(header: SlotHeader) -> bytes:
    """The 256 bytes of `header`. Raises ValueError for what does not fit."""
    tenant = header.tenant.encode()
    if len(header.key) != 32 or len(header.parent) not in (0, 32) or len(tenant) > 64 or len(header.instance) != 16:
        raise ValueError("keys have 32 bytes, an instance 16, and a tenant's name at most 64")
    body = _BODY.pack(
        header.state,
        len(tenant),
        len(header.parent),
        header.sequence,
        header.checksum,
        header.length,
        header.key,
        header.parent,
        header.instance,
        header.pid,
        header.started,
        header.speculative_until_unix,
        tenant,
    )
    return body + _SUM.pack(checksum(body))


def decode(raw: bytes) -> SlotHeader | None:
    """The header in these 256 bytes; None: damaged, or being written. Never raises."""
    if raw == _NEVER_USED:
        return SlotHeader(SlotState.FREE)
    if len(raw) != HEADER_BYTES or raw[0] > SlotState.SEALED or _SUM.unpack_from(raw, 248)[0] != checksum(raw[:248]):
        return None
    state, tenant_bytes, parent_bytes, sequence, digest, length, key, parent, instance, *owner, tenant = _BODY.unpack(
        raw[:248]
    )
    if sequence >= _MOST_SEQUENCE:
        return None
    try:
        name = tenant[:tenant_bytes].decode()
    except UnicodeDecodeError:
        return None
    return SlotHeader(SlotState(state), key, parent[:parent_bytes], name, sequence, digest, length, instance, *owner)


def sealed_checksum(raw: bytes, key: bytes, length: int) -> int | None:
    """The checksum of the whole block of `length` bytes under `key` that this header tells of; None: it does not.

    What readers ask of each block: as `decode`, in a third of its time.
    """
    if raw[0] != _SEALED or raw[32:64] != key or _SUM.unpack_from(raw, 248)[0] != checksum(raw[:248]):
        return None
    found, size = _CHECKSUM_AND_LENGTH.unpack_from(raw, 16)
    return found if size == length else None


def who_may_write(raw: bytes) -> Owner | None:
    """The owner that a damaged header seems to name; None if it names nobody."""
    *_, instance, pid, started, _, _ = _BODY.unpack(raw[:248])
    return Owner(instance, pid, started) if pid else None
