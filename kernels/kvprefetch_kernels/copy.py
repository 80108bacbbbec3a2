"""Paged copy: pages of one pool into pages of another, or of the same, in one launch.

Bytes only move, so any dtype and layout will do (see `pages`). Host memory that is pinned is read and written
by the same kernel over the bus; there the pages' checksums can be taken on the way at no cost (about 24 integer
operations for 4 bytes: far below what a few multiprocessors do at the bus's rate, too many at the memory's).
"""

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl

from kvprefetch_kernels.checksum import SEEDS, check, checksum_pages_reference, fmix, joined, new_sums
from kvprefetch_kernels.pages import Pages, send

_TILE_BYTES = 16_384  # of one program's step: 16 bytes of 4 to 8 loads in flight a thread
_PROGRAMS_PER_SM = 4
_STAGED_BYTES = 2**22  # that the reference has in hand: 3 to 9 times faster on a CPU than all of them at once


def copy_pages_reference(source: Pages, target: Pages, taken: Sequence[int], given: Sequence[int]) -> None:
    """`target` page `given[i]` becomes `source` page `taken[i]`. Checks as `copy_pages`; any devices."""
    source, target = fitting(source, target)
    check_lists(source, target, taken, given)
    take, give = send(taken, source.device), send(given, target.device)
    step = max(1, _STAGED_BYTES // source.fragment)
    for from_plane, to_plane in zip(source.widened(), target.widened(), strict=True):
        for at in range(0, len(taken), step):
            rows = torch.index_select(from_plane, 0, take[at : at + step])
            to_plane.index_copy_(0, give[at : at + step], rows.to(to_plane.device))


def copy_pages(
    source: Pages, target: Pages, taken: Sequence[int], given: Sequence[int], *, max_sms: int | None = None
) -> None:
    """The same by a kernel on the current stream of the CUDA device that either side is on; does not wait.

    `max_sms`: leave the other multiprocessors to whoever runs beside. The caller keeps host memory alive until
    the stream has passed the copy; device memory is kept by the allocator. Raises ValueError for page lists
    that are out of range, of different lengths, or repeat a target, and for pools that do not fit.
    """
    prepare_copy(source, target, taken, given, max_sms=max_sms)()


def prepare_copy(
    source: Pages, target: Pages, taken: Sequence[int], given: Sequence[int], *, max_sms: int | None = None
) -> Callable[[], None]:
    """What `copy_pages` does, checked and with its lists on the way to the device: call it as often as wanted."""
    source, target = fitting(source, target)
    check_lists(source, target, taken, given)
    return _prepare(source, target, taken, given, max_sms, None) if taken else lambda: None


def copy_checked_pages_reference(
    source: Pages, target: Pages, taken: Sequence[int], given: Sequence[int]
) -> torch.Tensor:
    """As `copy_pages_reference`; returns the checksums of the pages that were read, on the source's device."""
    check(fitting(source, target)[0], taken)
    copy_pages_reference(source, target, taken, given)
    return checksum_pages_reference(source, taken)


def copy_checked_pages(
    source: Pages, target: Pages, taken: Sequence[int], given: Sequence[int], *, max_sms: int | None = None
) -> torch.Tensor:
    """As `copy_pages`; returns the checksums of the bytes as they were read: int64 `[pages]`, on the CUDA device."""
    source, target = fitting(source, target)
    check(source, taken)
    check_lists(source, target, taken, given)
    sums = new_sums(len(taken), _device(source, target))
    if taken:
        _prepare(source, target, taken, given, max_sms, sums)()
    return joined(sums)


def _device(source: Pages, target: Pages) -> torch.device:
    return target.device if target.device.type == "cuda" else source.device


def _prepare(
    source: Pages,
    target: Pages,
    taken: Sequence[int],
    given: Sequence[int],
    max_sms: int | None,
    sums: torch.Tensor | None,
) -> Callable[[], None]:
    device = _device(source, target)
    alignment = min(source.alignment, target.alignment)
    word = 8 if alignment == 8 and sums is None else min(alignment, 4)
    words = source.fragment // word
    tile = triton.next_power_of_2(max(16, _TILE_BYTES // word))
    width = min(triton.next_power_of_2(words), tile)
    lines = tile // width
    chunks = triton.cdiv(words, width)
    items = len(taken) * len(source.planes) * chunks
    if items >= 2**30:
        raise ValueError(f"{items} fragments are more than one launch can copy")
    numbers = send([*source.table(), *target.table(), *taken, *given], device)
    tables, lists = numbers[: 4 * len(source.planes)].view(2, -1), numbers[4 * len(source.planes) :].view(2, -1)
    launch = _copy[(_programs(device, triton.cdiv(items, lines), max_sms),)]

    def run() -> None:
        launch(
            *tables,
            *lists,
            lists if sums is None else sums,
            len(taken),
            len(source.planes),
            chunks,
            words * word // alignment,
            *SEEDS,
            LINES=lines,
            WIDTH=width,
            ALIGNMENT=alignment,
            WORD=word,
            CHECKED=sums is not None,
            num_warps=8 if max_sms is None else 16,
        )
        for memory in (*source.memories.values(), *target.memories.values()):
            if memory.is_cuda:
                memory.record_stream(torch.cuda.current_stream(device))

    return run


def fitting(source: Pages, target: Pages) -> tuple[Pages, Pages]:
    """Both in planes of the smaller one's fragments. Raises ValueError where their pages differ in size."""
    if source.page_bytes != target.page_bytes:
        raise ValueError(f"pages of {source.page_bytes} bytes cannot be copied to pages of {target.page_bytes}")
    fragment = min(source.fragment, target.fragment)
    return source.split(fragment), target.split(fragment)


def check_lists(source: Pages, target: Pages, taken: Sequence[int], given: Sequence[int]) -> None:
    """Raise ValueError unless the lists name pages that exist, each target once, and no source is overwritten."""
    if len(taken) != len(given):
        raise ValueError(f"{len(taken)} source pages and {len(given)} target pages")
    for name, pages, listed in (("source", source, taken), ("target", target, given)):
        if listed and not (min(listed) >= 0 and max(listed) < pages.pages):
            wrong = next(page for page in listed if not 0 <= page < pages.pages)
            raise ValueError(f"{name} page {wrong} is not one of {pages.pages}")
    unique = set(given)
    if len(unique) != len(given):
        raise ValueError("a target page is listed more than once")
    if _overlap(source, target, taken, given):
        raise ValueError("a page is both source and target: the order of the copies would decide what it gets")


def _overlap(source: Pages, target: Pages, taken: Sequence[int], given: Sequence[int]) -> bool:
    """Whether a byte would be both read and written."""
    if not taken or source.memories.keys().isdisjoint(target.memories):
        return False
    if source.table() == target.table():
        return not set(given).isdisjoint(taken)
    reads, writes = source.addresses(taken).sort().values, target.addresses(given)  # other views of the same memory
    following = torch.searchsorted(reads, writes - source.fragment + 1).clamp(max=len(reads) - 1)
    return bool(((reads[following] - writes).abs() < source.fragment).any())


def _programs(device: torch.device, needed: int, max_sms: int | None) -> int:
    if device.type != "cuda":
        return min(needed, 4)  # interpreted
    if max_sms is not None:
        return min(needed, max_sms)
    count = torch.cuda.get_device_properties(device).multi_processor_count
    return min(needed, _PROGRAMS_PER_SM * int(count))


# Compiled once for a fragment size, whatever the lists: nobody waits for a compiler while serving.
@triton.jit(
    do_not_specialize=["pairs", "planes", "chunks", "vectors", "seed_high", "seed_low"],
    do_not_specialize_on_alignment=["sources", "targets", "taken", "given", "sums"],
)
def _copy(
    sources,
    targets,
    taken,
    given,
    sums,
    pairs,
    planes,
    chunks,
    vectors,
    seed_high,
    seed_low,
    LINES: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    WORD: tl.constexpr,
    CHECKED: tl.constexpr,
):
    if WORD == 8:
        kind: tl.constexpr = tl.int64
    elif WORD == 4:
        kind: tl.constexpr = tl.int32  # type: ignore[no-redef]
    elif WORD == 2:
        kind: tl.constexpr = tl.int16  # type: ignore[no-redef]
    else:
        kind: tl.constexpr = tl.int8  # type: ignore[no-redef]
    total = pairs * planes * chunks  # of steps, each of up to a tile: 32 bits are enough; offsets have 64
    line = tl.arange(0, LINES)[:, None]
    word = tl.arange(0, WIDTH)[None, :]
    for first in range(tl.program_id(0) * LINES, total, tl.num_programs(0) * LINES):
        item = first + line
        is_item = item < total
        chunk = item % chunks
        plane = item // chunks % planes
        pair = item // chunks // planes
        start = tl.load(sources + 2 * plane, mask=is_item, other=0)
        source = start + tl.load(taken + pair, mask=is_item, other=0) * tl.load(sources + 2 * plane + 1, mask=is_item)
        start = tl.load(targets + 2 * plane, mask=is_item, other=0)
        target = start + tl.load(given + pair, mask=is_item, other=0) * tl.load(targets + 2 * plane + 1, mask=is_item)
        source = tl.multiple_of(source.to(tl.pointer_type(kind)), (ALIGNMENT, ALIGNMENT))
        target = tl.multiple_of(target.to(tl.pointer_type(kind)), (ALIGNMENT, ALIGNMENT))
        at = chunk * WIDTH + word
        mask = is_item & (at < vectors * (ALIGNMENT // WORD))  # whole vectors, so that they stay whole
        value = tl.load(source + at, mask=mask)
        tl.store(target + at, value, mask=mask)
        if CHECKED:
            number = (at + plane * (vectors * (ALIGNMENT // WORD))).to(tl.uint32) * 0x9E3779B9
            bits = value.to(tl.uint32, bitcast=True)
            high = tl.where(mask, fmix(bits ^ (number + seed_high.to(tl.uint32))), 0)
            low = tl.where(mask, fmix(bits ^ (number + seed_low.to(tl.uint32))), 0)
            half = sums + 2 * pair
            tl.atomic_add(half, tl.sum(high, 1)[:, None].to(tl.int32, bitcast=True), mask=is_item)
            tl.atomic_add(half + 1, tl.sum(low, 1)[:, None].to(tl.int32, bitcast=True), mask=is_item)
