"""Blocks on the wire between nodes: raw frames, written in one copy and read in one.

A frame: uint32 n, then n times {uint32 length, uint64 checksum}, then the n blocks' bytes; little-endian. At most
16 MiB. Ours have up to 4 MiB, or one block: larger ones are no faster, and whoever reads sees later that they come.
"""

import ctypes
import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

FRAME_BYTES = 4 * 2**20
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt
_COUNT = struct.Struct("<I")
_ENTRY = struct.Struct("<IQ")


class Sealed(NamedTuple):
    """A block's bytes, and the checksum that was sealed with it."""

    data: memoryview
    checksum: int


class Arrived(NamedTuple):
    """A block in a frame."""

    at: int  # where its bytes begin
    data: memoryview
    checksum: int


def most_blocks(block_bytes: int, frame_bytes: int = FRAME_BYTES) -> int:
    """How many blocks go into one frame; at least 1."""
    return max(1, (frame_bytes - _COUNT.size) // (block_bytes + _ENTRY.size))


def pack(blocks: Sequence[Sealed]) -> bytes:
    """One frame. Copies each block once."""
    head = [_COUNT.pack(len(blocks)), *(_ENTRY.pack(block.data.nbytes, block.checksum) for block in blocks)]
    return b"".join([*head, *(block.data for block in blocks)])


def unpack(frame: bytes, block_bytes: int) -> Iterator[Arrived]:
    """Its blocks, as views. Raises ValueError where it is no frame of whole blocks of `block_bytes`."""
    view = memoryview(frame)
    if len(frame) < _COUNT.size:
        raise ValueError("a frame begins with the number of its blocks")
    (count,) = _COUNT.unpack_from(frame)
    at = _COUNT.size + count * _ENTRY.size
    if len(frame) != at + count * block_bytes:
        raise ValueError(f"{len(frame)} bytes are no frame of {count} blocks of {block_bytes} bytes")
    for index in range(count):
        length, checksum = _ENTRY.unpack_from(frame, _COUNT.size + index * _ENTRY.size)
        if length != block_bytes:
            raise ValueError(f"a block of {length} bytes, not {block_bytes}")
        yield Arrived(at, view[at : at + block_bytes], checksum)
        at += block_bytes


def keep_memory() -> None:
    """Have the C library keep what this process frees, up to 256 MiB, instead of giving it back to the system.

    Frames come and go by the thousand. Without this each is made of pages that the system has to clear first: half of
    the time that reading takes (glibc alone; elsewhere it changes nothing).
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_MMAP_THRESHOLD, 32 * 2**20)
        libc.mallopt(_TRIM_THRESHOLD, 256 * 2**20)
