"""A checksum of each page, the same on the device and on the host.

The page's bytes, plane after plane, are little-endian 32-bit words w_0, w_1, …; the sum is

    Σ mix(w_i xor (i · 0x9E3779B9 + seed))  mod 2³²      for two seeds, as the high and low half of 64 bits

with mix the finaliser of MurmurHash3 (a bijection: any change of one word changes the sum; the index makes
swapped words show). It finds torn and stale pages; it is no defence against somebody who means harm.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from kvprefetch_kernels.pages import Pages, send

SEEDS = (0x5BD1E995, 0x2545F491)
_STEP = 0x9E3779B9
_LOW = 0xFFFFFFFF
_WIDTH = 2_048  # words of one step of a program


def checksum_pages_reference(source: Pages, listed: Sequence[int]) -> torch.Tensor:
    """int64 `[len(listed)]` on the pages' device. Raises ValueError unless fragments are whole words."""
    check(source, listed)
    index = torch.tensor(listed, dtype=torch.int64, device=source.device)
    raw = torch.cat([plane[index] for plane in source.planes], dim=1)
    words = raw.view(torch.int32).to(torch.int64) & _LOW
    numbers = torch.arange(words.shape[1], device=words.device) * _STEP
    high, low = ((_mix(words ^ ((numbers + seed) & _LOW)).sum(1) & _LOW) for seed in SEEDS)
    return (high << 32) | low


def _mix(h: torch.Tensor) -> torch.Tensor:
    """MurmurHash3's fmix32, on 32-bit values held in int64."""
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & _LOW
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & _LOW
    return h ^ (h >> 16)


def checksum_pages(source: Pages, listed: Sequence[int]) -> torch.Tensor:
    """The same by a kernel on the current stream; the result is on the pages' device. Does not wait."""
    check(source, listed)
    sums = new_sums(len(listed), source.device)
    if listed:
        numbers = send([*source.table(), *listed], source.device)
        index = numbers[2 * len(source.planes) :]
        words = source.fragment // 4
        chunks = triton.cdiv(words, _WIDTH)
        grid = (len(listed), len(source.planes), min(chunks, 16))
        _checksum[grid](
            numbers,
            index,
            sums,
            words,
            chunks,
            *SEEDS,
            ALIGNMENT=min(source.alignment, 16),
            WIDTH=_WIDTH,
        )
    return joined(sums)


def new_sums(pages: int, device: torch.device) -> torch.Tensor:
    """What kernels add to: int32 `[pages, 2]`, the halves of each page's sum."""
    return torch.zeros((pages, 2), dtype=torch.int32, device=device)


def joined(sums: torch.Tensor) -> torch.Tensor:
    """The halves as one int64 a page."""
    wide = sums.to(torch.int64) & _LOW
    return (wide[:, 0] << 32) | wide[:, 1]


def check(source: Pages, listed: Sequence[int]) -> None:
    if source.alignment < 4:
        raise ValueError(f"checksums are of whole 32-bit words; fragments of {source.fragment} bytes are not")
    if listed and not (min(listed) >= 0 and max(listed) < source.pages):
        raise ValueError(f"a page of {min(listed)}…{max(listed)} is not one of {source.pages}")


@triton.jit
def fmix(h):
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def _checksum(table, listed, sums, words, chunks, seed_high, seed_low, ALIGNMENT: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0)
    plane = tl.program_id(1)
    page = tl.load(listed + row)
    start = tl.load(table + 2 * plane) + page * tl.load(table + 2 * plane + 1)
    source = tl.multiple_of(start.to(tl.pointer_type(tl.int32)), ALIGNMENT)
    high = tl.zeros((WIDTH,), tl.uint32)
    low = tl.zeros((WIDTH,), tl.uint32)
    for chunk in range(tl.program_id(2), chunks, tl.num_programs(2)):
        at = chunk * WIDTH + tl.arange(0, WIDTH)
        mask = at < words
        word = tl.load(source + at, mask=mask, other=0).to(tl.uint32, bitcast=True)
        number = (at + plane * words).to(tl.uint32) * 0x9E3779B9
        high += tl.where(mask, fmix(word ^ (number + seed_high.to(tl.uint32))), 0)
        low += tl.where(mask, fmix(word ^ (number + seed_low.to(tl.uint32))), 0)
    tl.atomic_add(sums + 2 * row, tl.sum(high, 0).to(tl.int32, bitcast=True))
    tl.atomic_add(sums + 2 * row + 1, tl.sum(low, 0).to(tl.int32, bitcast=True))
