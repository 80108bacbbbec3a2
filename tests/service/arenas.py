"""Tiny arenas for short stories: blocks of 64 bytes, keys of paths of letters."""

from collections.abc import Iterator
from hashlib import sha256
from itertools import count
from pathlib import Path

from kvprefetch.service.leases import Leases
from kvprefetch.tiers.arena import ArenaFile
from kvprefetch.tiers.checksum import checksum
from kvprefetch.tiers.host import HostTier
from kvprefetch.tiers.slots import Owner

BLOCK = 64
NAMESPACE = "0123456789abcdef"
ANN, BOB, CID = (Owner(letter.encode() * 16, 1_000 + at, 7) for at, letter in enumerate("abc"))


def chain(path: str) -> list[bytes]:
    """Keys of a sequence, one for each letter: each key is of all letters so far."""
    return [sha256(path[: end + 1].encode()).digest() for end in range(len(path))]


def packed(path: str) -> bytes:
    """The same keys, as they go over the wire."""
    return b"".join(chain(path))


def content(key: bytes) -> bytes:
    """The bytes of the block under `key`."""
    return (key * 2)[:BLOCK]


def open_host(folder: Path, slots: int = 8, *, alive: tuple[int, ...] = ()) -> HostTier:
    """The host tier in `folder`; of earlier owners, those with these pids are alive."""
    arena = ArenaFile.create(folder / f"{NAMESPACE}.arena", NAMESPACE, BLOCK, slots, prefault=False, huge_pages=False)
    return HostTier(arena, lambda: 0.0, is_alive=lambda pid, started: pid in alive, wall=lambda: 0.0)


class Desk:
    """Leases on a tiny arena, and what workers do with them."""

    def __init__(self, host: HostTier, numbers: Iterator[int] | None = None, **limits: int) -> None:
        self.host = host
        self.leases = Leases(host, numbers or count(1), **limits)
        for owner in (ANN, BOB):
            self.leases.returned(owner.instance, (), ())

    def check(self) -> None:
        self.host.check()
        self.leases.check()

    def reserve(self, owner: Owner, path: str, skip: int = 0) -> tuple[int, list[int | None]]:
        """A reservation for the blocks of `path` after the first `skip`, and their slots."""
        keys = chain(path)
        parent = keys[skip - 1] if skip else b""
        number, blocks = self.leases.reserve(owner, parent, keys[skip:], "ann", now=0.0)
        return number, [block.page if block else None for block in blocks]

    def write(self, path: str, slots: list[int | None], skip: int = 0) -> list[int]:
        """What the worker does next: write into the slots. The checksums."""
        sums = []
        for key, slot in zip(chain(path)[skip:], slots, strict=False):
            if slot is not None:
                self.host.arena.slot(slot)[:] = content(key)
                sums.append(checksum(content(key)))
        return sums

    def keep(self, path: str, owner: Owner = ANN) -> int:
        """Reserve, write and commit what is missing of `path`; how many blocks were committed."""
        number, slots = self.reserve(owner, path)
        sums = self.write(path, slots)
        return len(self.leases.commit(owner.instance, number, sums)) if number else 0

    def lease(self, owner: Owner, path: str) -> int:
        """Look `path` up and lease what is found."""
        run = self.host.longest(packed(path))
        return self.leases.lease(owner.instance, list(run.tails)) if run.count else 0

    def found(self, path: str) -> str:
        """The part of `path` that is found."""
        return path[: self.host.longest(packed(path)).count]

    def reads(self, path: str) -> str:
        """The part of `path` that a worker reads with the right bytes."""
        into = bytearray(BLOCK)
        for at, (slot, key) in enumerate(zip(self.host.longest(packed(path)).numbers(), chain(path), strict=False)):
            if not self.host.arena.read(slot, key, memoryview(into)) or bytes(into) != content(key):
                return path[:at]
        return self.found(path)
