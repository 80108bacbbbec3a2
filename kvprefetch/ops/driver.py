"""Copies by the driver: one for each run of neighbouring pages, many in one call where `cuda-bindings` is there."""

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from kvprefetch_kernels.copy import check_lists, fitting
from kvprefetch_kernels.pages import Pages

log = logging.getLogger(__name__)
_ONE_BY_ONE = 8  # copies; for fewer a batch is not worth its setting up
Descriptor = tuple[int, int, int, int]  # plane, first source page, first target page, pages


def copy_by_driver(source: Pages, target: Pages, taken: Sequence[int], given: Sequence[int], *, batched: bool) -> None:
    """As `ops.copy.copy_pages`, on the current stream. `batched` only between memory that the driver need not stage."""
    prepare_by_driver(source, target, taken, given, batched=batched)()


def prepare_by_driver(
    source: Pages, target: Pages, taken: Sequence[int], given: Sequence[int], *, batched: bool
) -> Callable[[], None]:
    """What `copy_by_driver` does, checked and with its copies laid out: call it as often as wanted."""
    source, target = fitting(source, target)
    check_lists(source, target, taken, given)
    copies = list(descriptors(source, target, taken, given))
    if batched and len(copies) > _ONE_BY_ONE and (runtime := _runtime()) is not None:
        return _batch(runtime, source, target, copies)

    def run() -> None:
        for plane, start, to, count in copies:
            target.planes[plane][to : to + count].copy_(source.planes[plane][start : start + count], non_blocking=True)

    return run


def descriptors(source: Pages, target: Pages, taken: Sequence[int], given: Sequence[int]) -> Iterator[Descriptor]:
    """The copies that it takes: one a run where a plane's pages touch each other on both sides, else one a page."""
    found = list(runs_of(taken, given))
    for plane, sides in enumerate(zip(source.planes, target.planes, strict=True)):
        if all(side.stride(0) == source.fragment for side in sides):
            yield from ((plane, start, to, count) for start, to, count in found)
        else:
            yield from ((plane, start, to, 1) for start, to in zip(taken, given, strict=True))


def runs_of(taken: Sequence[int], given: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """First source page, first target page and length of each run that is contiguous on both sides."""
    at = 0
    while at < len(taken):
        end = at + 1
        while end < len(taken) and taken[end] - taken[at] == given[end] - given[at] == end - at:
            end += 1
        yield taken[at], given[at], end - at
        at = end


def copy_bytes(source: Pages, target: Pages, taken: Sequence[int], given: Sequence[int]) -> int:
    """Bytes of one such copy, on average over the lists' runs."""
    fragment = min(source.fragment, target.fragment)
    if any(plane.stride(0) != fragment for plane in (*source.planes, *target.planes)):
        return fragment
    return fragment * len(taken) // max(1, sum(1 for _ in runs_of(taken, given)))


@cache
def _runtime() -> Any:
    """CUDA's runtime with batched copies (since 12.8), or None."""
    try:
        from cuda.bindings import runtime
    except ImportError:
        runtime = None
    if not hasattr(runtime, "cudaMemcpyBatchAsync"):
        log.warning("without cuda-bindings of CUDA 12.8 or later, the driver's copies are queued one by one")
        return None
    return runtime


def _batch(runtime: Any, source: Pages, target: Pages, copies: Sequence[Descriptor]) -> Callable[[], None]:
    device = target.device if target.device.type == "cuda" else source.device
    froms = [(plane.data_ptr(), plane.stride(0)) for plane in source.planes]
    tos = [(plane.data_ptr(), plane.stride(0)) for plane in target.planes]
    sources = [froms[plane][0] + start * froms[plane][1] for plane, start, _, _ in copies]
    targets = [tos[plane][0] + to * tos[plane][1] for plane, _, to, _ in copies]
    sizes = [count * source.fragment for _, _, _, count in copies]
    attributes = runtime.cudaMemcpyAttributes()
    attributes.srcAccessOrder = runtime.cudaMemcpySrcAccessOrder.cudaMemcpySrcAccessOrderStream
    count = len(copies)

    def run() -> None:
        current = torch.cuda.current_stream(device)
        stream = current if current.cuda_stream else _side_stream(device)  # the legacy default stream takes no batches
        if stream is not current:
            stream.wait_stream(current)
        code, *_ = runtime.cudaMemcpyBatchAsync(
            targets, sources, sizes, count, [attributes], [0], 1, stream.cuda_stream
        )
        if stream is not current:
            current.wait_stream(stream)
        if code != runtime.cudaError_t.cudaSuccess:
            raise RuntimeError(f"a batch of {count} copies failed: {code.name}")

    return run


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
