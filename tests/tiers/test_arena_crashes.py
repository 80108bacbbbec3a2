"""A service that is killed between any two stores to its arena, and workers killed while they write."""

import os
import signal
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import pytest
from conformance_tiers import Clock, chain, incoming
from small_arenas import BLOCK, NAMESPACE, SLOTS, create, in_child

from kvprefetch.cache.evict import Demand
from kvprefetch.tiers.arena import ArenaFile
from kvprefetch.tiers.checksum import checksum
from kvprefetch.tiers.host import HostTier, started_at
from kvprefetch.tiers.slots import Owner

BLOCKS = {words: incoming(words, BLOCK) for words in ("abc", "abx", "pqrst")}
BYTES = {block.key: bytes(block.data) for blocks in BLOCKS.values() for block in blocks}
for _block in BLOCKS["abc"][:2]:  # who is first under a key stays
    BYTES[_block.key] = bytes(_block.data)


STORES = 102  # that `live_a_little` makes to headers


class Fuse:
    """A mapping of the arena that kills its process before the n-th store to a header."""

    def __init__(self, mapping: object, stores: int) -> None:
        self.mapping, self.left = mapping, stores

    def __getitem__(self, at: slice) -> bytes:
        return self.mapping[at]  # type: ignore[index,no-any-return]

    def __setitem__(self, at: int | slice, value: int | bytes) -> None:
        if self.left == 0:
            if isinstance(at, slice) and isinstance(value, bytes):  # the kernel stops in the middle of it
                half = len(value) // 2
                self.mapping[at.start : at.start + half] = value[:half]  # type: ignore[index]
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1
        self.mapping[at] = value  # type: ignore[index]


def live_a_little(path: Path, stores: int) -> None:
    """Store, evict, discard, reserve, seal, abandon, drop."""
    tier = HostTier(create(path), clock := Clock())
    tier.arena._mapping = Fuse(tier.arena._mapping, stores)  # type: ignore[assignment]
    for words, blocks in BLOCKS.items():
        clock.now += 1
        tier.store(blocks)
        tier.discard(chain(words)[-1:])
    owner = Owner(b"w" * 16, os.getpid(), started_at(os.getpid()))
    new = BLOCKS["abc"][1:]
    for reserved in tier.reserve([block.key for block in new], chain("a")[0], "ann", owner, now=clock.now):
        if reserved is not None:
            block = next(block for block in new if tier._writing[reserved.page].header.key == block.key)
            tier.arena.slot(reserved.page)[:] = block.data
            tier.pool.release([tier.seal(reserved, block.checksum)])
    for reserved in tier.reserve(chain("zy"), b"", "ann", owner, now=clock.now):
        if reserved is not None:
            tier.abandon(reserved)
    key = next(iter(tier.pool.resident))
    tier.drop(tier.pool.resident[key].page, key)


@pytest.mark.parametrize("stores", range(STORES + 1))
def test_a_service_killed_at_any_store_leaves_whole_blocks_and_free_slots(tmp_path: Path, stores: int) -> None:
    path = tmp_path / "arenas" / "a.arena"
    status = in_child(lambda: live_a_little(path, stores))
    assert status == (0 if stores == STORES else -signal.SIGKILL)
    tier = HostTier(create(path), Clock())
    tier.check()
    assert not tier.orphans, "its own reservations, and those of a worker that is dead"
    assert tier.counters["damaged"] <= 1
    assert tier.pool.free_pages + len(tier.pool.resident) == SLOTS
    into = memoryview(bytearray(BLOCK))
    for key in list(tier.pool.resident):
        assert tier.load([key], [into]) == 1
        assert bytes(into) == BYTES[key]
    assert tier.store(incoming("uvwxyz", BLOCK)) == SLOTS
    tier.check()
    tier.close()


