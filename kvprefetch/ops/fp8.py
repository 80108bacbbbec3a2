"""Pack pages to half their bytes for transit, and unpack them: by a kernel on a GPU, by the reference elsewhere.

Lossy (see `kvprefetch_kernels.fp8` for the bound), so nothing packs unless its caller asks for it.
"""

from collections.abc import Sequence

import torch
from kvprefetch_kernels import fp8
from kvprefetch_kernels.fp8 import Packed

__all__ = ["Packed", "pack_pages", "unpack_pages"]


def pack_pages(parts: Sequence[torch.Tensor], listed: Sequence[int]) -> Packed:
    """Pages `listed` of a bf16 or fp16 pool, given as views `[pages, block, heads, dim]`, one a layer's K or V.

    On a GPU queued on the current stream and not waited for. Raises ValueError for what cannot be packed.
    """
    return fp8.pack(parts, listed) if _on_gpu(parts) else fp8.pack_reference(parts, listed)


def unpack_pages(packed: Packed, parts: Sequence[torch.Tensor], listed: Sequence[int]) -> None:
    """Write packed pages into pages `listed` of a pool of the same shape. As `pack_pages`."""
    (fp8.unpack if _on_gpu(parts) else fp8.unpack_reference)(packed, parts, listed)


def _on_gpu(parts: Sequence[torch.Tensor]) -> bool:
    return bool(parts) and parts[0].is_cuda
