"""Where a pool's pages lie: any layout as planes of byte fragments, their strides read off the tensors.

A page is one fragment in each plane. A block-major pool `[pages, layers, 2, block, heads, dim]` is one plane
with large fragments; a layer-major one, a list of `[2, pages, block, heads, dim]`, is two planes a layer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import gcd

import torch


@dataclass(frozen=True)
class Pages:
    """`planes[p]` is a uint8 view `[pages, fragment]` with any page stride; it keeps the memory alive.

    All planes have the same pages and fragment bytes. Two `Pages` fit if their planes and fragments are equal
    in number and size; `split` makes a coarser one fit.
    """

    planes: tuple[torch.Tensor, ...]

    @property
    def pages(self) -> int:
        """Pages that there are."""
        return self.planes[0].shape[0]

    @property
    def fragment(self) -> int:
        """Contiguous bytes of a page in one plane."""
        return self.planes[0].shape[1]

    @property
    def page_bytes(self) -> int:
        """Bytes of a whole page."""
        return self.fragment * len(self.planes)

    @property
    def device(self) -> torch.device:
        return self.planes[0].device

    @cached_property
    def alignment(self) -> int:
        """The largest of 16, 8, 4, 2, 1 bytes that divides every address, page stride and the fragment."""
        numbers = [self.fragment, *(n for plane in self.planes for n in (plane.data_ptr(), plane.stride(0)))]
        return gcd(16, *numbers)

    def widened(self) -> tuple[torch.Tensor, ...]:
        """The planes as int64 `[pages, fragment / 8]` where they allow it, which torch's indexing moves faster."""
        if self.alignment % 8 or any(plane.storage_offset() % 8 for plane in self.planes):
            return self.planes
        return tuple(plane.view(torch.int64) for plane in self.planes)

    def table(self) -> list[int]:
        """For each plane: address of page 0's fragment, bytes from page to page."""
        return [number for plane in self.planes for number in (plane.data_ptr(), plane.stride(0))]

    def addresses(self, listed: Sequence[int]) -> torch.Tensor:
        """int64 `[planes · listed]`, on the CPU: where the pages' fragments begin."""
        numbers = torch.tensor(listed, dtype=torch.int64)
        return torch.cat([plane.data_ptr() + plane.stride(0) * numbers for plane in self.planes])

    @cached_property
    def memories(self) -> dict[int, torch.Tensor]:
        """By its address, each storage that the planes are views of, all of it."""
        one_each = {plane.untyped_storage().data_ptr(): plane for plane in self.planes}
        return {address: _whole(plane) for address, plane in one_each.items()}

    def split(self, fragment: int) -> "Pages":
        """The same pages in planes of `fragment` bytes, in the same order of bytes. Raises ValueError."""
        if fragment < 1 or self.fragment % fragment:
            raise ValueError(f"fragments of {self.fragment} bytes cannot be split into fragments of {fragment}")
        return Pages(tuple(part for plane in self.planes for part in torch.split(plane, fragment, dim=1)))


def send(numbers: Sequence[int], device: torch.device) -> torch.Tensor:
    """int64 `[numbers]` on `device`. Through pinned memory, so that nobody waits for the device."""
    is_cuda = device.type == "cuda"
    return torch.tensor(numbers, dtype=torch.int64, pin_memory=is_cuda).to(device, non_blocking=True)


def describe(tensors: torch.Tensor | Sequence[torch.Tensor], page_dim: int = 0) -> Pages:
    """The planes of one tensor, or of one a layer, whose dimension `page_dim` counts pages.

    Nothing is copied. Raises ValueError where elements of a page are not contiguous, or the tensors differ.
    """
    given = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
    if not given:
        raise ValueError("a pool needs at least one tensor")
    planes = [plane for tensor in given for plane in _planes(tensor, page_dim)]
    shapes = {(tuple(plane.shape), plane.device) for plane in planes}
    if len(shapes) > 1:
        raise ValueError(f"the tensors of a pool differ in pages, fragment bytes or device: {sorted(map(str, shapes))}")
    return Pages(tuple(planes))


def _planes(tensor: torch.Tensor, page_dim: int) -> Iterator[torch.Tensor]:
    if tensor.dim() < 2 or not -tensor.dim() <= page_dim < tensor.dim():
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} has no pages along dimension {page_dim}")
    if tensor.numel() == 0:
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} holds no pages")
    view = tensor.movedim(page_dim, 0)
    if view.dim() == 1 or view.stride(-1) != 1:
        raise ValueError(f"neighbouring elements of a page must be contiguous, strides are {tuple(tensor.stride())}")
    inner, fragment = view.dim(), 1  # dimensions from `inner` on are one contiguous run of `fragment` elements
    while inner > 1 and view.stride(inner - 1) == fragment:
        inner -= 1
        fragment *= view.shape[inner]
    outer = view.shape[1:inner]
    size = view.element_size()
    raw = _whole(tensor)
    for index in product(*map(range, outer)):
        start = view.storage_offset() + sum(i * step for i, step in zip(index, view.stride()[1:inner], strict=True))
        yield raw.as_strided((view.shape[0], fragment * size), (view.stride(0) * size, 1), start * size)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """All bytes of the storage that `tensor` is a view of."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
