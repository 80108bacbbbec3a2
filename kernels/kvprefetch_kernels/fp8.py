"""Pack pages for transit: bf16 or fp16 to fp8 e4m3, with a scale for each page, part (layer, key or value) and head.

Half the bytes on the wire and in the host tier, at a price. A scale s is the least power of two that brings the
head's largest value to 448 or less, so scaling loses nothing, and a value x comes back within
max(2⁻⁴ |x|, 2⁻¹⁰ s) (three mantissa bits, rounded to nearest even; s ≤ |largest| / 224). What is not finite comes
back as NaN. Format: OCP 8-bit floating point specification (E4M3); power-of-two scales as in OCP's microscaling.

Conversion is integer arithmetic: the same bits on every device, interpreted too, and no instruction that only
newer GPUs have. Beside the bus, for which it packs, that costs nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

import torch
import triton
import triton.language as tl

from kvprefetch_kernels.pages import send

LARGEST = 448.0  # of e4m3
_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Packed:
    """`values` fp8 e4m3 `[n, parts, block, heads, dim]`; `scales` float32 `[n, parts, heads]`."""

    values: torch.Tensor
    scales: torch.Tensor

    @property
    def nbytes(self) -> int:
        """What goes over the wire."""
        return int(self.values.nbytes + self.scales.nbytes)


def pack_reference(parts: Sequence[torch.Tensor], listed: Sequence[int]) -> Packed:
    """Pages `listed` of a pool, given as views `[pages, block, heads, dim]`, one a layer's keys or values."""
    check_parts(parts, listed)
    index = torch.tensor(listed, dtype=torch.int64, device=parts[0].device)
    pages = torch.stack([part[index] for part in parts], dim=1).float()
    is_finite = pages.isfinite()
    amax = torch.where(is_finite, pages.abs(), 0.0).amax(dim=(2, 4))
    exponent = (amax.view(torch.int32) + 0x1FFFFF) >> 23  # one more where the mantissa is above 448's, 1.75
    scales = ((exponent - 8).clamp(min=1) << 23).view(torch.float32)
    small = torch.where(is_finite, pages / scales[:, :, None, :, None], float("nan"))
    return Packed(small.to(torch.float8_e4m3fn), scales)


def unpack_reference(packed: Packed, parts: Sequence[torch.Tensor], listed: Sequence[int]) -> None:
    """Write packed pages into pages `listed` of a pool."""
    check_parts(parts, listed)
    check_packed(packed, parts, listed)
    index = torch.tensor(listed, dtype=torch.int64, device=parts[0].device)
    most = torch.finfo(parts[0].dtype).max  # rounding up must not end at infinity
    pages = (packed.values.float() * packed.scales[:, :, None, :, None]).clamp(-most, most)
    for number, part in enumerate(parts):
        part[index] = pages[:, number].to(part.dtype)


def pack(parts: Sequence[torch.Tensor], listed: Sequence[int]) -> Packed:
    """As `pack_reference`, by one launch on the current stream; does not wait."""
    check_parts(parts, listed)
    first = parts[0]
    _, block, heads, dim = first.shape
    values = torch.empty((len(listed), len(parts), block, heads, dim), dtype=torch.uint8, device=first.device)
    scales = torch.empty((len(listed), len(parts), heads), dtype=torch.float32, device=first.device)
    if listed:
        _launch(_pack, parts, listed, values, scales)
    return Packed(values.view(torch.float8_e4m3fn), scales)


def unpack(packed: Packed, parts: Sequence[torch.Tensor], listed: Sequence[int]) -> None:
    """As `unpack_reference`, by one launch on the current stream; does not wait."""
    check_parts(parts, listed)
    check_packed(packed, parts, listed)
    if listed:
        _launch(_unpack, parts, listed, packed.values.view(torch.uint8), packed.scales)


def check_parts(parts: Sequence[torch.Tensor], listed: Sequence[int]) -> None:
    """Raise ValueError, saying what is wrong, for pools and pages that cannot be packed."""
    if not parts:
        raise ValueError("a pool needs at least one part")
    first = parts[0]
    if first.dim() != 4 or first.dtype not in _DTYPES or first.stride(3) != 1:
        raise ValueError(f"fp8 packs bf16 or fp16 parts [pages, block, heads, contiguous dim], not {_say(first)}")
    kinds = {(part.shape, part.stride(), part.dtype, part.device) for part in parts}
    if len(kinds) > 1:
        raise ValueError(f"the parts of a pool differ in shape, strides, dtype or device: {sorted(map(str, kinds))}")
    if listed and not (min(listed) >= 0 and max(listed) < first.shape[0]):
        raise ValueError(f"a page of {min(listed)}…{max(listed)} is not one of {first.shape[0]}")


