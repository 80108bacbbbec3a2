"""A pool's memory: one reserved range of addresses, backed by segments that can be given back one by one.

So a pool shrinks and grows without ever holding two copies, and views of it stay valid. Promises of all three:
- `raw` is uint8 `[reserved bytes]`; the addresses stay reserved as long as any view of it lives.
- `release` gives back whole segments inside a range of bytes and returns how many bytes that were; their content
  is lost and they must not be touched until `back`. Nothing may be writing there: the caller has waited for it.
- `back` has a range backed again, with content unknown; it raises SettingsError, having changed nothing, where
  memory is short. Both may be called for ranges that are as wished already.
"""

import logging
import mmap
from typing import Protocol

import torch

from kvprefetch.errors import SettingsError

log = logging.getLogger(__name__)


class Segments(Protocol):
    """See the module's promises."""

    raw: torch.Tensor

    def release(self, start: int, end: int) -> int:
        """Give the whole segments within bytes `[start, end)` back; returns how many bytes."""

    def back(self, start: int, end: int) -> None:
        """Have bytes `[start, end)` backed."""


class HostSegments:
    """On a CPU: an anonymous mapping. The system backs its pages as they are first touched.

    A private one: what is dropped from a shared one stays in memory.
    """

    def __init__(self, nbytes: int) -> None:
        self._map = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.raw = torch.frombuffer(self._map, dtype=torch.uint8)

    def release(self, start: int, end: int) -> int:
        first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
        if last <= first:
            return 0
        self._map.madvise(mmap.MADV_DONTNEED, first, last - first)
        return last - first

    def back(self, start: int, end: int) -> None:
        """The system does it at the first touch."""


class FixedSegments:
    """One allocation of torch's: nothing of it can be given back alone."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.raw = torch.empty(nbytes, dtype=torch.uint8, device=device)

    def release(self, start: int, end: int) -> int:
        return 0

    def back(self, start: int, end: int) -> None:
        """It always is."""


def open_segments(nbytes: int, device: torch.device) -> Segments:
    """A range of `nbytes`, all of it backed. Raises SettingsError where it cannot be had."""
    try:
        if device.type == "cpu" and hasattr(mmap, "MADV_DONTNEED"):
            return HostSegments(nbytes)
        if device.type == "cuda" and (cuda := _cuda_segments(nbytes, device)) is not None:
            return cuda
        return FixedSegments(nbytes, device)
    except (RuntimeError, OSError, ValueError, OverflowError) as error:
        raise SettingsError(f"pool.size: {nbytes} bytes cannot be had on {device}") from error


def _cuda_segments(nbytes: int, device: torch.device) -> Segments | None:
    try:
        from kvprefetch.tiers.cuda_segments import CudaSegments
    except ImportError:
        log.warning("without cuda-bindings the pool on %s keeps its memory until the worker ends", device)
        return None
    return CudaSegments(nbytes, device)
