"""How `ops` chooses and splits copies, and how it keeps memory alive; what needs a GPU is in `test_on_gpu`."""

import gc
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kvprefetch_kernels.checksum import checksum_pages_reference
from kvprefetch_kernels.pages import describe
from layouts import LAYOUTS, fill, page_bytes, poison

from kvprefetch.ops.copy import copy_checked_pages, copy_pages, method
from kvprefetch.ops.driver import copy_by_driver, descriptors, runs_of
from kvprefetch.ops.fp8 import pack_pages, unpack_pages
from kvprefetch.ops.pending import Pending


@given(st.lists(st.integers(0, 9), max_size=10), st.permutations(range(10)))
def test_runs_cover_every_pair_once_and_in_order(taken: list[int], order: list[int]) -> None:
    given_ = order[: len(taken)]
    found = [(start + i, to + i) for start, to, count in runs_of(taken, given_) for i in range(count)]
    assert found == list(zip(taken, given_, strict=True))
    edges = [(start + count, to + count) for start, to, count in runs_of(taken, given_)]
    starts = [(start, to) for start, to, _ in runs_of(taken, given_)]
    assert all(edge != start for edge, start in zip(edges[:-1], starts[1:], strict=True)), "two runs could be one"


def test_pages_that_touch_go_in_one_copy_and_strided_ones_one_by_one() -> None:
    lists = [3, 4, 5, 1], [0, 1, 2, 7]
    for layout, planes, copies in (("block-major", 1, 2), ("layer-major", 6, 12), ("strided", 3, 12)):
        _, pages = LAYOUTS[layout](9, torch.float16)
        assert len(pages.planes) == planes
        assert len(list(descriptors(pages, pages, *lists))) == copies


@pytest.mark.parametrize("to", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_drivers_copies_move_the_same_bytes(layout: str, to: str) -> None:
    (_, source), (_, target) = LAYOUTS[layout](9, torch.int8), LAYOUTS[to](9, torch.int8)
    fill(source, 1)
    poison(target)
    expected = page_bytes(target)
    expected[[0, 1, 2, 7]] = page_bytes(source)[[3, 4, 5, 1]]
    copy_by_driver(source, target, [3, 4, 5, 1], [0, 1, 2, 7], batched=False)
    assert torch.equal(page_bytes(target), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pages_gather_into_a_staging_buffer_and_scatter_from_it(layout: str) -> None:
    _, pool = LAYOUTS[layout](9, torch.bfloat16)
    fill(pool, 4)
    before = page_bytes(pool)
    staging = torch.full((3, pool.page_bytes), 255, dtype=torch.uint8, device=pool.device)
    sums = copy_checked_pages(pool, describe(staging), [7, 0, 3], [0, 1, 2])
    assert torch.equal(staging.cpu(), before[[7, 0, 3]])
    assert torch.equal(sums, checksum_pages_reference(describe(staging), [0, 1, 2]))
    poison(pool)
    copy_pages(describe(staging), pool, [2, 1, 0], [3, 0, 7])
    assert torch.equal(page_bytes(pool)[[0, 3, 7]], before[[0, 3, 7]])
    assert bool((page_bytes(pool)[[1, 2, 4, 5, 6, 8]] == 255).all())


def test_on_a_cpu_small_fragments_are_indexed_and_large_ones_copied() -> None:
    for fragment, chosen in ((4_096, "index"), (131_072, "index"), (131_088, "runs")):
        source, target = (describe(torch.empty((3, fragment), dtype=torch.uint8)) for _ in "st")
        assert method(source, target, [2, 1], [0, 2]) == chosen
        fill(source, 5)
        poison(target)
        copy_pages(source, target, [2, 1], [0, 2])
        assert torch.equal(target.planes[0][[0, 2]], source.planes[0][[2, 1]])
        assert bool((target.planes[0][1] == 255).all())


def test_neighbouring_pages_count_as_one_large_copy() -> None:
    """Where they touch each other in memory, on both sides."""
    pool = describe(torch.empty((64, 8_192), dtype=torch.uint8))
    apart = describe(torch.empty((64, 8_208), dtype=torch.uint8)[:, :8_192])
    run, scattered = list(range(32)), list(range(0, 64, 2))
    assert method(pool, pool, run, list(range(32, 64))) == "runs"
    assert method(pool, pool, scattered, run) == "index"
    assert method(pool, apart, run, run) == "index"
    assert method(pool, pool, [], []) == "index"


def test_packing_is_there_on_any_device() -> None:
    _, pool = LAYOUTS["block-major"](4, torch.bfloat16)
    part = pool.planes[0].view(torch.bfloat16).view(4, -1, 2, 8)
    part.copy_(torch.randn(part.shape))
    before = part.clone()
    unpack_pages(pack_pages([part], [1, 2]), [part], [3, 0])
    torch.testing.assert_close(part[[3, 0]], before[[1, 2]], rtol=1 / 16, atol=0.01)
    assert torch.equal(part[[1, 2]], before[[1, 2]])


def test_memory_is_kept_until_its_copy_is_done_and_no_longer() -> None:
    pending, done = Pending(), {"first": False, "second": False}
    first, second = torch.empty(4), torch.empty(4)
    seen = {"first": weakref.ref(first), "second": weakref.ref(second)}
    pending.hold((first,), lambda: done["first"])
    pending.hold((second,), lambda: done["second"])
    del first, second
    gc.collect()
    assert seen["first"]() is not None
    done["second"] = True  # streams overtake each other
    pending.hold((), lambda: True)
    gc.collect()
    assert seen["first"]() is not None
    assert seen["second"]() is None
    done["first"] = True
    pending.hold((), lambda: True)
    gc.collect()
    assert seen["first"]() is None
    assert len(pending) == 1
