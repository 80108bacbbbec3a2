"""A range of device addresses whose physical memory comes and goes: CUDA's virtual memory management.

torch's own allocator can give back whole allocations only, and a pool is one; so this goes to the driver, by
NVIDIA's `cuda-bindings` (which torch's CUDA builds bring). The memory is freed when the last view of it is gone,
and only after the device has finished: a pending copy never loses its pages.
"""

import weakref
from typing import Any

import torch
from cuda.bindings import driver

from kvprefetch.errors import SettingsError

SEGMENT = 32 * 2**20  # bytes; few enough handles for a large pool, small enough to give back closely


class CudaSegments:
    """See the promises in `segments`."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        torch.cuda.synchronize(device)  # makes torch's context current, which the range must belong to
        self._range = _Range(nbytes, torch.cuda.current_device() if device.index is None else device.index)
        self._range.back(0, nbytes)
        self.raw = torch.as_tensor(self._range, device=device)[:nbytes]

    def release(self, start: int, end: int) -> int:
        return self._range.release(start, end)

    def back(self, start: int, end: int) -> None:
        torch.cuda.synchronize(self.raw.device)  # makes the context current on this thread
        self._range.back(start, end)


class _Range:
    """The reserved addresses and the handles of the segments that are backed."""

    def __init__(self, nbytes: int, device: int) -> None:
        self.device = device
        self.properties = driver.CUmemAllocationProp()
        self.properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self.properties.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self.properties.location.id = device
        self.properties.win32HandleMetaData = 0  # else a null pointer object, which the driver refuses
        least = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        grain = _ask(driver.cuMemGetAllocationGranularity(self.properties, least))
        self.segment: int = -(-SEGMENT // grain) * grain
        self.size = -(-nbytes // self.segment) * self.segment
        self.start = int(_ask(driver.cuMemAddressReserve(self.size, 0, 0, 0)))
        self.handles: dict[int, Any] = {}  # number of a backed segment → its memory
        weakref.finalize(self, _free, self.start, self.size, self.segment, self.handles, device).atexit = False

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """So that torch makes a tensor of it, which keeps this object alive."""
        return {"shape": (self.size,), "typestr": "|u1", "data": (self.start, False), "version": 3}

    def release(self, start: int, end: int) -> int:
        torch.cuda.synchronize(self.device)  # what is queued may still touch it
        given = [n for n in range(-(-start // self.segment), end // self.segment) if n in self.handles]
        for number in given:
            self._drop(number)
        return len(given) * self.segment

    def back(self, start: int, end: int) -> None:
        missing = [n for n in range(start // self.segment, -(-end // self.segment)) if n not in self.handles]
        done: list[int] = []
        try:
            for number in missing:
                self._fill(number)
                done.append(number)
        except RuntimeError as error:
            for number in done:
                self._drop(number)
            raise SettingsError(f"pool.size: {len(missing) * self.segment} more bytes cannot be had") from error

    def _fill(self, number: int) -> None:
        at = self.start + number * self.segment
        handle = _ask(driver.cuMemCreate(self.segment, self.properties, 0))
        access = driver.CUmemAccessDesc()
        access.location = self.properties.location
        access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        is_mapped = False
        try:
            _ask(driver.cuMemMap(at, self.segment, 0, handle, 0))
            is_mapped = True
            _ask(driver.cuMemSetAccess(at, self.segment, [access], 1))
        except RuntimeError:
            if is_mapped:
                driver.cuMemUnmap(at, self.segment)
            driver.cuMemRelease(handle)
            raise
        self.handles[number] = handle

    def _drop(self, number: int) -> None:
        _ask(driver.cuMemUnmap(self.start + number * self.segment, self.segment))
        _ask(driver.cuMemRelease(self.handles.pop(number)))


def _free(start: int, size: int, segment: int, handles: dict[int, Any], device: int) -> None:
    torch.cuda.synchronize(device)
    for number, handle in handles.items():
        _ask(driver.cuMemUnmap(start + number * segment, segment))
        _ask(driver.cuMemRelease(handle))
    _ask(driver.cuMemAddressFree(start, size))


def _ask(answer: tuple[Any, ...]) -> Any:
    """The driver's answer without its error code. Raises RuntimeError for one that is not success."""
    code, *rest = answer
    if code != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"CUDA's driver says {code.name}")
    return rest[0] if rest else None
