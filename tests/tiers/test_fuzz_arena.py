"""Whatever lies in the files of arena and disk, flipped or forged: they open or are refused in words, every slot is
accounted for, and whoever finds a block has its bytes."""

import os
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvprefetch.errors import ArenaRefused, TierUnavailable
from kvprefetch.service.watch import is_alive
from kvprefetch.tiers.arena import ArenaFile
from kvprefetch.tiers.checksum import checksum
from kvprefetch.tiers.contract import Incoming
from kvprefetch.tiers.disk import DiskTier
from kvprefetch.tiers.host import HostTier
from kvprefetch.tiers.layout import PAGE, Layout
from kvprefetch.tiers.slots import HEADER_BYTES, SlotHeader, SlotState, encode

NAMESPACE, BLOCK, SLOTS = "0123456789abcdef", 256, 8
KEYS = [sha256(bytes([number])).digest() for number in range(SLOTS)]
OTHERS = [sha256(bytes([100 + number])).digest() for number in range(SLOTS)]
HOSTILE = settings(max_examples=300, deadline=None, derandomize=True)
FILES = ("arena", "blocks")

u64 = st.one_of(st.sampled_from([0, 1, 2**31, 2**32, 2**63, 2**64 - 1]), st.integers(0, 2**64 - 1))
key = st.sampled_from([*KEYS, bytes(32), b"\xff" * 32])


@dataclass(frozen=True)
class Damage:
    """What happens to one slot."""

    slot: int
    header: Callable[[bytes], bytes]  # what was there → what is there
    in_block: int | None  # a byte that flips


def flipped(bits: list[int]) -> Callable[[bytes], bytes]:
    def flip(raw: bytes) -> bytes:
        changed = bytearray(raw)
        for bit in bits:
            changed[bit // 8] ^= 1 << bit % 8
        return bytes(changed)

    return flip


headers = st.builds(
    SlotHeader,
    state=st.sampled_from(SlotState),
    key=key,
    parent=st.one_of(st.just(b""), key),
    tenant=st.text("aü\0", max_size=30).filter(lambda name: len(name.encode()) <= 64),
    sequence=u64,
    checksum=u64,  # of no block here: who forges that as well cannot be found out
    length=st.one_of(st.just(BLOCK), u64),
    instance=st.binary(min_size=16, max_size=16),
    pid=st.sampled_from([0, 1, os.getpid(), 2**22, 2**31 - 1, 2**31, 2**32 - 1]),
    started=u64,
    speculative_until_unix=st.floats(),
)
damages = st.builds(
    Damage,
    st.integers(0, SLOTS - 1),
    st.one_of(
        st.lists(st.integers(0, 8 * HEADER_BYTES - 1), min_size=1, max_size=4).map(flipped),
        st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES).map(lambda raw: lambda _: raw),
        headers.map(lambda header: lambda _: encode(header)),  # well made, and wrong
    ),
    st.one_of(st.none(), st.integers(0, BLOCK - 1)),
)


