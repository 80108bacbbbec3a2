"""Whether blocks of the arena are loaded or computed goes by what was measured, and that is not for ever."""

from typing import Any

from kvprefetch.plan.rates import Rates
from kvprefetch.worker.host import Found
from kvprefetch.worker.loading import Loader

BLOCK = 16


class Sequence:
    """Pages that are filled in order."""

    def __init__(self, blocks: int) -> None:
        self.pages, self.blocks, self.shared = list(range(blocks)), [object()] * blocks, 0

    def loaded(self, count: int, speculative_until: float | None = None) -> None:
        self.shared += count


class Host:
    """A place whose copies take as long as it says."""

    def __init__(self) -> None:
        self.now, self.copy_s = 0.0, 0.001

    def clock(self) -> float:
        return self.now

    def load(self, found: Found, first: int, pages: list[int]) -> int:
        self.now += self.copy_s
        return len(pages)


def loads(loader: Any, host: Host) -> int:
    """Blocks of eight that are loaded, rather than computed."""
    sequence = Sequence(8)
    found = Found([bytes(32)] * 8, range(8))
    while not loader.step(sequence, found, host.clock):
        pass
    return sequence.shared


def test_a_load_that_once_stood_still_is_not_held_against_loading_for_ever() -> None:
    host, rates = Host(), Rates()
    loader: Any = Loader(host, rates, BLOCK)  # type: ignore[arg-type]
    rates.computed(0, 64, 0.01)
    assert loads(loader, host) == 8
    host.copy_s = 2.0  # the process was stopped in the midst of a copy
    loads(loader, host)
    host.copy_s = 0.001
    tries = [loads(loader, host) for _ in range(20)]
    assert tries[0] == 0
    assert tries[-1] == 8


def test_loads_that_are_slow_are_tried_only_now_and_then() -> None:
    host, rates = Host(), Rates()
    loader: Any = Loader(host, rates, BLOCK)  # type: ignore[arg-type]
    rates.computed(0, 64, 0.01)
    host.copy_s = 0.1
    tries = [loads(loader, host) for _ in range(64)]
    assert sum(count > 0 for count in tries) <= 6
