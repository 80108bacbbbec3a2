"""Copy pages by the method that is fastest for their place and fragment size."""

import logging
from collections.abc import Sequence

import torch
from kvprefetch_kernels.copy import copy_checked_pages as kernel_checked
from kvprefetch_kernels.copy import copy_checked_pages_reference, copy_pages_reference
from kvprefetch_kernels.copy import copy_pages as kernel_copy
from kvprefetch_kernels.pages import Pages

from kvprefetch.ops.driver import copy_by_driver, copy_bytes
from kvprefetch.ops.pending import Pending

log = logging.getLogger(__name__)
_KIB = 1024
# By direction: up to how many bytes a copy which method is the fastest, and the one beyond. `bench/kernels.py` prints
# the table that belongs here. Host to host: measured, 2-core AMD EPYC, 2026-11-24. The others: from published figures
# (a driver's batch copy reaches 52 GB/s at 64 KiB and 5 to 7 GB/s at 4 to 24 KiB), until a GPU has measured them.
FASTEST = {
    "device to device": ("kernel", 1_024 * _KIB, "batch"),
    "host to device": ("kernel", 48 * _KIB, "batch"),
    "device to host": ("kernel", 48 * _KIB, "batch"),
    "host to host": ("index", 128 * _KIB, "runs"),
}
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
    chosen = method(source, target, taken, given)
    if chosen == "index":
        copy_pages_reference(source, target, taken, given)
    elif chosen == "kernel":
        kernel_copy(source, target, taken, given, max_sms=max_sms or _default_sms(source, target))
    else:
        copy_by_driver(source, target, taken, given, batched=chosen == "batch")
    _keep(source, target)


def copy_checked_pages(
    source: Pages, target: Pages, taken: Sequence[int], given: Sequence[int], *, max_sms: int | None = None
) -> torch.Tensor:
    """As `copy_pages`; returns the checksums of the pages as they were read: int64 `[pages]`.

    They lie on the source's device, or where a kernel copied, on the CUDA device. Raises ValueError too where
    fragments are not whole 32-bit words.
    """
    if direction(source, target) == "host to host" or not _are_reachable(source, target):
        return copy_checked_pages_reference(source, target, taken, given)
    sums = kernel_checked(source, target, taken, given, max_sms=max_sms or _default_sms(source, target))
    _keep(source, target)
    return sums


def method(source: Pages, target: Pages, taken: Sequence[int], given: Sequence[int]) -> str:
    """How `copy_pages` will do it.

    "kernel"; "batch" (the driver, a copy for each run of neighbouring pages, in one call); "runs" (the same one by
    one); "index" (torch's index operations).
    """
    where = direction(source, target)
    if where != "host to host" and not _are_reachable(source, target):
        _tell_once("host memory is not pinned: its copies are slower and wait for each other")
        return "runs"
    small, limit, large = FASTEST[where]
    return small if copy_bytes(source, target, taken, given) <= limit else large


def direction(source: Pages, target: Pages) -> str:
    """ "device to device", "host to device", "device to host" or "host to host"."""
    sides = ("device" if pages.device.type == "cuda" else "host" for pages in (source, target))
    return " to ".join(sides)


def _default_sms(source: Pages, target: Pages) -> int | None:
    return None if direction(source, target) == "device to device" else BUS_SMS


def _are_reachable(source: Pages, target: Pages) -> bool:
    """Whether a kernel can read and write there: device memory, and pinned memory of the host."""
    return all(plane.is_cuda or plane.is_pinned() for plane in (*source.planes, *target.planes))


def _keep(source: Pages, target: Pages) -> None:
    """Let neither side's memory go before what is queued by now is done."""
    device = target.device if target.device.type == "cuda" else source.device
    if device.type != "cuda":
        return
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    _pending.hold((source, target), event.query)


def _tell_once(message: str) -> None:
    if message not in _told:
        _told.add(message)
        log.warning("%s", message)
