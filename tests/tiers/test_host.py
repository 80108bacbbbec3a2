"""The arena in the service's hands: reservations, what outlives the service, and who may still be writing."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from conformance_tiers import Clock, chain, content, incoming
from small_arenas import BLOCK, SLOTS, create

from kvprefetch.cache.block import Block, Hold, State
from kvprefetch.errors import AccountingError
from kvprefetch.tiers.checksum import checksum
from kvprefetch.tiers.host import HostTier, may_run, started_at
from kvprefetch.tiers.slots import Owner, SlotHeader, SlotState

WORKER = Owner(b"w" * 16, 77, 5)


class Node:
    """A service that can be restarted, on one arena."""

    def __init__(self, path: Path) -> None:
        self.path, self.clock, self.unix = path, Clock(), Clock(1_000_000.0)
        self.living = {WORKER.pid}
        self.start()

    def start(self) -> None:
        self.holder = Hold()
        self.tier = HostTier(
            create(self.path), self.clock, is_alive=lambda pid, started: pid in self.living, wall=self.unix
        )
        self.tier.pool.holders.add(self.holder)

    def restart(self) -> None:
        self.tier.close()
        self.unix.now += 1
        self.start()

    def reserve(self, words: str, tenant: str = "ann", parent: bytes = b"", **options: float) -> list[Block | None]:
        """Slots for these; `holder` holds them."""
        blocks = self.tier.reserve(chain(words), parent, tenant, WORKER, now=self.clock.now, **options)
        self.holder.blocks += [block for block in blocks if block is not None]
        return blocks

    def write(self, block: Block) -> int:
        """The worker writes; the checksum."""
        data = content(BLOCK)
        self.tier.arena.slot(block.page)[:] = data
        return checksum(data)

    def seal(self, block: Block) -> Block:
        self.holder.blocks.remove(block)
        sealed = self.tier.seal(block, self.write(block))
        self.holder.blocks.append(sealed)
        return sealed

    def let_go(self) -> None:
        self.tier.pool.release(reversed(self.holder.blocks))
        self.holder.blocks = []

    def header(self, slot: int) -> SlotHeader:
        header = self.tier.arena.header(slot)
        assert header is not None
        return header


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path / "arenas" / "a.arena")
    yield node
    node.tier.check()
    node.tier.close()


def only(blocks: list[Block | None]) -> Block:
    (block,) = blocks
    assert block is not None
    return block


def test_a_reserved_slot_is_found_once_it_is_sealed(node: Node) -> None:
    block = only(node.reserve("a"))
    assert node.header(block.page) == SlotHeader(
        SlotState.RESERVED, chain("a")[0], b"", "ann", 10**12 + 1, 0, BLOCK, WORKER.instance, WORKER.pid, WORKER.started
    )
    node.tier.check()
    assert node.tier.find(chain("a")) == 0
    assert node.seal(block) is block
    node.tier.check()
    assert node.tier.find(chain("a")) == 1
    assert node.header(block.page).state is SlotState.SEALED
    assert node.header(block.page).pid == 0, "nobody writes to it any more"
    node.let_go()


def test_what_is_held_or_being_written_is_not_given_again(node: Node) -> None:
    node.seal(only(node.reserve("a")))
    second = node.reserve("abc")
    assert [block is None for block in second] == [True, False, False]
    assert node.reserve("abcd")[:3] == [None, None, None]
    assert len({block.page for block in node.holder.blocks}) == 4
    for block in list(node.holder.blocks[1:]):
        node.seal(block)
    assert node.tier.find(chain("abcd")) == 4
    assert len(node.tier.longest(b"".join(chain("abcd"))).tails) == 1, "one sequence"
    node.let_go()


def test_a_reservation_is_as_long_as_there_is_room(node: Node) -> None:
    blocks = node.reserve("abcdefgh")
    assert len(blocks) == SLOTS
    assert node.tier.counters["refused"] == 2
    assert node.reserve("xy") == []
    for block in list(node.holder.blocks):
        node.seal(block)
    node.let_go()


def test_room_is_not_made_at_the_cost_of_what_the_new_blocks_follow(node: Node) -> None:
    node.tier.store(incoming("abc", BLOCK))
    node.clock.now += 1
    node.tier.store(incoming("xyz", BLOCK))
    assert len(node.tier.reserve(chain("abcdefg")[3:], chain("abc")[2], "ann", WORKER, now=node.clock.now)) == 3
    assert node.tier.find(chain("abc")) == 3
    assert node.tier.find(chain("xyz")) == 0
    for block in list(node.tier.pool.in_flight.values()):
        node.tier.abandon(block)


def test_the_block_before_a_reservation_stays_until_it_is_sealed(node: Node) -> None:
    node.tier.store(incoming("a", BLOCK))
    block = only(node.tier.reserve(chain("ab")[1:], chain("a")[0], "ann", WORKER, now=node.clock.now))
    node.holder.blocks.append(block)
    node.tier.store(incoming("uvwxyz", BLOCK))
    assert node.tier.find(chain("a")) == 1
    node.seal(block)
    assert len(node.tier.longest(b"".join(chain("ab"))).tails) == 1
    node.let_go()


def test_an_abandoned_slot_is_free(node: Node) -> None:
    block = only(node.reserve("a"))
    node.holder.blocks.clear()
    node.tier.abandon(block)
    assert node.header(block.page).state is SlotState.FREE
    assert node.tier.pool.free_pages == SLOTS
    node.seal(only(node.reserve("a")))
    node.let_go()


def test_what_is_not_reserved_cannot_be_sealed_or_abandoned(node: Node) -> None:
    block = only(node.reserve("a"))
    node.seal(block)
    with pytest.raises(ValueError, match="is not reserved"):
        node.tier.seal(block, 0)
    with pytest.raises(ValueError, match="is not reserved"):
        node.tier.abandon(block)
    node.let_go()


# -- vanished writers ------------------------------------------------------------------------------------
def test_the_slot_of_a_vanished_worker_is_given_to_nobody(node: Node) -> None:
    block = only(node.reserve("a"))
    node.holder.blocks.clear()
    node.tier.quarantine(block)
    node.tier.check()
    assert node.tier.store(incoming("uvwxyz", BLOCK)) == SLOTS - 1
    assert block.page not in {other.page for other in node.tier.pool.resident.values()}
    node.tier.readmit(block)
    node.tier.check()
    assert node.header(block.page).state is SlotState.FREE
    assert node.tier.store(incoming("uvwxyz", BLOCK)) == SLOTS


def test_a_worker_that_comes_back_commits_what_it_was_writing(node: Node) -> None:
    block = only(node.reserve("a"))
    node.holder.blocks.clear()
    node.tier.quarantine(block)
    node.tier.resume(block)
    node.holder.blocks.append(block)
    node.tier.check()
    node.seal(block)
    assert node.tier.find(chain("a")) == 1
    node.let_go()


def test_of_two_that_wrote_one_block_the_first_counts(node: Node) -> None:
    """The first writer vanished, a second wrote the same block, and the first is back."""
    first = only(node.reserve("a"))
    node.holder.blocks.clear()
    node.tier.quarantine(first)
    second = node.seal(only(node.reserve("a")))
    node.tier.resume(first)
    node.holder.blocks.append(first)
    assert node.seal(first) is second
    node.tier.check()
    assert node.header(first.page).state is SlotState.FREE
    assert second.refs == 2
    node.let_go()


def test_reservations_of_living_workers_outlive_the_service_as_orphans(node: Node) -> None:
    block = only(node.reserve("a"))
    node.restart()
    ((orphan, header),) = node.tier.orphans
    assert (orphan.page, orphan.state) == (block.page, State.QUARANTINED)
    assert (header.instance, header.key) == (WORKER.instance, chain("a")[0])
    node.tier.check()
    assert node.tier.store(incoming("uvwxyz", BLOCK)) == SLOTS - 1
    assert node.tier.usage().by_tenant == {"ann": SLOTS * BLOCK}, "it is charged"
    with pytest.raises(ValueError, match="was not reserved in this run"):
        node.tier.resume(orphan)
    node.tier.readmit(orphan)
    assert not node.tier.orphans
    assert node.header(block.page).state is SlotState.FREE


def test_reservations_of_dead_workers_are_free_after_a_restart(node: Node) -> None:
    only(node.reserve("a"))
    node.living.clear()
    node.restart()
    assert not node.tier.orphans
    assert node.tier.pool.free_pages == SLOTS


def test_a_damaged_reservation_of_a_living_worker_is_not_given_to_another(node: Node) -> None:
    block = only(node.reserve("a"))
    flip(node, block.page, 40)
    node.restart()
    ((orphan, header),) = node.tier.orphans
    assert (orphan.page, header.instance, header.pid) == (block.page, WORKER.instance, WORKER.pid)
    assert node.tier.counters["damaged"] == 1
    node.tier.readmit(orphan)


def test_what_the_service_itself_was_writing_is_free_after_a_restart(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.living.add(os.getpid())
    monkeypatch.setattr(node.tier.arena, "put", lambda slot, data: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        node.tier.store(incoming("a", BLOCK))
    node.restart()
    assert not node.tier.orphans
    assert node.tier.pool.free_pages == SLOTS


def test_processes_are_known_by_number_and_start(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    started = started_at(child.pid)
    assert may_run(child.pid, started)
    assert not may_run(child.pid, started - 1), "another one had its number before"
    child.send_signal(signal.SIGSTOP)
    assert may_run(child.pid, started), "it may go on"
    child.kill()
    child.wait()
    assert not may_run(child.pid, started)


# -- what outlives the service ---------------------------------------------------------------------------
def flip(node: Node, slot: int, byte: int) -> None:
    arena = node.tier.arena
    assert arena._mapping is not None
    arena._mapping[arena.layout.header_at(slot) + byte] ^= 1


def test_the_index_is_there_again_after_a_restart(node: Node) -> None:
    node.tier.store(incoming("abc", BLOCK))
    node.tier.store(incoming("abx", BLOCK, "bob"))
    node.restart()
    assert node.tier.find(chain("abc")) == 3
    assert len(node.tier.longest(b"".join(chain("abx"))).tails) == 1
    assert node.tier.usage().by_tenant == {"ann": 3 * BLOCK, "bob": BLOCK}


def test_what_was_evicted_or_dropped_stays_gone(node: Node) -> None:
    node.tier.store(incoming("uvwxyz", BLOCK))
    node.clock.now += 1
    node.tier.store(incoming("ab", BLOCK))
    node.tier.drop(node.tier.pool.resident[chain("ab")[1]].page, chain("ab")[1])
    found = set(node.tier.pool.resident)
    assert len(found) == SLOTS - 1
    node.restart()
    assert set(node.tier.pool.resident) == found
    assert node.tier.counters["damaged"] == 0


@pytest.mark.parametrize("byte", [0, 8, 24, 40, 255])
def test_a_damaged_header_is_dropped_and_counted_and_the_rest_is_served(node: Node, byte: int) -> None:
    node.tier.store(incoming("abc", BLOCK))
    flip(node, node.tier.pool.resident[chain("abc")[1]].page, byte)
    node.restart()
    assert (node.tier.find(chain("abc")), node.tier.counters["damaged"]) == (1, 1)
    assert node.tier.find(chain("abc")[2:]) == 1
    node.restart()
    assert node.tier.counters["damaged"] == 0, "once"


def test_of_two_slots_with_one_key_one_is_kept(node: Node) -> None:
    node.tier.store(incoming("ab", BLOCK))
    a, b = (node.tier.pool.resident[key].page for key in chain("ab"))
    node.tier.arena.write_header(b, replace(node.header(a), sequence=node.header(b).sequence + 1))
    node.restart()
    assert node.tier.pool.resident[chain("a")[0]].page == b
    assert node.header(a).state is SlotState.FREE
    assert node.tier.pool.free_pages == SLOTS - 1


def test_sequence_numbers_never_go_back(node: Node) -> None:
    highest = 0
    for round_ in range(6):
        block = only(node.reserve("abcdef"[round_]))
        sequence = node.header(block.page).sequence
        assert sequence > highest
        highest = sequence
        if round_ % 3 == 0:
            node.seal(block)
            node.let_go()
            node.tier.discard(chain("abcdef"[round_]))
        elif round_ % 3 == 1:
            node.holder.blocks.clear()
            node.tier.abandon(block)
        else:
            flip(node, block.page, 9)
            node.living.clear()
        node.restart()


def test_speculation_keeps_the_rest_of_its_time_over_a_restart(node: Node) -> None:
    """The clock may begin anew with the process; the time of day goes on."""
    node.tier.store(incoming("a", BLOCK, until=node.clock.now + 60))
    node.clock.now, node.unix.now = 5.0, node.unix.now + 19
    node.restart()
    (block,) = node.tier.pool.resident.values()
    assert block.speculative
    assert block.hold_until == pytest.approx(45.0)
    node.unix.now += 60
    node.restart()
    (block,) = node.tier.pool.resident.values()
    assert not block.speculative


def test_the_oldest_go_first_after_a_restart_too(node: Node) -> None:
    for words in "fedcba":
        node.tier.store(incoming(words, BLOCK))
    node.restart()
    node.tier.store(incoming("xyz", BLOCK))
    assert {key for words in "cba" for key in chain(words)} < set(node.tier.pool.resident)


def test_a_worker_writes_while_the_service_restarts(node: Node) -> None:
    """Its mapping is of the file, not of the service."""
    from kvprefetch.tiers.arena import ArenaFile

    node.tier.store(blocks := incoming("ab", BLOCK))
    worker = ArenaFile.attach(node.path, node.tier.arena.namespace)
    slot = node.tier.pool.resident[chain("a")[0]].page
    reserved = only(node.tier.reserve(chain("abc")[2:], chain("ab")[1], "ann", WORKER, now=0.0))
    node.restart()
    into = memoryview(bytearray(BLOCK))
    assert worker.read(slot, chain("a")[0], into)
    assert into == blocks[0].data
    worker.write(reserved.page, into)
    ((orphan, _),) = node.tier.orphans
    node.tier.check()
    node.tier.readmit(orphan)
    worker.close()


# -- damage while it runs --------------------------------------------------------------------------------
def test_a_dropped_block_leaves_its_slot_when_nobody_holds_it(node: Node) -> None:
    node.tier.store(incoming("abc", BLOCK))
    run = node.tier.longest(b"".join(chain("abc")))
    node.holder.blocks += run.tails
    node.tier.pool.hold(run.tails)
    slot = run.numbers()[1]
    node.tier.drop(slot, chain("abc")[1])
    node.tier.drop(slot, chain("abc")[1])
    node.tier.check()
    assert node.tier.counters["corrupt"] == 1
    assert node.tier.find(chain("abc")) == 1
    assert node.tier.pool.free_pages == SLOTS - 3
    node.let_go()
    assert node.tier.pool.free_pages == SLOTS - 2


def test_a_late_report_of_damage_is_ignored(node: Node) -> None:
    node.tier.store(incoming("a", BLOCK))
    slot = node.tier.pool.resident[chain("a")[0]].page
    node.tier.drop(slot + 1, chain("a")[0])
    node.tier.drop(slot, chain("b")[0])
    assert node.tier.find(chain("a")) == 1
    assert node.tier.counters["corrupt"] == 0


def test_a_header_damaged_while_it_runs_costs_its_block_alone(node: Node) -> None:
    node.tier.store(blocks := incoming("abc", BLOCK))
    flip(node, node.tier.pool.resident[chain("abc")[1]].page, 40)
    node.tier.check()
    into = [memoryview(bytearray(BLOCK)) for _ in blocks]
    assert node.tier.load(chain("abc"), into) == 1
    assert node.tier.store(incoming("abc", BLOCK)) == 3
    assert node.tier.load(chain("abc"), into) == 3


@pytest.mark.parametrize("what", ["another key", "not sealed", "a slot too many"])
def test_check_notices_headers_that_are_not_those_of_the_blocks(node: Node, what: str) -> None:
    node.tier.store(incoming("a", BLOCK))
    slot = node.tier.pool.resident[chain("a")[0]].page
    header = node.header(slot)
    if what == "another key":
        node.tier.arena.write_header(slot, replace(header, key=chain("b")[0]))
    elif what == "not sealed":
        node.tier.arena.write_header(slot, SlotHeader(SlotState.FREE))
    else:
        node.tier._writing[slot] = None  # type: ignore[assignment]
    with pytest.raises(AccountingError):
        node.tier.check()
    node.tier._writing.clear()
    node.tier.arena.write_header(slot, header)
