"""A file of slots: a header for the file, a table of headers for the slots, the slots. Pure.

0                    file header, 4096 bytes: magic, version, sizes, namespace, XXH3-64 of these
4096                 table: 256 bytes a slot
`data`               slots, `slot_bytes` apart: `block_bytes`, rounded up to whole pages of 4096 bytes
"""

import struct
from dataclasses import dataclass
from pathlib import Path

from kvprefetch.errors import ArenaRefused
from kvprefetch.tiers.checksum import checksum
from kvprefetch.tiers.slots import HEADER_BYTES

PAGE = 4096
VERSION = 1
_FIELDS = struct.Struct("<16sIIQQ64s")  # magic, version, slots, block bytes, slot bytes, namespace
_SUM = struct.Struct("<Q")
_MAGIC = {"arena": b"kvprefetch arena", "disk": b"kvprefetch disk\0"}


@dataclass(frozen=True, slots=True)
class Layout:
    """Where what lies in a file. `kind`: "arena" or "disk"."""

    kind: str
    namespace: str
    block_bytes: int
    slots: int

    def __post_init__(self) -> None:
        if not 0 < len(self.namespace.encode()) <= 64 or self.block_bytes < 1 or not 0 < self.slots < 2**32 - 1:
            raise ValueError(
                "a file of slots needs a namespace of 1 to 64 bytes, at least one slot and one byte a block"
            )

    @property
    def slot_bytes(self) -> int:
        """From one slot to the next."""
        return _up(self.block_bytes)

    @property
    def data(self) -> int:
        """Where slot 0 begins."""
        return PAGE + _up(self.slots * HEADER_BYTES)

    @property
    def file_bytes(self) -> int:
        return self.data + self.slots * self.slot_bytes

    def header_at(self, slot: int) -> int:
        return PAGE + slot * HEADER_BYTES

    def slot_at(self, slot: int) -> int:
        return self.data + slot * self.slot_bytes

    def encode(self) -> bytes:
        """The file header."""
        name = self.namespace.encode()
        fields = _FIELDS.pack(_MAGIC[self.kind], VERSION, self.slots, self.block_bytes, self.slot_bytes, name)
        return (fields + _SUM.pack(checksum(fields))).ljust(PAGE, b"\0")


def decode(raw: bytes, kind: str, path: Path) -> Layout:
    """The layout that a file's header tells. Raises ArenaRefused, saying what to do."""
    remedy = f"delete {path} (it holds nothing but cached blocks) or set another folder"
    fields = raw[: _FIELDS.size]
    if len(raw) < _FIELDS.size + _SUM.size:
        raise ArenaRefused(f"{path} is too short to be a file of blocks: {remedy}")
    magic, version, slots, block_bytes, slot_bytes, name = _FIELDS.unpack(fields)
    if magic != _MAGIC[kind]:
        raise ArenaRefused(f"{path} is no {kind} file of kvprefetch, or its header is damaged: {remedy}")
    if _SUM.unpack_from(raw, _FIELDS.size)[0] != checksum(fields):
        raise ArenaRefused(f"the header of {path} is damaged: {remedy}")
    if version != VERSION:
        raise ArenaRefused(f"{path} has layout version {version}, this kvprefetch has {VERSION}: {remedy}")
    try:
        layout = Layout(kind, name.rstrip(b"\0").decode(), block_bytes, slots)
    except ValueError as error:  # a whole header of nonsense
        raise ArenaRefused(f"the header of {path} cannot be right ({error}): {remedy}") from error
    if slot_bytes != layout.slot_bytes:
        raise ArenaRefused(f"{path} has slots of {slot_bytes} bytes for blocks of {block_bytes}: {remedy}")
    return layout


def require_same(found: Layout, wanted: Layout, path: Path) -> None:
    """Raise ArenaRefused where a file is not as it must be."""
    remedy = f"delete {path} (it holds nothing but cached blocks) or set another folder"
    if found.namespace != wanted.namespace:
        raise ArenaRefused(f"{path} belongs to namespace {found.namespace}, not {wanted.namespace}: {remedy}")
    if found.block_bytes != wanted.block_bytes:
        raise ArenaRefused(f"{path} has blocks of {found.block_bytes} bytes, not {wanted.block_bytes}: {remedy}")
    if found.slots != wanted.slots:
        raise ArenaRefused(
            f"{path} has {found.slots} slots, the settings ask for {wanted.slots}: set the size back, or {remedy}"
        )


def _up(count: int) -> int:
    return -(-count // PAGE) * PAGE