def content(key: bytes) -> bytes:
    return key * (BLOCK // 32)


def open_tier(kind: str, folder: Path) -> HostTier | DiskTier:
    path = folder / f"{NAMESPACE}.{kind}"
    if kind == "blocks":
        return DiskTier(path, NAMESPACE, BLOCK, SLOTS, lambda: 0.0)
    arena = ArenaFile.create(path, NAMESPACE, BLOCK, SLOTS, prefault=False, huge_pages=False)
    return HostTier(arena, lambda: 0.0, is_alive=is_alive)


def incoming(keys: list[bytes]) -> list[Incoming]:
    """A sequence of blocks."""
    parents = [b"", *keys]
    return [
        Incoming(each, parent, "ann", memoryview(content(each)), checksum(content(each)))
        for each, parent in zip(keys, parents, strict=False)
    ]


def load(tier: HostTier | DiskTier, each: bytes) -> bytes | None:
    into = memoryview(bytearray(BLOCK))
    return bytes(into) if tier.load([each], [into]) else None


def is_sound(tier: HostTier | DiskTier) -> None:
    """Accounted for, right, and still of use."""
    tier.check()
    for each in (*KEYS, bytes(32), b"\xff" * 32):
        assert load(tier, each) in (None, content(each))
        tier.check()
    tier.store(incoming(OTHERS))
    tier.check()
    for each in OTHERS:
        assert load(tier, each) in (None, content(each))


@pytest.mark.parametrize("kind", FILES)
@given(damage=st.lists(damages, min_size=1, max_size=SLOTS))
@HOSTILE
def test_whatever_headers_and_blocks_hold_who_opens_the_file_finds_only_whole_blocks(
    kind: str, damage: list[Damage]
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tier = open_tier(kind, folder)
        assert tier.store(incoming(KEYS)) == SLOTS
        tier.close()
        spoil(folder / f"{NAMESPACE}.{kind}", Layout(kind_of(kind), NAMESPACE, BLOCK, SLOTS), damage)
        tier = open_tier(kind, folder)
        is_sound(tier)
        tier.close()


@pytest.mark.parametrize("kind", FILES)
@given(damage=st.lists(damages, min_size=1, max_size=SLOTS))
@HOSTILE
def test_what_flips_while_the_file_is_used_is_never_taken_for_a_block(kind: str, damage: list[Damage]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tier = open_tier(kind, folder)
        tier.store(incoming(KEYS))
        spoil(folder / f"{NAMESPACE}.{kind}", Layout(kind_of(kind), NAMESPACE, BLOCK, SLOTS), damage)
        for each in KEYS:
            assert load(tier, each) in (None, content(each))
        tier.store(incoming(OTHERS))
        for each in OTHERS:
            assert load(tier, each) in (None, content(each))
        tier.close()
        tier = open_tier(kind, folder)
        is_sound(tier)
        tier.close()


@pytest.mark.parametrize("kind", FILES)
@given(
    first=st.one_of(
        st.binary(max_size=PAGE),
        st.lists(st.integers(0, 8 * 120 - 1), min_size=1, max_size=4),
        st.tuples(st.binary(min_size=16, max_size=16), st.integers(0, 2**32 - 1), u64, u64, st.binary(max_size=64)),
    )
)
@HOSTILE
def test_a_file_whose_beginning_is_something_else_is_refused_in_words(
    kind: str, first: bytes | list[int] | tuple[bytes, int, int, int, bytes]
) -> None:
    """Noise, a few bits flipped, or well made of nonsense."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / f"{NAMESPACE}.{kind}"
        open_tier(kind, path.parent).close()
        before = path.read_bytes()
        with path.open("r+b") as file:
            file.write(forged(kind, before[:PAGE], first))
        if path.read_bytes() == before:
            return
        for opening in (lambda: open_tier(kind, path.parent), lambda: ArenaFile.attach(path, NAMESPACE)):
            assert str(path) in refusal(opening, str(path))


def refusal(opening: Callable[[], ArenaFile | HostTier | DiskTier], path: str) -> str:
    """Why it is not opened; where it is, `path`."""
    try:
        opening().close()
    except (ArenaRefused, TierUnavailable) as error:
        return str(error)
    return path


def forged(kind: str, before: bytes, first: bytes | list[int] | tuple[bytes, int, int, int, bytes]) -> bytes:
    if isinstance(first, bytes):
        return first
    if isinstance(first, list):
        return flipped(first)(before)
    magic, slots, block_bytes, slot_bytes, name = first
    fields = struct.pack("<16sIIQQ64s", before[:16] or magic, 1, slots, block_bytes, slot_bytes, name)
    return (fields + struct.pack("<Q", checksum(fields))).ljust(PAGE, b"\0")


def kind_of(kind: str) -> str:
    return "arena" if kind == "arena" else "disk"


def spoil(path: Path, layout: Layout, damage: list[Damage]) -> None:
    with path.open("r+b") as file:
        for each in damage:
            file.seek(layout.header_at(each.slot))
            raw = file.read(HEADER_BYTES)
            file.seek(layout.header_at(each.slot))
            file.write(each.header(raw))
            if each.in_block is not None:
                file.seek(layout.slot_at(each.slot) + each.in_block)
                byte = file.read(1)
                file.seek(layout.slot_at(each.slot) + each.in_block)
                file.write(bytes([byte[0] ^ 1]))