def check_packed(packed: Packed, parts: Sequence[torch.Tensor], listed: Sequence[int]) -> None:
    """Raise ValueError, saying what is wrong, where `packed` is not the content of pages `listed`."""
    if len(set(listed)) != len(listed):
        raise ValueError("a target page is listed more than once")
    _, block, heads, dim = parts[0].shape
    for name, tensor, dtype, shape in (
        ("values", packed.values, torch.float8_e4m3fn, (len(listed), len(parts), block, heads, dim)),
        ("scales", packed.scales, torch.float32, (len(listed), len(parts), heads)),
    ):
        if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(f"packed {name} must be contiguous {dtype} {shape}, not {_say(tensor)}")
        if tensor.device != parts[0].device:
            raise ValueError(f"packed {name} lie on {tensor.device}, the pool on {parts[0].device}")


def _say(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} of strides {tensor.stride()}"


def _launch(
    kernel: "triton.JITFunction", parts: Sequence[torch.Tensor], listed: Sequence[int], *packed: torch.Tensor
) -> None:
    first = parts[0]
    _, block, heads, dim = first.shape
    numbers = send([*(part.data_ptr() for part in parts), *listed], first.device)
    kernel[(len(listed), len(parts), heads)](
        numbers,
        numbers[len(parts) :],
        *packed,
        *first.stride()[:3],
        block,
        dim,
        ALIGNMENT=gcd(
            16, *(part.data_ptr() for part in parts), *(step * first.itemsize for step in first.stride()[:3])
        ),
        DTYPE=tl.bfloat16 if first.dtype is torch.bfloat16 else tl.float16,
        BLOCK=triton.next_power_of_2(block),
        DIM=triton.next_power_of_2(dim),
        MOST=torch.finfo(first.dtype).max,
    )
    if first.is_cuda:
        for part in parts:
            part.record_stream(torch.cuda.current_stream(first.device))


@triton.jit
def _places(
    table, listed, page_step, token_step, head_step, block, dim,
    DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Pointers to one head's tokens in the pool, their offsets when packed, and which exist."""
    row, part, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    token = tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, DIM)[None, :]
    page = tl.load(table + part).to(tl.pointer_type(DTYPE)) + tl.load(listed + row) * page_step
    page = tl.multiple_of(page, ALIGNMENT)
    places = page + token.to(tl.int64) * token_step + head * head_step + column
    head_of_page = (row.to(tl.int64) * tl.num_programs(1) + part) * tl.num_programs(2) + head
    first = (head_of_page - head) * block * dim
    offsets = first + (token * tl.num_programs(2) + head) * dim + column
    return places, offsets, (token < block) & (column < dim), head_of_page


@triton.jit(do_not_specialize_on_alignment=["table", "listed"])
def _pack(
    table, listed, values, scales, page_step, token_step, head_step, block, dim,
    DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    places, offsets, mask, head_of_page = _places(
        table, listed, page_step, token_step, head_step, block, dim, DTYPE, ALIGNMENT, BLOCK, DIM
    )
    x = tl.load(places, mask=mask, other=0.0).to(tl.float32)
    is_finite = tl.abs(x) <= MOST
    amax = tl.max(tl.max(tl.where(is_finite, tl.abs(x), 0.0), 1), 0)
    exponent = tl.maximum(((amax.to(tl.int32, bitcast=True) + 0x1FFFFF) >> 23) - 8, 1)
    tl.store(scales + head_of_page, (exponent << 23).to(tl.float32, bitcast=True))
    size = tl.abs(x) * ((254 - exponent) << 23).to(tl.float32, bitcast=True)  # exact: a power of two
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    subnormal = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000  # 2¹⁴, whose last place is 2⁻⁹
    code = tl.where(size < 0.015625, subnormal, normal)
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    tl.store(values + offsets, tl.where(is_finite, code | sign, 0x7F).to(tl.uint8), mask=mask)


@triton.jit(do_not_specialize_on_alignment=["table", "listed"])
def _unpack(
    table, listed, values, scales, page_step, token_step, head_step, block, dim,
    DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    places, offsets, mask, head_of_page = _places(
        table, listed, page_step, token_step, head_step, block, dim, DTYPE, ALIGNMENT, BLOCK, DIM
    )
    code = tl.load(values + offsets, mask=mask, other=0).to(tl.int32)
    tiny = ((code & 0x7F) << 20).to(tl.float32, bitcast=True)  # the value times 2⁻¹²⁰, subnormals too
    size = tiny * 1.329227995784916e36
    size = size * tl.load(scales + head_of_page)
    size = tl.where(size > MOST, MOST, size)  # rounding up must not end at infinity
    size = tl.where((code & 0x7F) == 0x7F, float("nan"), size)
    tl.store(places, tl.where((code & 0x80) != 0, -size, size).to(DTYPE), mask=mask)
