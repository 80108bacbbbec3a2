"""What the headers of a file say, sorted out: which blocks lie there, and what is doubtful. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from kvprefetch.cache.keys import BlockKey
from kvprefetch.tiers.slots import SlotHeader, SlotState, decode


@dataclass(frozen=True, slots=True)
class Scan:
    """Of a file's slots. Whatever is in none of these is free."""

    sealed: dict[int, SlotHeader] = field(default_factory=dict)  # the oldest first, each key once
    reserved: dict[int, SlotHeader] = field(default_factory=dict)
    damaged: dict[int, bytes] = field(default_factory=dict)  # as they are
    twins: list[int] = field(default_factory=list)  # sealed, but another slot has a newer block under that key
    sequence: int = 0  # the highest, of those that are not damaged


def scan(headers: Iterable[bytes], block_bytes: int) -> Scan:
    """Sort out the headers of all slots, in the order of the slots. Raises nothing, whatever they hold."""
    newest: dict[BlockKey, tuple[int, SlotHeader]] = {}
    reserved: dict[int, SlotHeader] = {}
    damaged: dict[int, bytes] = {}
    twins: list[int] = []
    highest = 0
    for slot, raw in enumerate(headers):
        header = decode(raw)
        if header is None or (header.state is SlotState.SEALED and header.length != block_bytes):
            damaged[slot] = raw
            continue
        highest = max(highest, header.sequence)
        if header.state is SlotState.RESERVED:
            reserved[slot] = header
        elif header.state is SlotState.SEALED:
            other = newest.get(header.key)
            if other is not None and other[1].sequence >= header.sequence:
                twins.append(slot)
                continue
            if other is not None:
                twins.append(other[0])
            newest[header.key] = slot, header
    sealed = dict(sorted(newest.values(), key=lambda found: found[1].sequence))
    return Scan(sealed, reserved, damaged, twins, highest)
