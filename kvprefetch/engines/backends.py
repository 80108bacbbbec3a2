"""Pick the attention backend once, by what is importable, what the device is and what the pages allow.

| backend      | where            | pages                                                               |
|--------------|------------------|---------------------------------------------------------------------|
| flash-attn   | CUDA, 16 bit     | block table if a block is a multiple of 256 tokens, else gathered KV |
| torch-varlen | CUDA, 16 bit     | the same with the kernel that torch brings, a block table from 2.12 |
| sdpa         | anywhere         | gathered, one row at a time                                         |
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from kvprefetch.engines.attention import Backend, Shape, sdpa_gathered
from kvprefetch.engines.batch import PagedBatch
from kvprefetch.engines.load import LoadedModel
from kvprefetch.errors import SettingsError
from kvprefetch.tiers.device import PageShape

PAGE_MULTIPLE = 256  # what flash-attention 2 asks of a page's tokens before it takes a block table
_LARGEST_HEAD = 256
_HEAD_MULTIPLE = 8


@dataclass(frozen=True)
class Packed:
    """The sequences of a varlen call. With `table`, k and v are pages; without, they are packed tokens."""

    cu_q: torch.Tensor  # int32 [N + 1]
    cu_kv: torch.Tensor  # int32 [N + 1]
    kv_len: torch.Tensor  # int32 [N]
    table: torch.Tensor | None  # int32 [N, most pages]
    max_q: int
    max_kv: int


class VarlenKernel(Protocol):
    """Causal attention, aligned bottom-right, over packed sequences of q `[T, q heads, dim]`."""

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: Packed, shape: Shape
    ) -> torch.Tensor: ...


@dataclass(frozen=True)
class Varlen:
    """A backend: all rows in one kernel call, straight from the pages where the kernel reads a block table."""

    kernel: VarlenKernel
    reads_tables: bool = True

    def takes_pages(self, block_tokens: int) -> bool:
        """Whether pages of that size need no gathering."""
        return self.reads_tables and block_tokens % PAGE_MULTIPLE == 0

    def __call__(
        self, q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, batch: PagedBatch, shape: Shape
    ) -> torch.Tensor:
        paged = self.takes_pages(k_pages.shape[1])
        table = batch.table if paged else None
        packed = Packed(batch.cu_q, batch.cu_kv, batch.kv_len, table, batch.max_q, batch.max_kv)
        if paged:
            return self.kernel(q, k_pages, v_pages, packed, shape)
        page, slot = batch.kv_slots()
        return self.kernel(q, k_pages[page, slot], v_pages[page, slot], packed, shape)


def flash_attn() -> Varlen | None:
    """flash-attn's varlen function, or None where the package is missing."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: Packed, shape: Shape) -> torch.Tensor:
        out: torch.Tensor = flash_attn_varlen_func(
            q,
            k,
            v,
            packed.cu_q,
            packed.cu_kv,
            packed.max_q,
            packed.max_kv,
            softmax_scale=shape.scale,
            causal=True,
            window_size=_window(shape),
            softcap=shape.softcap or 0.0,
            block_table=packed.table,
        )
        return out

    return Varlen(run)


def torch_varlen() -> Varlen | None:
    """torch's own varlen attention (2.12 and later with a block table), or None where it has no windows yet."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    if "window_size" not in known:
        return None

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: Packed, shape: Shape) -> torch.Tensor:
        options: dict[str, Any] = {"scale": shape.scale, "window_size": _window(shape)}
        if "enable_gqa" in known:  # before there was the option, fewer key heads were simply taken
            options["enable_gqa"] = q.shape[1] != k.shape[-2]
        if packed.table is not None:
            options |= {"seqused_k": packed.kv_len, "block_table": packed.table}
        cu_kv = packed.cu_kv if packed.table is None else None
        out = varlen_attn(q, k, v, packed.cu_q, cu_kv, packed.max_q, packed.max_kv, **options)
        assert isinstance(out, torch.Tensor)
        return out

    return Varlen(run, reads_tables="block_table" in known)


def _window(shape: Shape) -> tuple[int, int]:
    """The kernels count the tokens to the left of a query; transformers counts the query too."""
    return (-1 if shape.window is None else shape.window - 1, 0)


_KERNELS: dict[str, Callable[[], Varlen | None]] = {"flash-attn": flash_attn, "torch-varlen": torch_varlen}


def pick_backend(name: str, shape: PageShape, loaded: LoadedModel) -> tuple[str, Backend]:
    """The backend called `name`; for "auto" the first of flash-attn, torch-varlen, sdpa that fits.

    Raises SettingsError where a backend was asked for by name and cannot serve here, saying why.
    """
    if name == "sdpa":
        return "sdpa", sdpa_gathered
    if name != "auto" and name not in _KERNELS:
        raise SettingsError(f"engine.attention {name!r}: choose auto, sdpa or one of {', '.join(_KERNELS)}")
    obstacle = "none was tried"
    for candidate in _KERNELS if name == "auto" else (name,):
        obstacle = _obstacle(candidate, shape, loaded)
        found = None if obstacle else _KERNELS[candidate]()
        if found is not None:
            return candidate, found
    if name == "auto":
        return "sdpa", sdpa_gathered
    raise SettingsError(f"engine.attention {name!r}: {obstacle or 'it is not installed'}")


def _obstacle(name: str, shape: PageShape, loaded: LoadedModel) -> str:
    """Why the kernel cannot serve this model here; empty if it can."""
    if loaded.device.type != "cuda":
        return "it needs a CUDA device"
    if shape.dtype not in (torch.float16, torch.bfloat16):
        return f"it needs float16 or bfloat16, the model is {shape.dtype}"
    if shape.head_dim > _LARGEST_HEAD or shape.head_dim % _HEAD_MULTIPLE:
        return f"it takes heads of {_HEAD_MULTIPLE}, 16, … {_LARGEST_HEAD} dims, the model's have {shape.head_dim}"
    if name == "torch-varlen" and getattr(loaded.model.config, "attn_logit_softcapping", None):
        return "it has no soft cap, which the model needs"
    return ""
