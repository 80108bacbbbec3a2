"""Pages packed for transit: half the bytes, the same bits everywhere, and an error that keeps its bound."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kvprefetch_kernels.fp8 import LARGEST, Packed, pack, pack_reference, unpack, unpack_reference
from layouts import DEVICE

PAGES, LAYERS, BLOCK, HEADS, DIM = 6, 2, 4, 3, 24  # heads of no power of two
Parts = list[torch.Tensor]
Pool = tuple[torch.Tensor, Parts]


def block_major(dtype: torch.dtype) -> Pool:
    whole = torch.full((PAGES, LAYERS, 2, BLOCK, HEADS, DIM), float("nan"), dtype=dtype, device=DEVICE)
    return whole, [whole[:, layer, part] for layer in range(LAYERS) for part in range(2)]


def layer_major(dtype: torch.dtype) -> Pool:
    whole = torch.full((LAYERS, 2, PAGES, BLOCK, HEADS, DIM), float("nan"), dtype=dtype, device=DEVICE)
    return whole, [whole[layer, part] for layer in range(LAYERS) for part in range(2)]


def heads_before_tokens(dtype: torch.dtype) -> Pool:
    whole = torch.full((LAYERS * 2, PAGES, HEADS, BLOCK, DIM + 8), float("nan"), dtype=dtype, device=DEVICE)
    return whole, [part.transpose(1, 2)[..., :DIM] for part in whole]


LAYOUTS: dict[str, Callable[[torch.dtype], Pool]] = {
    "block-major": block_major,
    "layer-major": layer_major,
    "heads before tokens": heads_before_tokens,
}


def filled(
    layout: str = "block-major", dtype: torch.dtype = torch.bfloat16, spread: float = 3.0, seed: int = 0
) -> Parts:
    """A pool of normal values, another spread for each head."""
    generator = torch.Generator().manual_seed(seed)
    _, parts = LAYOUTS[layout](dtype)
    for part in parts:
        drawn = torch.randn(part.shape, generator=generator) * spread * torch.logspace(-2, 0, HEADS)[:, None]
        part.copy_(drawn.to(dtype))
    return parts


def pages_of(parts: Parts, listed: list[int]) -> torch.Tensor:
    return torch.stack([part[listed] for part in parts], dim=1)


def assert_within_bound(found: torch.Tensor, given: torch.Tensor, scales: torch.Tensor) -> None:
    """The error that the module promises, and where the target is too coarse for that, its own."""
    exact, wide = given.double(), found.double()
    bound = torch.maximum(exact.abs() / 16, scales[:, :, None, :, None].double() * 2.0**-10)
    smallest = torch.finfo(given.dtype).tiny * torch.finfo(given.dtype).eps
    assert bool(((wide - exact).abs() <= torch.clamp(bound, min=smallest / 2)).all())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spread", [1e-3, 1.0, 100.0])
def test_there_and_back_stays_within_the_bound(dtype: torch.dtype, spread: float, layout: str) -> None:
    source, listed = filled(layout, dtype, spread), [4, 0, 5]
    whole, target = LAYOUTS[layout](dtype)
    packed = pack(source, listed)
    assert packed.values.nbytes * 2 == pages_of(source, listed).nbytes
    unpack(packed, target, [1, 5, 2])
    assert_within_bound(pages_of(target, [1, 5, 2]), pages_of(source, listed), packed.scales)
    written = 3 * LAYERS * 2 * BLOCK * HEADS * DIM
    assert int(whole.isnan().logical_not().sum()) == written, "something else was written"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_kernels_give_the_references_bits(dtype: torch.dtype, layout: str) -> None:
    source, listed = filled(layout, dtype), [3, 3, 0]
    packed, expected = pack(source, listed), pack_reference(source, listed)
    assert torch.equal(packed.scales, expected.scales)
    assert torch.equal(packed.values.view(torch.uint8), expected.values.view(torch.uint8))
    first, second = (LAYOUTS[layout](dtype) for _ in "ab")
    unpack(packed, first[1], [2, 1, 4])
    unpack_reference(packed, second[1], [2, 1, 4])
    assert torch.equal(first[0].view(torch.int16), second[0].view(torch.int16))


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning:triton.*")  # the interpreter's NumPy
def test_every_16_bit_float_is_packed_as_by_the_reference() -> None:
    """All of them, eight magnitudes to a head: exact halves, subnormals, infinities and NaN among them."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        values = every.view(dtype)
        order = values.float().abs().nan_to_num(posinf=3e38).argsort()
        part = values[order].view(8, 32, 2, 128).to(DEVICE)
        packed, expected = pack([part], list(range(8))), pack_reference([part], list(range(8)))
        assert torch.equal(packed.values.view(torch.uint8), expected.values.view(torch.uint8))
        back, again = torch.zeros_like(part), torch.zeros_like(part)
        unpack(packed, [back], list(range(8)))
        unpack_reference(packed, [again], list(range(8)))
        assert torch.equal(back.nan_to_num(7.0), again.nan_to_num(7.0))
        assert torch.equal(back.isfinite(), part.isfinite())


