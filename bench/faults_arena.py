"""Bits of the arena flip while it is used and while nobody looks; its file is cut, of another version, or another's."""

import mmap
import os
import random
import struct
import time
from collections.abc import Callable
from pathlib import Path

from faults_case import Campaign, Case
from faults_drive import joined, known, shared
from faults_node import Node, Worker
from faults_process import until

from kvprefetch.tiers.layout import PAGE, Layout, decode
from kvprefetch.tiers.slots import HEADER_BYTES, SlotState

_CORRUPT = (r"arena_read_total\{corrupt\}", r"lookup_missed.*\{corrupt\}", r"host\.(corrupt|damaged)")
_DAMAGED = (r"host\.damaged",)
_REFUSED = (r"\.refused\..* arena",)


class Bits:
    """The arena's file, in the hands of somebody who flips bits."""

    def __init__(self, path: Path, seed: int) -> None:
        self.path, self._random = path, random.Random(seed)
        with path.open("rb") as file:
            self.layout: Layout = decode(file.read(PAGE), "arena", path)

    def slots(self, state: SlotState) -> list[int]:
        """Those whose header says so."""
        with self.path.open("rb") as file:
            file.seek(PAGE)
            table = file.read(self.layout.slots * HEADER_BYTES)
        return [slot for slot in range(self.layout.slots) if table[slot * HEADER_BYTES] == state]

    def flip(self, offsets: list[int]) -> None:
        """One bit at each of these offsets, as memory that fails would."""
        with self.path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
            for at in offsets:
                memory[at] ^= 1 << self._random.randrange(8)

    def in_headers(self, slots: list[int]) -> list[int]:
        """An offset in each of their headers."""
        return [self.layout.header_at(slot) + self._random.randrange(HEADER_BYTES) for slot in slots]

    def in_blocks(self, slots: list[int]) -> list[int]:
        """An offset in each of their blocks."""
        return [self.layout.slot_at(slot) + self._random.randrange(self.layout.block_bytes) for slot in slots]


def run(campaign: Campaign, node: Node, one: Worker, two: Worker) -> None:
    """All cases. The node's service runs, and does at the end."""
    (path,) = (node.folder / "arena").glob("*.arena")
    bits = Bits(path, len(campaign.rows))
    with campaign.case("arena: headers flipped", "between writing and reading", [node], _CORRUPT) as case:
        flip_and_read(case, one, two, lambda: bits.flip(bits.in_headers(bits.slots(SlotState.SEALED))))
    with campaign.case("arena: blocks flipped", "between writing and reading", [node], _CORRUPT) as case:
        flip_and_read(case, one, two, lambda: bits.flip(bits.in_blocks(bits.slots(SlotState.SEALED))))
    with campaign.case("arena: headers and blocks flipped", "under load", [node], _CORRUPT) as case:
        with case.load([one, two]):
            for _ in range(10 if campaign.is_quick else 30):
                time.sleep(0.1)
                slots = list(range(bits.layout.slots))
                bits.flip(bits.in_headers(slots[::3]) + bits.in_blocks(slots[::2]))
        shared(case, one, two)
    with campaign.case("arena: headers flipped", "while the service is down", [node], _DAMAGED) as case:
        prompts = known(case, one, 4)
        assert node.service is not None
        node.service.kill()
        bits.flip(bits.in_headers(bits.slots(SlotState.SEALED)[::2]))
        node.serve(halting=True)
        joined(node)
        for prompt in prompts:
            case.ask(two, prompt)
        shared(case, one, two)
    if not campaign.is_quick:
        _refused(campaign, node, one, two, path)


def flip_and_read(case: Case, one: Worker, two: Worker, flip: Callable[[], None]) -> None:
    shared(case, one, two)
    prompts = known(case, one, 6)
    flip()
    for prompt in prompts:
        case.ask(two, prompt)
    shared(case, one, two)
    shared(case, two, one)


def _refused(campaign: Campaign, node: Node, one: Worker, two: Worker, path: Path) -> None:
    """Files that a service must not use: it says so, and workers serve without until the file is gone."""
    faults: dict[str, Callable[[], None]] = {
        "its header flipped": lambda: _write(path, 20, b"\xff"),
        "cut": lambda: os.truncate(path, path.stat().st_size // 2),
        "of another version": lambda: _other(path, version=99),
        "of another model": lambda: _other(path, namespace="0" * 16),
        "empty": lambda: os.truncate(path, 0),
    }
    for what, spoil in faults.items():
        with campaign.case("arena: file refused", what, [node], _REFUSED) as case:
            assert node.service is not None
            node.service.kill()
            spoil()
            node.serve(halting=True)
            until(lambda: "delete" in str(node.stats()["refused"]), "an arena that is not used is not told", 20)
            case.look([node])
            for _ in range(4):
                case.ask(one)
                case.ask(two)
            path.unlink()  # as it was told
            joined(node)
            shared(case, one, two)


def _write(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def _other(path: Path, version: int = 1, namespace: str = "") -> None:
    """The file's header, whole, but of something else."""
    with path.open("rb") as file:
        found = decode(file.read(PAGE), "arena", path)
    raw = bytearray(Layout("arena", namespace or found.namespace, found.block_bytes, found.slots).encode())
    if version != 1:
        from kvprefetch.tiers.checksum import checksum

        struct.pack_into("<I", raw, 16, version)
        fields = struct.calcsize("<16sIIQQ64s")
        struct.pack_into("<Q", raw, fields, checksum(bytes(raw[:fields])))
    _write(path, 0, bytes(raw))
