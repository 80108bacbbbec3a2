"""Every tier as the conformance suite sees it. A new one joins by one entry in `TIERS`."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import count
from pathlib import Path

import pytest
import torch
from redis_servers import PATIENT_S, RedisCluster, RedisServer

from kvprefetch.cache.keys import BlockKey
from kvprefetch.settings import RedisSettings
from kvprefetch.tiers.arena import ArenaFile
from kvprefetch.tiers.checksum import checksum
from kvprefetch.tiers.contract import Incoming, Tier
from kvprefetch.tiers.device import DevicePool, PageShape
from kvprefetch.tiers.disk import DiskTier
from kvprefetch.tiers.gpu import DeviceTier
from kvprefetch.tiers.host import HostTier
from kvprefetch.tiers.redis import RedisTier
from kvprefetch.tiers.redis_block import HEADER_BYTES
from kvprefetch.tiers.redis_link import RedisLink

NAMESPACE = "0123456789abcdef"
BLOCK = 6_000  # no multiple of anybody's page


@dataclass
class Clock:
    """Time passes when the test says so."""

    now: float = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Wish:
    """What a test needs of a tier. `folder` is empty, and this tier's alone."""

    slots: int
    block_bytes: int
    folder: Path
    request: pytest.FixtureRequest  # for a tier that needs a server
    clock: Clock


@dataclass
class Place:
    """A tier under test, and what a test may do to it behind its back."""

    tier: Tier
    clock: Clock
    flip: Callable[[BlockKey], None]  # damages a byte of a stored block
    reopen: Callable[[], Tier] | None = None  # after `close`: the same place again; None: it does not outlast its tier
    is_bounded: bool = True  # it evicts beyond `slots` blocks
    has_lines: bool = True  # by the rules of `cache.line`: leaves first, speculation apart
    is_threaded: bool = False  # loads may run beside a store
    is_closed: bool = False


def open_device(wish: Wish) -> Place:
    shape = PageShape(1, 1, wish.block_bytes // 2, 1, torch.uint8)
    memory = DevicePool(shape, wish.slots, torch.device("cpu"))
    tier = DeviceTier(memory, wish.clock)

    def flip(key: BlockKey) -> None:
        memory.tensor[tier.pool.resident[key].page].view(-1)[wish.block_bytes // 3] ^= 1

    return Place(tier, wish.clock, flip)


def open_host(wish: Wish) -> Place:
    def opened() -> HostTier:
        path = wish.folder / "a.arena"
        arena = ArenaFile.create(path, NAMESPACE, wish.block_bytes, wish.slots, prefault=False, huge_pages=False)
        place.tier = tier = HostTier(arena, wish.clock)
        return tier

    def flip(key: BlockKey) -> None:
        assert isinstance(place.tier, HostTier)
        place.tier.arena.slot(place.tier.pool.resident[key].page)[wish.block_bytes // 3] ^= 1

    place = Place(None, wish.clock, flip, opened)  # type: ignore[arg-type]
    opened()
    return place


def open_disk(wish: Wish) -> Place:
    path = wish.folder / "b.blocks"

    def opened() -> DiskTier:
        place.tier = tier = DiskTier(path, NAMESPACE, wish.block_bytes, wish.slots, wish.clock)
        return tier

    def flip(key: BlockKey) -> None:
        assert isinstance(place.tier, DiskTier)
        at = place.tier.layout.slot_at(place.tier.pool.resident[key].page) + wish.block_bytes // 3
        with path.open("r+b") as file:
            file.seek(at)
            old = file.read(1)[0]
            file.seek(at)
            file.write(bytes([old ^ 1]))

    place = Place(None, wish.clock, flip, opened, is_threaded=True)  # type: ignore[arg-type]
    opened()
    return place


def open_redis(wish: Wish, fixture: str = "redis_server", *, is_bounded: bool = False) -> Place:
    server: RedisServer | RedisCluster = wish.request.getfixturevalue(fixture)
    size = str(wish.slots * (HEADER_BYTES + wish.block_bytes)) if is_bounded else ""
    settings = RedisSettings(url=server.url, timeout_s=PATIENT_S, size=size)
    namespace, link = os.urandom(8).hex(), RedisLink(settings)
    wish.request.addfinalizer(link.close)

    def opened() -> RedisTier:
        place.tier = tier = RedisTier(settings, namespace, wish.block_bytes, link=link)
        return tier

    def flip(key: BlockKey) -> None:
        assert isinstance(place.tier, RedisTier)
        name, at = place.tier.names.block(key), HEADER_BYTES + wish.block_bytes // 3
        (old,) = server.client().getrange(name, at, at)
        server.client().setrange(name, at, bytes([old ^ 1]))

    place = Place(None, wish.clock, flip, opened, is_bounded, has_lines=False, is_threaded=True)  # type: ignore[arg-type]
    opened()
    return place


def open_redis_cluster(wish: Wish) -> Place:
    return open_redis(wish, "redis_cluster")


def open_redis_of_a_size(wish: Wish) -> Place:
    return open_redis(wish, is_bounded=True)


def open_redis_cluster_of_a_size(wish: Wish) -> Place:
    return open_redis(wish, "redis_cluster", is_bounded=True)


TIERS: dict[str, Callable[[Wish], Place]] = {
    "gpu": open_device,
    "host": open_host,
    "disk": open_disk,
    "redis": open_redis,
    "redis cluster": open_redis_cluster,
    "redis of a size": open_redis_of_a_size,
    "redis cluster of a size": open_redis_cluster_of_a_size,
}

Open = Callable[..., Place]
_numbers = count()


def content(block_bytes: int) -> bytes:
    """Bytes that no other block has."""
    seed = sha256(f"content {next(_numbers)}".encode()).digest()
    return (seed * (block_bytes // 32 + 1))[:block_bytes]


def chain(words: str, root: bytes = b"") -> list[BlockKey]:
    """A key for each letter, which stands for all letters up to it."""
    return [sha256(root + words[: at + 1].encode()).digest() for at in range(len(words))]


def incoming(
    words: str, block_bytes: int, tenant: str = "ann", *, until: float | None = None, root: bytes = b""
) -> list[Incoming]:
    """Blocks to store, one for each letter, each with bytes of its own."""
    keys = chain(words, root)
    found = []
    for key, parent in zip(keys, [b"", *keys], strict=False):
        data = content(block_bytes)
        found.append(Incoming(key, parent, tenant, memoryview(data), checksum(data), until))
    return found


def buffers(number: int, block_bytes: int = BLOCK) -> list[memoryview]:
    return [memoryview(bytearray(block_bytes)) for _ in range(number)]


def loaded(tier: Tier, keys: Sequence[BlockKey]) -> list[bytes]:
    """What the tier gives for leading keys."""
    into = buffers(len(keys), tier.block_bytes)
    return [bytes(view) for view in into[: tier.load(keys, into)]]


def bytes_of(blocks: Sequence[Incoming]) -> list[bytes]:
    return [bytes(block.data) for block in blocks]
