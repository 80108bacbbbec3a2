"""Copy pages by the method that is fastest for their place and fragment size."""

import logging
from collections.abc import Sequence

import torch
from kvprefetch_kernels.copy import copy_checked_pages as kernel_checked
from kvprefetch_kernels.copy import copy_checked_pages_reference, copy_pages_reference
from kvprefetch_kernels.copy import copy_pages as kernel_copy
from kvprefetch_kernels.pages import Pages

from kvprefetch.ops.driver import copy_by_driver
from kvprefetch.ops.pending import Pending

log = logging.getLogger(__name__)
_KIB = 1024
# Up to this many bytes of a fragment the kernel is faster, from there on the driver's own copies. From published
# figures (a driver's batch copy reaches 52 GB/s at 64 KiB and 5 to 7 GB/s at 4 to 24 KiB), not measured here yet:
# `bench/kernels.py` on a GPU prints the table that belongs here.
KERNEL_UP_TO = {"device to device": 1_024 * _KIB, "host to device": 48 * _KIB, "device to host": 48 * _KIB}
BUS_SMS = 12  # multiprocessors that a kernel across the bus gets by default: enough to fill it
_pending = Pending()
_told: set[str] = set()


def copy_pages(
    source: Pages, target: Pages, taken: Sequence[int], given: Sequence[int], *, max_sms: int | None = None
) -> None:
    """`target` page `given[i]` becomes `source` page `taken[i]`; bytes only move.

    With CUDA memory on a side it is queued on the current stream and not waited for (pageable host memory is);
    the memory of both sides lives until it is done. `max_sms` caps the multiprocessors that a kernel may use.
    Raises ValueError for lists that name no page, repeat a target or overwrite a source.
    """
    chosen = method(source, target)
    if chosen == "index":
        copy_pages_reference(source, target, taken, given)
        return
    if chosen == "kernel":
        kernel_copy(source, target, taken, given, max_sms=max_sms or _default_sms(source, target))
    else:
        copy_by_driver(source, target, taken, given, batched=chosen == "driver")
    _keep(source, target)


def copy_checked_pages(
    source: Pages, target: Pages, taken: Sequence[int], given: Sequence[int], *, max_sms: int | None = None
) -> torch.Tensor:
    """As `copy_pages`; returns the checksums of the pages as they were read: int64 `[pages]`.

    They lie on the source's device, or where a kernel copied, on the CUDA device. Raises ValueError too where
    fragments are not whole 32-bit words.
    """
    if method(source, target) in ("index", "staged"):
        return copy_checked_pages_reference(source, target, taken, given)
    sums = kernel_checked(source, target, taken, given, max_sms=max_sms or _default_sms(source, target))
    _keep(source, target)
    return sums


def method(source: Pages, target: Pages) -> str:
    """How `copy_pages` will do it.

    "kernel"; "driver" (a copy for each run of neighbouring pages); "staged" (the same from or to pageable memory,
    one by one); "index" (torch, on a CPU).
    """
    if not (source.device.type == "cuda" or target.device.type == "cuda"):
        return "index"
    if not all(_is_reachable(pages) for pages in (source, target)):
        _tell_once("host memory is not pinned: its copies are slower and wait for each other")
        return "staged"
    fragment = min(source.fragment, target.fragment)
    return "kernel" if fragment <= KERNEL_UP_TO[direction(source, target)] else "driver"


def direction(source: Pages, target: Pages) -> str:
    """ "device to device", "host to device" or "device to host"."""
    sides = ("device" if pages.device.type == "cuda" else "host" for pages in (source, target))
    return " to ".join(sides)


def _default_sms(source: Pages, target: Pages) -> int | None:
    return None if direction(source, target) == "device to device" else BUS_SMS


def _is_reachable(pages: Pages) -> bool:
    """Whether a kernel can read and write there."""
    return pages.device.type == "cuda" or all(plane.is_pinned() for plane in pages.planes)


def _keep(source: Pages, target: Pages) -> None:
    device = target.device if target.device.type == "cuda" else source.device
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    _pending.hold((source, target), event.query)


def _tell_once(message: str) -> None:
    if message not in _told:
        _told.add(message)
        log.warning("%s", message)
