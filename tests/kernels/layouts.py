"""Pools in the layouts that are met, filled so that every byte is known, or poisoned."""

from collections.abc import Callable

import torch
from kvprefetch_kernels.pages import Pages, describe

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAYERS, BLOCK, HEADS, DIM = 3, 4, 2, 8


def block_major(pages: int, dtype: torch.dtype) -> tuple[list[torch.Tensor], Pages]:
    """All layers of a page together: ours."""
    pool = torch.empty((pages, LAYERS, 2, BLOCK, HEADS, DIM), dtype=dtype, device=DEVICE)
    return [pool], describe(pool)


def layer_major(pages: int, dtype: torch.dtype) -> tuple[list[torch.Tensor], Pages]:
    """One tensor a layer, keys before values."""
    pools = [torch.empty((2, pages, BLOCK, HEADS, DIM), dtype=dtype, device=DEVICE) for _ in range(LAYERS)]
    return pools, describe(pools, page_dim=1)


def layer_major_together(pages: int, dtype: torch.dtype) -> tuple[list[torch.Tensor], Pages]:
    """One tensor a layer, a page's keys and values together."""
    pools = [torch.empty((pages, 2, BLOCK, HEADS, DIM), dtype=dtype, device=DEVICE) for _ in range(LAYERS)]
    return pools, describe(pools)


def strided(pages: int, dtype: torch.dtype) -> tuple[list[torch.Tensor], Pages]:
    """A part of a larger tensor: pages, layers and parts apart by more than their size."""
    whole = torch.empty((pages, LAYERS + 1, 3, BLOCK, HEADS, DIM), dtype=dtype, device=DEVICE)
    pool = whole[:, 1:, :2]
    return [pool], describe(pool)


LAYOUTS: dict[str, Callable[[int, torch.dtype], tuple[list[torch.Tensor], Pages]]] = {
    "block-major": block_major,
    "layer-major": layer_major,
    "layer-major, together": layer_major_together,
    "strided": strided,
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8]


def page_bytes(pages: Pages) -> torch.Tensor:
    """All bytes, page by page: uint8 `[pages, page bytes]`, a copy on the CPU."""
    return torch.cat([plane.cpu() for plane in pages.planes], dim=1)


def fill(pages: Pages, seed: int) -> None:
    """Random bytes, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for plane in pages.planes:
        plane.copy_(torch.randint(0, 256, plane.shape, generator=generator, dtype=torch.uint8))


def poison(pages: Pages) -> None:
    """Bytes that are NaN in every float type."""
    for plane in pages.planes:
        plane.fill_(255)
