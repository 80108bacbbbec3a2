"""Look-up of a sequence's leading blocks in a time that hardly grows with their number.

A block's ancestors are resident as long as it is, so its place in its sequence says how many blocks before it are
there: a binary search finds the last. What lies before it is noted once, packed, and compared with what was asked for,
so that the answer is exact for any keys, our own or not. Where a sequence has gaps (a block was dropped, or published
before the one in front of it), so is each part of it.

Pure. Belongs to one pool and is used by whoever may use that. Memory: `max_bytes` of notes, and at most twice as many
notes as there are of resident blocks, and a few.
"""

import sys
from array import array
from bisect import bisect_left
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

from kvprefetch.cache.block import Block
from kvprefetch.cache.pool import BlockPool

KEY = 32
_FEW = 64  # notes: so many are never too many
_UINT32 = "I" if array("I").itemsize == 4 else "L"


@dataclass(frozen=True, slots=True)
class Run:
    """Leading blocks of a sequence."""

    count: int
    tails: list[Block]  # who holds these holds all of them; one, unless there are gaps
    pages: bytes  # packed: a little-endian uint32 each

    def numbers(self) -> list[int]:
        """The pages, unpacked."""
        return array(_UINT32, _swapped(self.pages)).tolist()


class _Note(NamedTuple):
    """A block and all before it, packed."""

    keys: bytes
    pages: bytes


class Chains:
    """See the module's promises."""

    def __init__(self, pool: BlockPool, max_bytes: int = 16 * 2**20) -> None:
        self.pool, self.max_bytes = pool, max_bytes
        self._notes: OrderedDict[Block, _Note] = OrderedDict()
        self._noted = 0  # bytes
        self._sweep_at = _FEW  # notes
        self._moved = pool.moved

    def longest(self, keys: bytes) -> Run:
        """The longest resident prefix of packed `keys`. Takes no references and counts as no use."""
        asked, count = len(keys) // KEY, 0
        tails: list[Block] = []
        pages: list[bytes] = []
        while count < asked:
            block = self.pool.resident.get(keys[count * KEY : count * KEY + KEY])
            if block is None:
                break
            tail, note = self._unbroken(keys, count, asked) if block.depth == 0 else (block, None)
            if note is None or not keys.startswith(note.keys, count * KEY):  # not the sequence that it seemed to be
                tail, note = block, _Note(block.key, _swapped(array(_UINT32, [block.page]).tobytes()))
            tails.append(tail)
            pages.append(note.pages)
            count += len(note.keys) // KEY
        return Run(count, tails, b"".join(pages))

    def use(self, run: Run, now: float, session: str = "") -> int:
        """A live request of `session` uses these; returns how many were speculative and unused until now."""
        first_used = 0
        for tail in run.tails:
            used, above = [tail], tail.parent
            while above is not None and above.speculative:
                used.append(above)
                above = above.parent
            first_used += self.pool.touch(used, now, session)
        return first_used

    def _unbroken(self, keys: bytes, first: int, asked: int) -> tuple[Block, _Note]:
        """The last block that seems to follow block `first`, which begins a sequence, and all from there to it."""

        def at(place: int) -> Block | None:
            block = self.pool.resident.get(keys[place * KEY : place * KEY + KEY])
            return block if block is not None and block.depth == place - first else None

        last = first
        if at(asked - 1):  # most often all are there
            last = asked - 1
        elif first + 1 < asked and at(first + 1):
            last = bisect_left(range(asked), True, lo=first + 2, key=lambda place: at(place) is None) - 1
        tail = at(last)
        assert tail is not None
        return tail, self._note(tail)

    def _note(self, tail: Block) -> _Note:
        """What is noted of `tail`, or noted now from the nearest ancestor that has a note."""
        if self._moved != self.pool.moved:
            self._notes.clear()
            self._noted, self._moved = 0, self.pool.moved
        notes, blocks = self._notes, []
        at: Block | None = tail
        while at is not None and at not in notes:
            blocks.append(at)
            at = at.parent
        before = _Note(b"", b"")
        if at is not None:
            before = notes[at]
            notes.move_to_end(at)
        if not blocks:
            return before
        blocks.reverse()
        keys = b"".join([block.key for block in blocks])
        pages = array(_UINT32, [block.page for block in blocks]).tobytes()
        note = _Note(before.keys + keys, before.pages + _swapped(pages))
        self._keep(tail, note)
        return note

    def _keep(self, tail: Block, note: _Note) -> None:
        if len(self._notes) >= self._sweep_at:
            self._sweep()
        self._notes[tail] = note
        self._noted += len(note.keys) + len(note.pages)
        while self._noted > self.max_bytes and len(self._notes) > 1:
            _, old = self._notes.popitem(last=False)
            self._noted -= len(old.keys) + len(old.pages)

    def _sweep(self) -> None:
        """Forget blocks that are gone: a note of one would keep it, and all before it, in memory."""
        resident = self.pool.resident
        for block in [block for block in self._notes if resident.get(block.key) is not block]:
            gone = self._notes.pop(block)
            self._noted -= len(gone.keys) + len(gone.pages)
        self._sweep_at = 2 * len(self._notes) + _FEW


def _swapped(packed: bytes) -> bytes:
    """From this machine's byte order to little-endian, or back."""
    if sys.byteorder == "little":
        return packed
    numbers = array(_UINT32, packed)
    numbers.byteswap()
    return numbers.tobytes()
