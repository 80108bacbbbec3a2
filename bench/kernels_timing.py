"""Timing of copies and queued work, and the machine's own rates for large copies."""

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch

Call = Callable[[], object]
_ROUNDS = 7
_LARGE = 2**30  # bytes of the copies that set the peaks


def seconds_each(calls: Sequence[Call], rounds: int = _ROUNDS) -> float:
    """Median over rounds of the seconds a call takes when all are queued one behind the other, on this stream.

    So what is counted is the larger of queueing and doing. The calls should touch different memory.
    """
    for call in calls:
        call()
    return median(_round(calls) for _ in range(rounds)) / len(calls)


def _round(calls: Sequence[Call]) -> float:
    if not torch.cuda.is_available():
        begin = time.perf_counter()
        for call in calls:
            call()
        return time.perf_counter() - begin
    start, end = event(), event()
    torch.cuda.synchronize()
    start.record()
    for call in calls:
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


def event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def new_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


def peaks() -> dict[str, float]:
    """Bytes per second of large copies: within one memory (read and written), from pinned memory, to it, both ways."""
    if not torch.cuda.is_available():
        source, target = (torch.ones(_LARGE, dtype=torch.uint8) for _ in range(2))
        return {"h2h": 2 * _LARGE / seconds_each([lambda: target.copy_(source)])}
    device, other = (torch.empty(_LARGE, dtype=torch.uint8, device="cuda") for _ in range(2))
    host, second = (torch.empty(_LARGE, dtype=torch.uint8, pin_memory=True) for _ in range(2))
    calls: dict[str, tuple[Call, int]] = {
        "d2d": (lambda: other.copy_(device), 2),
        "h2d": (lambda: device.copy_(host, non_blocking=True), 1),
        "d2h": (lambda: second.copy_(other, non_blocking=True), 1),
        "both": (
            side_by_side(lambda: device.copy_(host, non_blocking=True), lambda: second.copy_(other, non_blocking=True)),
            2,
        ),
    }
    return {name: factor * _LARGE / seconds_each([call]) for name, (call, factor) in calls.items()}


def side_by_side(first: Call, second: Call) -> Call:
    """Both, the second on a stream of its own; done when both are."""
    side = new_stream()

    def run() -> None:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            second()
        first()
        torch.cuda.current_stream().wait_stream(side)

    return run
