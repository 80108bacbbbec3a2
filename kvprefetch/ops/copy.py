"""Copy pages by the method that is fastest for their place and fragment size."""

import logging
from collections.abc import Iterator, Sequence

from kvprefetch_kernels.copy import check_lists, copy_pages_reference, fitting
from kvprefetch_kernels.copy import copy_pages as copy_by_kernel
from kvprefetch_kernels.pages import Pages

log = logging.getLogger(__name__)
_KIB = 1024
# Up to this many bytes of a fragment the kernel is faster, from there on the driver's own copies. From published
# figures (a driver's batch copy reaches 52 GB/s at 64 KiB and 5 to 7 GB/s at 4 to 24 KiB), not measured here yet:
# `bench/kernels.py` on a GPU prints the table that belongs here.
KERNEL_UP_TO = {"device to device": 1_024 * _KIB, "host to device": 48 * _KIB, "device to host": 48 * _KIB}
_told: set[str] = set()


def copy_pages(
    source: Pages, target: Pages, taken: Sequence[int], given: Sequence[int], *, max_sms: int | None = None
) -> None:
    """`target` page `given[i]` becomes `source` page `taken[i]`; bytes only move.

    Between CUDA and pinned memory it is queued on the current stream and not waited for: the caller keeps the
    tensors alive until the stream has passed it. `max_sms` caps the multiprocessors that a kernel may use.
    Raises ValueError for lists that name no page, repeat a target or overwrite a source.
    """
    {"kernel": _by_kernel, "driver": _by_runs, "index": _by_index}[method(source, target)](
        source, target, taken, given, max_sms
    )


def method(source: Pages, target: Pages) -> str:
    """ "kernel", "driver" (one copy for each run of neighbouring pages) or "index" (on a CPU)."""
    if not (source.device.type == "cuda" or target.device.type == "cuda"):
        return "index"
    if not all(_is_reachable(pages) for pages in (source, target)):
        _tell_once("host memory is not pinned: its copies are slower and wait for each other")
        return "driver"
    sides = {"cuda": "device"}
    direction = f"{sides.get(source.device.type, 'host')} to {sides.get(target.device.type, 'host')}"
    fragment = min(source.fragment, target.fragment)
    return "kernel" if fragment <= KERNEL_UP_TO[direction] else "driver"


def _by_kernel(source: Pages, target: Pages, taken: Sequence[int], given: Sequence[int], max_sms: int | None) -> None:
    copy_by_kernel(source, target, taken, given, max_sms=max_sms)


def _by_index(source: Pages, target: Pages, taken: Sequence[int], given: Sequence[int], max_sms: int | None) -> None:
    copy_pages_reference(source, target, taken, given)


def _by_runs(source: Pages, target: Pages, taken: Sequence[int], given: Sequence[int], max_sms: int | None) -> None:
    source, target = fitting(source, target)
    check_lists(source, target, taken, given)
    for start, to, count in runs_of(taken, given):
        for from_plane, to_plane in zip(source.planes, target.planes, strict=True):
            to_plane[to : to + count].copy_(from_plane[start : start + count], non_blocking=True)


def runs_of(taken: Sequence[int], given: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """First source page, first target page and length of each run that is contiguous on both sides."""
    at = 0
    while at < len(taken):
        end = at + 1
        while end < len(taken) and taken[end] - taken[at] == given[end] - given[at] == end - at:
            end += 1
        yield taken[at], given[at], end - at
        at = end


def _is_reachable(pages: Pages) -> bool:
    """Whether a kernel can read and write there."""
    return pages.device.type == "cuda" or all(plane.is_pinned() for plane in pages.planes)


def _tell_once(message: str) -> None:
    if message not in _told:
        _told.add(message)
        log.warning("%s", message)
