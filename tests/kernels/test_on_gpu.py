"""What only a GPU can show: host memory both ways, memory that outlives its owner's interest, segments given back."""

import logging

import pytest
import torch
from kvprefetch_kernels.copy import copy_checked_pages, copy_pages
from kvprefetch_kernels.pages import Pages, describe
from layouts import fill, page_bytes, poison

from kvprefetch.ops import copy as ops
from kvprefetch.ops.driver import copy_by_driver
from kvprefetch.tiers.device import DevicePool, PageShape

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

PAGES = 64
TAKEN, GIVEN = [3, 4, 5, *range(63, 20, -1)], [0, 1, 2, *range(10, 53)]
METHODS = {
    "kernel": copy_pages,
    "capped": lambda *four: copy_pages(*four, max_sms=4),
    "checked": copy_checked_pages,
    "driver, one by one": lambda *four: copy_by_driver(*four, batched=False),
    "driver, batched": lambda *four: copy_by_driver(*four, batched=True),
    "ops": ops.copy_pages,
}


def pages(place: str, fragment: int) -> Pages:
    device = "cuda" if place == "device" else "cpu"
    return describe(torch.empty((PAGES, fragment), dtype=torch.uint8, device=device, pin_memory=place == "pinned"))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("fragment", [48, 4_096, 262_144])
@pytest.mark.parametrize(("place", "to"), [("pinned", "device"), ("device", "pinned"), ("device", "device")])
def test_bytes_arrive_wherever_they_lie(name: str, fragment: int, place: str, to: str) -> None:
    source, target = pages(place, fragment), pages(to, fragment)
    fill(source, 1)
    poison(target)
    expected = page_bytes(target)
    expected[GIVEN] = page_bytes(source)[TAKEN]
    METHODS[name](source, target, TAKEN, GIVEN)
    torch.cuda.synchronize()
    assert torch.equal(page_bytes(target), expected)


@pytest.mark.parametrize(("place", "to"), [("pageable", "device"), ("device", "pageable")])
def test_pageable_memory_works_and_is_said_once(place: str, to: str, caplog: pytest.LogCaptureFixture) -> None:
    ops._told.clear()
    source, target = pages(place, 4_096), pages(to, 4_096)
    fill(source, 2)
    with caplog.at_level(logging.WARNING, "kvprefetch"):
        for _ in range(2):
            poison(target)
            ops.copy_pages(source, target, TAKEN, GIVEN)
            torch.cuda.synchronize()
            assert torch.equal(page_bytes(target)[GIVEN], page_bytes(source)[TAKEN])
    assert [record.message for record in caplog.records].count(
        "host memory is not pinned: its copies are slower and wait for each other"
    ) == 1


def test_a_buffer_that_is_let_go_under_a_pending_copy_is_not_reused() -> None:
    target = pages("device", 65_536)
    poison(target)
    source = pages("pinned", 65_536)
    fill(source, 3)
    expected = page_bytes(source)
    torch.cuda._sleep(200_000_000)  # the copy waits behind this
    ops.copy_pages(source, target, range(PAGES), range(PAGES))
    del source
    others = [pages("pinned", 65_536) for _ in range(4)]  # would get its memory
    for other in others:
        poison(other)
    torch.cuda.synchronize()
    assert torch.equal(page_bytes(target), expected)


def free_bytes() -> int:
    """Of the device, by the driver's count, without what torch keeps for later."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def test_segments_go_back_to_the_device_and_come_again() -> None:
    pytest.importorskip("cuda.bindings")
    shape = PageShape(layers=32, kv_heads=8, head_dim=128, block_tokens=32, dtype=torch.bfloat16)  # 4 MiB a page
    pool = DevicePool(shape, 256, torch.device("cuda"))
    pool.tensor.fill_(7.0)
    free = free_bytes()
    given = pool.release(65, 256)
    assert given == 23 * 32 * 2**20
    assert free_bytes() - free == given
    assert bool((pool.tensor[:65] == 7.0).all())
    pool.back(65, 256)
    pool.tensor[65:].fill_(3.0)
    assert bool((pool.tensor[:65] == 7.0).all())
    assert free_bytes() == free
    del pool
    assert free_bytes() - free >= 256 * shape.bytes


def test_a_pool_let_go_under_a_pending_copy_stays_until_it_is_done() -> None:
    shape = PageShape(layers=4, kv_heads=8, head_dim=128, block_tokens=32, dtype=torch.bfloat16)
    pool, target = DevicePool(shape, PAGES, torch.device("cuda")), pages("device", shape.bytes)
    pool.tensor.fill_(7.0)
    torch.cuda._sleep(200_000_000)
    ops.copy_pages(describe(pool.tensor), target, range(PAGES), range(PAGES))
    del pool
    torch.cuda.synchronize()
    assert bool((target.planes[0].view(torch.bfloat16) == 7.0).all())
