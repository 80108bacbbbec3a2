"""The device pool: one block-major tensor, on a CPU or a GPU, over memory that can be given back."""

import re
from dataclasses import dataclass

import psutil
import torch

from kvprefetch.errors import PoolTooSmall, SettingsError
from kvprefetch.settings import parse_bytes
from kvprefetch.tiers.segments import open_segments

LAYOUT = "block-major/1"  # [page, layer, k|v, slot, kv head, dim]


@dataclass(frozen=True)
class PageShape:
    """What one page holds: `block_tokens` tokens of all layers."""

    layers: int
    kv_heads: int
    head_dim: int
    block_tokens: int
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Bytes of one page."""
        return 2 * self.layers * self.block_tokens * self.kv_heads * self.head_dim * self.dtype.itemsize


class DevicePool:
    """`pages` pages in one tensor `[pages, layers, 2, block, kv_heads, head_dim]`.

    With `has_spare` there is one page more, number `pages`: nobody's, for padding to be written to. Owns the
    memory and gives views of it; which page belongs to whom is the business of `cache.BlockPool`. The memory
    is not initialised: readers must not look past what was written. Pages that were released must not be touched
    before they are backed again.
    """

    def __init__(self, shape: PageShape, pages: int, device: torch.device, *, has_spare: bool = False) -> None:
        if pages < 1:
            raise PoolTooSmall(f"one page takes {shape.bytes} bytes; the pool's size gives room for none")
        self.shape, self.pages, self.device = shape, pages, device
        self.spare = pages
        size = (pages + has_spare, shape.layers, 2, shape.block_tokens, shape.kv_heads, shape.head_dim)
        self._segments = open_segments((pages + has_spare) * shape.bytes, device)
        self.tensor = self._segments.raw.view(shape.dtype).view(size)

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of one layer's keys and values, each `[pages, block, kv_heads, head_dim]`."""
        return self.tensor[:, index, 0], self.tensor[:, index, 1]

    def release(self, first: int, end: int) -> int:
        """Give the memory of pages `[first, end)` back, but for parts of segments; returns the bytes given back.

        No queued device work may touch them. Their content is lost.
        """
        return self._segments.release(first * self.shape.bytes, end * self.shape.bytes)

    def back(self, first: int, end: int) -> None:
        """Have pages `[first, end)` backed by memory again. Raises SettingsError where there is too little."""
        self._segments.back(first * self.shape.bytes, end * self.shape.bytes)


def pool_bytes(size: str, device: torch.device) -> int:
    """Bytes that `size` means on `device`: "512MiB", "2GiB", a plain number, or "25%" of what is free."""
    text = size.strip()
    if share := re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text):
        part = float(share[1]) / 100
        if not 0 < part <= 1:
            raise SettingsError(f"pool.size {size!r}: the share must be above 0% and at most 100%")
        return int(part * _free_bytes(device))
    return parse_bytes(text, "pool.size")


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)
