"""A page's checksum is the same wherever and however it is computed, and no change escapes it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kvprefetch_kernels.checksum import SEEDS, checksum_pages, checksum_pages_reference
from kvprefetch_kernels.copy import copy_checked_pages, copy_checked_pages_reference
from kvprefetch_kernels.pages import describe
from layouts import DEVICE, LAYOUTS, fill, page_bytes, poison


def by_definition(data: bytes) -> int:
    """The formula of the module, word by word, in Python's whole numbers."""
    low_bits, halves = 0xFFFFFFFF, []
    for seed in SEEDS:
        total = 0
        for number in range(len(data) // 4):
            h = int.from_bytes(data[4 * number : 4 * number + 4], "little")
            h ^= (number * 0x9E3779B9 + seed) & low_bits
            h = ((h ^ (h >> 16)) * 0x85EBCA6B) & low_bits
            h = ((h ^ (h >> 13)) * 0xC2B2AE35) & low_bits
            total = (total + (h ^ (h >> 16))) & low_bits
        halves.append(total)
    return halves[0] << 32 | halves[1]


def signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


@pytest.mark.parametrize("checksum", [checksum_pages, checksum_pages_reference])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_sum_of_the_definition(layout: str, checksum: object) -> None:
    _, pages = LAYOUTS[layout](5, torch.bfloat16)
    fill(pages, 1)
    listed = [3, 0, 3, 4]
    found = checksum(pages, listed).tolist()  # type: ignore[operator]
    raw = [b"".join(bytes(plane[page].tolist()) for plane in pages.planes) for page in listed]
    assert found == [signed(by_definition(data)) for data in raw]


@pytest.mark.parametrize("copy", [copy_checked_pages, copy_checked_pages_reference])
@pytest.mark.parametrize("to", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checked_copy_gives_the_sums_of_what_it_copied(layout: str, to: str, copy: object) -> None:
    """Whatever the two layouts: the order of a page's bytes is the same in all."""
    (_, source), (_, target) = LAYOUTS[layout](5, torch.bfloat16), LAYOUTS[to](5, torch.bfloat16)
    fill(source, 2)
    poison(target)
    taken, given_ = [3, 0, 3], [1, 4, 2]
    sums = copy(source, target, taken, given_)  # type: ignore[operator]
    assert torch.equal(sums, checksum_pages_reference(source, taken))
    assert torch.equal(checksum_pages_reference(target, given_), sums)
    assert copy(source, target, [], []).shape == (0,)  # type: ignore[operator]


@pytest.mark.parametrize("size", [4, 8, 24, 16_384, 16_392, 50_000])
def test_a_checked_copy_of_any_size(size: int) -> None:
    source, target = (describe(torch.empty((3, size), dtype=torch.uint8, device=DEVICE)) for _ in "st")
    fill(source, 3)
    poison(target)
    assert torch.equal(copy_checked_pages(source, target, [2, 0], [0, 1]), checksum_pages_reference(source, [2, 0]))
    assert torch.equal(page_bytes(target)[[0, 1]], page_bytes(source)[[2, 0]])
    with pytest.raises(ValueError, match="whole 32-bit words"):
        copy_checked_pages(*(describe(torch.empty((2, 6), dtype=torch.uint8)) for _ in "st"), [0], [0])


@pytest.mark.parametrize("size", [4, 12, 16, 8_192, 8_196, 50_000])
@pytest.mark.parametrize("byte", [0, 255])
def test_any_size_and_the_extreme_bytes(size: int, byte: int) -> None:
    pages = describe(torch.full((2, size), byte, dtype=torch.uint8, device=DEVICE))
    expected = signed(by_definition(bytes([byte]) * size))
    assert checksum_pages(pages, [1]).tolist() == checksum_pages_reference(pages, [1]).tolist() == [expected]


@settings(max_examples=60, deadline=None)
@given(st.binary(min_size=64, max_size=64), st.integers(0, 63), st.integers(1, 255))
def test_any_changed_byte_shows(data: bytes, at: int, change: int) -> None:
    changed = bytearray(data)
    changed[at] ^= change
    pages = describe(torch.tensor([list(data), list(changed)], dtype=torch.uint8, device=DEVICE))
    first, second = checksum_pages_reference(pages, [0, 1]).tolist()
    assert first != second


def test_swapped_words_show() -> None:
    pages = describe(torch.tensor([[1, 0, 0, 0, 2, 0, 0, 0], [2, 0, 0, 0, 1, 0, 0, 0]], dtype=torch.uint8))
    first, second = checksum_pages_reference(pages, [0, 1]).tolist()
    assert first != second


def test_no_pages_have_no_sums_and_odd_ones_are_refused() -> None:
    _, pages = LAYOUTS["layer-major"](3, torch.int8)
    poison(pages)
    assert checksum_pages(pages, []).shape == (0,)
    with pytest.raises(ValueError, match="is not one of 3"):
        checksum_pages(pages, [3])
    with pytest.raises(ValueError, match="whole 32-bit words"):
        checksum_pages(describe(torch.empty((2, 6), dtype=torch.uint8)), [0])
