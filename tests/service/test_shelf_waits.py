"""A look-up that waits for what is further away holds nothing meanwhile."""

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from itertools import count
from pathlib import Path

from arenas import ANN, BOB, CID, NAMESPACE, chain, checksum, content, open_host, packed

from kvprefetch.cache.keys import BlockKey
from kvprefetch.service.lane import Pace
from kvprefetch.service.shelf import Behind, Shelf


class SlowNode:
    """Another node that takes long to say that it has nothing."""

    name = "node"
    is_open = True

    def __init__(self) -> None:
        self.pace, self.counters = Pace(), Counter[str]()

    async def find(self, keys: Sequence[BlockKey]) -> int:
        await asyncio.sleep(0.2)
        return 0

    async def load(self, keys: Sequence[BlockKey], into: Sequence[memoryview]) -> list[int]:
        return []

    async def close(self) -> None:
        return None


def keep(shelf: Shelf, path: str) -> None:
    number, slots = shelf.reserve(ANN, b"", chain(path), "ann", None)
    sums = []
    for key, slot in zip(chain(path), slots, strict=False):
        assert slot is not None
        shelf.host.arena.slot(slot)[:] = content(key)
        sums.append(checksum(content(key)))
    shelf.commit(ANN.instance, number, sums)


def test_blocks_that_are_evicted_while_a_look_up_waits_are_not_leased(tmp_path: Path) -> None:
    async def story() -> None:
        host = open_host(tmp_path, slots=4)
        shelf = Shelf(NAMESPACE, host, Behind((), SlowNode()), CID, count(1), time.monotonic, 32)
        for owner in (ANN, BOB):
            shelf.leases.returned(owner.instance, (), ())
        keep(shelf, "ab")
        looking = asyncio.create_task(shelf.look_up(packed("abc"), "ann", "", lease_for=BOB.instance, wait_s=0.05))
        await asyncio.sleep(0.01)
        keep(shelf, "wxyz")  # all four slots
        found = await looking
        assert (found.count, found.lease) == (0, 0)
        shelf.check()
        await shelf.close()

    asyncio.run(story())