@settings(max_examples=25, deadline=None)
@given(st.floats(1e-4, 1e3), st.integers(0, 10_000))
def test_the_reference_keeps_the_bound_at_any_spread(spread: float, seed: int) -> None:
    source, target = filled(spread=spread, seed=seed), block_major(torch.bfloat16)[1]
    packed = pack_reference(source, [0, 1])
    unpack_reference(packed, target, [0, 1])
    assert_within_bound(pages_of(target, [0, 1]), pages_of(source, [0, 1]), packed.scales)


def test_a_scale_is_the_least_power_of_two_that_fits() -> None:
    source = filled()
    scales = pack(source, [0]).scales
    largest = pages_of(source, [0]).float().abs().amax(dim=(2, 4))
    assert torch.equal(scales.log2(), scales.log2().round())
    assert bool((largest <= scales * LARGEST).all())
    assert bool((largest > scales / 2 * LARGEST).all())


@pytest.mark.parametrize("largest", [447.0, 448.0, 449.0, 1.75 * 2**-90, 2.0**-126, 3e38])
def test_the_largest_value_is_never_cut_off(largest: float) -> None:
    part = torch.full((1, BLOCK, 1, 8), largest, dtype=torch.bfloat16, device=DEVICE)
    packed = pack([part], [0])
    back = torch.zeros_like(part)
    unpack(packed, [back], [0])
    assert bool(((back.double() - part.double()).abs() <= part.double() / 16).all())


def test_a_page_of_zeros_stays_zero() -> None:
    source, target = filled(), filled()
    for part in source:
        part.zero_()
    unpack(pack(source, [0]), target, [3])
    assert not pages_of(target, [3]).any()


def test_what_cannot_be_packed_is_told_why() -> None:
    parts = filled()
    with pytest.raises(ValueError, match="bf16 or fp16 parts"):
        pack([torch.zeros((PAGES, BLOCK, HEADS, DIM))], [0])
    with pytest.raises(ValueError, match="contiguous dim"):
        pack([parts[0].transpose(2, 3)], [0])
    with pytest.raises(ValueError, match="is not one of 6"):
        pack(parts, [6])
    with pytest.raises(ValueError, match="differ in shape"):
        pack([parts[0], parts[1][:, :2]], [0])
    with pytest.raises(ValueError, match="at least one part"):
        pack([], [0])
    packed = pack_reference(parts, [0, 1])
    with pytest.raises(ValueError, match="more than once"):
        unpack(packed, parts, [1, 1])
    with pytest.raises(ValueError, match="packed values must be"):
        unpack(packed, parts, [1])
    with pytest.raises(ValueError, match="packed scales must be"):
        unpack(Packed(packed.values, packed.scales[:, :, :1]), parts, [1, 2])
