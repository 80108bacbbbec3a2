"""Paged copies move exactly the bytes they are told to, in every layout; interpreted where there is no GPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kvprefetch_kernels.copy import check_lists, copy_pages, copy_pages_reference
from kvprefetch_kernels.pages import Pages, describe
from layouts import DEVICE, DTYPES, LAYOUTS, fill, page_bytes, poison

PAGES = 9
LISTS = {
    "one": ([4], [7]),
    "none": ([], []),
    "several, permuted": ([3, 0, 8, 5, 1], [2, 6, 0, 1, 8]),
    "one source for many": ([2, 2, 2], [0, 5, 4]),
    "all": (list(range(PAGES)), list(range(PAGES))[::-1]),
}


def copied(source: Pages, target: Pages, taken: list[int], given: list[int]) -> torch.Tensor:
    """What the target must hold."""
    expected = page_bytes(target)
    if taken:
        expected[given] = page_bytes(source)[taken]
    return expected


@pytest.mark.parametrize("copy", [copy_pages, copy_pages_reference])
@pytest.mark.parametrize("lists", LISTS)
@pytest.mark.parametrize("to", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pages_arrive_and_nothing_else_changes(layout: str, to: str, lists: str, copy: object) -> None:
    """Between any two layouts, as the order of a page's bytes is the same in all."""
    (source_tensors, source), (target_tensors, target) = (LAYOUTS[x](PAGES, torch.bfloat16) for x in (layout, to))
    fill(source, 1)
    for tensor in target_tensors:
        tensor.view(torch.uint8).fill_(255)
    before = [tensor.view(torch.uint8).clone() for tensor in source_tensors]
    expected = copied(source, target, *LISTS[lists])
    copy(source, target, *LISTS[lists])  # type: ignore[operator]
    assert torch.equal(page_bytes(target), expected)
    assert all(torch.equal(old, new.view(torch.uint8)) for old, new in zip(before, source_tensors, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_dtype_moves_bit_by_bit(dtype: torch.dtype) -> None:
    (_, source), (_, target) = (LAYOUTS["layer-major"](PAGES, dtype) for _ in range(2))
    fill(source, 2)
    poison(target)
    expected = copied(source, target, *LISTS["several, permuted"])
    copy_pages(source, target, *LISTS["several, permuted"])
    assert torch.equal(page_bytes(target), expected)


@pytest.mark.parametrize("fragment", [1, 2, 3, 6, 8, 12, 16, 24, 48, 80, 1_000, 16_384, 16_400, 40_000, 65_536])
def test_any_fragment_size_is_copied_whole(fragment: int) -> None:
    """Below, at and above one step of a program; in words of 1, 2, 4, 8 and 16 bytes."""
    source, target = (torch.empty((5, fragment + 64), dtype=torch.uint8, device=DEVICE)[:, :fragment] for _ in "st")
    pools = describe(source), describe(target)
    fill(pools[0], 3)
    poison(pools[1])
    expected = copied(*pools, [4, 1, 0], [0, 2, 3])
    copy_pages(*pools, [4, 1, 0], [0, 2, 3])
    assert torch.equal(page_bytes(pools[1]), expected)


@pytest.mark.parametrize("shift", [1, 2, 4, 8, 16])
def test_an_address_may_be_aligned_to_anything(shift: int) -> None:
    whole = torch.empty(5 * 64 + shift, dtype=torch.uint8, device=DEVICE)
    source = describe(whole[shift:].view(5, 64))
    target = describe(torch.empty((5, 64), dtype=torch.uint8, device=DEVICE))
    assert source.alignment == shift
    fill(source, 4)
    poison(target)
    copy_pages(source, target, [0, 4], [3, 1])
    assert torch.equal(page_bytes(target)[[3, 1]], page_bytes(source)[[0, 4]])


def test_pages_move_within_one_pool() -> None:
    _, pool = LAYOUTS["layer-major"](PAGES, torch.float16)
    fill(pool, 5)
    before = page_bytes(pool)
    copy_pages(pool, pool, [7, 8], [0, 2])
    after = page_bytes(pool)
    assert torch.equal(after[[0, 2]], before[[7, 8]])
    assert torch.equal(after[[1, 3, 4, 5, 6, 7, 8]], before[[1, 3, 4, 5, 6, 7, 8]])


def test_offsets_beyond_31_bits_are_reached() -> None:
    """Pages far apart: the memory between them is reserved and never touched."""
    far = torch.empty(3 * 2**30 + 64, dtype=torch.uint8, device=DEVICE)
    pool = describe(far.as_strided((4, 64), (2**30, 1)))
    small = describe(torch.empty((4, 64), dtype=torch.uint8, device=DEVICE))
    fill(small, 6)
    copy_pages(small, pool, [0, 1], [3, 2])
    back = describe(torch.zeros((4, 64), dtype=torch.uint8, device=DEVICE))
    copy_pages(pool, back, [3, 2], [1, 0])
    assert torch.equal(page_bytes(back)[[1, 0]], page_bytes(small)[[0, 1]])


@pytest.mark.parametrize("max_sms", [1, 4, 12])
def test_a_cap_on_multiprocessors_changes_nothing_but_speed(max_sms: int) -> None:
    (_, source), (_, target) = (LAYOUTS["layer-major"](PAGES, torch.float16) for _ in range(2))
    fill(source, 7)
    poison(target)
    expected = copied(source, target, *LISTS["all"])
    copy_pages(source, target, *LISTS["all"], max_sms=max_sms)
    assert torch.equal(page_bytes(target), expected)


# -- bad input --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("copy", [copy_pages, copy_pages_reference])
@pytest.mark.parametrize(
    ("taken", "given", "said"),
    [
        ([9], [0], "source page 9 is not one of 9"),
        ([-1], [0], "source page -1 is not one of 9"),
        ([0], [9], "target page 9 is not one of 9"),
        ([0, 1], [3, 3], "listed more than once"),
        ([0, 1], [3], "2 source pages and 1 target pages"),
    ],
)
def test_a_wrong_list_is_refused_before_anything_moves(
    taken: list[int], given: list[int], said: str, copy: object
) -> None:
    (_, source), (_, target) = (LAYOUTS["block-major"](PAGES, torch.int8) for _ in range(2))
    fill(source, 8)
    poison(target)
    with pytest.raises(ValueError, match=said):
        copy(source, target, taken, given)  # type: ignore[operator]
    assert bool((page_bytes(target) == 255).all())


def test_a_page_that_is_both_source_and_target_is_refused() -> None:
    _, pool = LAYOUTS["layer-major"](PAGES, torch.int8)
    with pytest.raises(ValueError, match="both source and target"):
        copy_pages(pool, pool, [1, 2], [2, 3])


def bytes_of(pages: Pages, listed: list[int]) -> set[int]:
    """Addresses of every byte of these pages."""
    return {a for p in pages.planes for n in listed for a in range(p[n].data_ptr(), p[n].data_ptr() + pages.fragment)}


def cut(start: int, planes: int) -> Pages:
    """Four pages of `planes` fragments of 8 bytes, from byte `start` of one memory."""
    return describe(list(MEMORY[start : start + 32 * planes].view(4, planes, 8).unbind(1)))


MEMORY = torch.zeros(1024, dtype=torch.uint8, device=DEVICE)
cuts = st.tuples(st.integers(0, 20), st.integers(0, 20), st.sampled_from([1, 1, 2]))
pairs = st.permutations(range(4)).map(lambda order: list(order[:2]))


@settings(max_examples=300, deadline=None)
@given(cuts, pairs, pairs)
def test_other_views_of_the_same_memory_are_seen_through(
    cuts: tuple[int, int, int], taken: list[int], to: list[int]
) -> None:
    """Pages that start elsewhere: refused exactly where a byte would be both read and written."""
    source, target = cut(cuts[0], cuts[2]), cut(cuts[1], cuts[2])
    if bytes_of(source, taken) & bytes_of(target, to):
        with pytest.raises(ValueError, match="both source and target"):
            check_lists(source, target, taken, to)
    else:
        check_lists(source, target, taken, to)


def test_pages_of_different_sizes_are_refused() -> None:
    (_, source), (_, target) = LAYOUTS["block-major"](2, torch.int8), LAYOUTS["block-major"](2, torch.float16)
    with pytest.raises(ValueError, match="pages of 384 bytes cannot be copied to pages of 768"):
        copy_pages(source, target, [0], [0])


@pytest.mark.parametrize(
    ("tensor", "page_dim", "said"),
    [
        (torch.empty(4), 0, "has no pages along dimension 0"),
        (torch.empty(4, 4), 2, "has no pages along dimension 2"),
        (torch.empty(0, 4), 0, "holds no pages"),
        (torch.empty(4, 6)[:, ::2], 0, "must be contiguous"),
        (torch.empty(4, 4), 1, "must be contiguous"),
    ],
)
def test_a_tensor_that_is_no_pool_is_told_why(tensor: torch.Tensor, page_dim: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        describe(tensor, page_dim)


def test_layers_must_be_alike() -> None:
    with pytest.raises(ValueError, match="differ in pages"):
        describe([torch.empty(4, 8), torch.empty(5, 8)])
    with pytest.raises(ValueError, match="at least one tensor"):
        describe([])
