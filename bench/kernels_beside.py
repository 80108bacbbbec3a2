"""What copies from the host on few multiprocessors take from a large matrix product that runs beside them."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from kernels_timing import event, new_stream, seconds_each
from kvprefetch_kernels.copy import prepare_copy
from kvprefetch_kernels.pages import describe

from kvprefetch.ops.driver import prepare_by_driver

FRAGMENT, PAGES = 16 * 1024, 16_384  # 256 MiB a copy
SIZE = 8192
PRODUCTS = 40  # about 56 ms at 790 TFLOP/s
SECONDS = 0.2  # of copies queued beside them


def beside_products(peak: float, draw: random.Random, caps: Sequence[int]) -> list[dict[str, Any]]:
    """A row for each cap, and one for the driver's copies. Fractions are of the bus's peak."""
    host = describe(torch.empty((PAGES, FRAGMENT), dtype=torch.uint8, pin_memory=True))
    pages = describe(torch.empty((PAGES, FRAGMENT), dtype=torch.uint8, device="cuda"))
    order = draw.sample(range(PAGES), PAGES), draw.sample(range(PAGES), PAGES)
    a, b = (torch.randn((SIZE, SIZE), device="cuda", dtype=torch.bfloat16) for _ in "ab")
    alone = seconds_each([lambda: a @ b] * PRODUCTS)
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    methods: list[tuple[int, Callable[[], None]]] = [
        *((cap, prepare_copy(host, pages, *order, max_sms=cap)) for cap in caps),
        (0, prepare_by_driver(host, pages, *order, batched=True)),
    ]
    rows = []
    for cap, copy in methods:
        seconds, copying = _together(copy, lambda: a @ b, int(SECONDS * peak / (PAGES * FRAGMENT)))
        row = {
            "beside": f"{SIZE}³ bf16 products",
            "method": f"kernel_{cap}_sms" if cap else "driver",
            "sms": cap,
            "share_of_sms": round(cap / sms, 4),
            "matmul_loss": round(1 - alone / seconds, 4),
            "h2d_fraction": round(PAGES * FRAGMENT / copying / peak, 4),
        }
        rows.append(row)
        print(row, flush=True)
    return rows


def _together(copy: Callable[[], None], product: Callable[[], object], copies: int) -> tuple[float, float]:
    """Seconds of a product while copies run all the time, and of a copy."""
    side = new_stream()
    copy()
    torch.cuda.synchronize()
    marks = [event() for _ in range(4)]
    with torch.cuda.stream(side):
        marks[0].record()
        for _ in range(copies):
            copy()
        marks[1].record()
    marks[2].record()
    for _ in range(PRODUCTS):
        product()
    marks[3].record()
    torch.cuda.synchronize()
    return marks[2].elapsed_time(marks[3]) / 1000 / PRODUCTS, marks[0].elapsed_time(marks[1]) / 1000 / copies