WRITER = """
import sys, time
from kvprefetch.cache.evict import Demand
from kvprefetch.tiers.arena import ArenaFile
path, namespace, slot, upto = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
arena = ArenaFile.attach(path, namespace)
print("mapped", flush=True)
sys.stdin.readline()  # the service has reserved the slot
arena.slot(slot)[:upto] = b"w" * upto
print("written", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("upto", [0, BLOCK // 2, BLOCK])
def test_a_slot_is_free_only_when_the_death_of_its_stopped_writer_is_proved(tmp_path: Path, upto: int) -> None:
    path = tmp_path / "arenas" / "a.arena"
    tier = HostTier(create(path), Clock())
    (slot,) = (
        block.page for block in tier.pool.reserve(1, Demand("ann", False, 0.0))
    )  # the slot that the next one gets
    tier.pool.release(list(tier.pool.in_flight.values()))
    command = [sys.executable, "-c", WRITER, str(path), NAMESPACE, str(slot), str(upto)]
    writer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
    assert writer.stdin is not None
    assert writer.stdout is not None
    try:
        assert writer.stdout.readline() == "mapped\n"
        owner = Owner(b"w" * 16, writer.pid, started_at(writer.pid))
        (block,) = tier.reserve(chain("a"), b"", "ann", owner, now=0.0)
        assert block is not None
        assert block.page == slot
        writer.stdin.write("go\n")
        assert writer.stdout.readline() == "written\n"
        writer.send_signal(signal.SIGSTOP)
        for _ in range(2):  # however often the service starts
            tier.close()
            tier = HostTier(create(path), Clock())
            assert [orphan.page for orphan, _ in tier.orphans] == [slot]
            assert tier.store(incoming("uvwxyz", BLOCK)) == SLOTS - 1
            assert tier.find(chain("a")) == 0, "nobody ever finds what was not committed"
            tier.check()
        writer.kill()
        writer.wait()
        tier.close()
        tier = HostTier(create(path), Clock())
        assert not tier.orphans
        tier.check()
        assert tier.pool.free_pages == 1
        tier.close()
    finally:
        writer.kill()
        writer.communicate()


READER = """
import sys
from hashlib import sha256
from kvprefetch.cache.evict import Demand
from kvprefetch.tiers.arena import ArenaFile
path, namespace, block = sys.argv[1], sys.argv[2], int(sys.argv[3])
arena = ArenaFile.attach(path, namespace)
into = memoryview(bytearray(block))
print("mapped", flush=True)
taken = wrong = 0
for line in sys.stdin:
    slot, key = line.split()
    if arena.read(int(slot), bytes.fromhex(key), into):
        taken += 1
        wrong += sha256(bytes(into)).hexdigest() != sys.stdin.readline().strip()
    else:
        sys.stdin.readline()
print(taken, wrong, flush=True)
"""


def test_a_worker_reads_right_whatever_the_service_does_meanwhile(tmp_path: Path) -> None:
    """Stale slots and all: it is told slots that were evicted and written again since."""
    path = tmp_path / "arenas" / "a.arena"
    tier = HostTier(create(path), clock := Clock())
    reader = subprocess.Popen(
        [sys.executable, "-c", READER, str(path), NAMESPACE, str(BLOCK)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )
    assert reader.stdin is not None
    assert reader.stdout is not None
    assert reader.stdout.readline() == "mapped\n"
    until, rounds = time.monotonic() + 1.0, 0
    while time.monotonic() < until:
        rounds += 1
        clock.now += 1
        blocks = incoming("abcd", BLOCK, root=str(rounds).encode())
        tier.store(blocks)
        for block in blocks:
            slot = tier.pool.resident[block.key].page
            reader.stdin.write(f"{slot} {block.key.hex()}\n{sha256(block.data).hexdigest()}\n")
        if rounds % 50 == 0:
            tier.close()
            tier = HostTier(create(path), clock)
    out, _ = reader.communicate()
    taken, wrong = (int(number) for number in out.split())
    assert wrong == 0
    assert taken > 0
    tier.close()


def test_leases_need_no_luck(tmp_path: Path) -> None:
    """A block that is held stays in its slot, bytes and header, whatever is stored."""
    tier = HostTier(create(tmp_path / "arenas" / "a.arena"), clock := Clock())
    worker = ArenaFile.attach(tier.arena.path, NAMESPACE)
    blocks = BLOCKS["abc"]
    tier.store(blocks)
    run = tier.longest(b"".join(chain("abc")))
    tier.pool.hold(run.tails)
    headers = [worker.raw_header(slot) for slot in run.numbers()]
    for round_ in range(20):
        clock.now += 1
        tier.store(incoming("uvwxyz", BLOCK, root=bytes([round_])))
    assert [worker.raw_header(slot) for slot in run.numbers()] == headers
    assert [checksum(worker.slot(slot)) for slot in run.numbers()] == [block.checksum for block in blocks]
    tier.pool.release(run.tails)
    tier.check()
    worker.close()
    tier.close()
