"""Workers that stop, vanish, come back, write when they should not, and die; a service that restarts: whatever they do
in whatever order, every slot is accounted for, and whoever reads a block reads its bytes."""

import tempfile
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from arenas import BLOCK, Desk, chain, content, open_host, packed
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvprefetch.service.leases import NotPresent, UnknownReservation
from kvprefetch.tiers.checksum import checksum
from kvprefetch.tiers.slots import Owner

SLOTS = 10
paths = st.text("ab", min_size=1, max_size=5)
which = st.integers(0, 2)
small = st.integers(0, 7)


@dataclass
class Worker:
    """A process, and what it believes that it holds."""

    owner: Owner
    is_alive: bool = True
    is_connected: bool = True
    leases: dict[int, str] = field(default_factory=dict)  # number → path
    reservations: dict[int, list[tuple[bytes, int]]] = field(default_factory=dict)  # number → key and slot of each


class LeasesMachine(RuleBasedStateMachine):
    @initialize()
    def open(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.pids = count(100)
        self.runs = count(1_000, 1_000)
        self.workers = [self.born() for _ in range(3)]
        self.desk = Desk(open_host(Path(self.folder.name), SLOTS), numbers=count(next(self.runs)))
        self.desk.leases.present.clear()
        for worker in self.workers:
            self.desk.leases.returned(worker.owner.instance, (), ())

    def teardown(self) -> None:
        self.desk.host.close()
        self.folder.cleanup()

    def born(self) -> Worker:
        pid = next(self.pids)
        return Worker(Owner(pid.to_bytes(16, "big"), pid, 7))

    # -- what workers do -------------------------------------------------------------------------------
    @rule(at=which, path=paths)
    def look_up(self, at: int, path: str) -> None:
        worker = self.workers[at]
        if not worker.is_connected:
            return
        number = self.desk.lease(worker.owner, path)
        if number:
            worker.leases[number] = self.desk.found(path)

    @rule(at=which, path=paths, skip=st.integers(0, 2))
    def reserve(self, at: int, path: str, skip: int) -> None:
        worker = self.workers[at]
        skip = min(skip, len(path) - 1)
        if not worker.is_connected:
            return
        number, slots = self.desk.reserve(worker.owner, path, skip)
        mine = [(key, slot) for key, slot in zip(chain(path)[skip:], slots, strict=False) if slot is not None]
        assert bool(mine) == bool(number)
        if number:
            worker.reservations[number] = mine

    @rule(at=which, part=st.integers(0, 5))
    def commit(self, at: int, part: int) -> None:
        worker = self.workers[at]
        if not worker.reservations or not worker.is_alive:
            return
        number, mine = next(iter(worker.reservations.items()))
        sums = []
        for key, slot in mine[: part or None]:
            self.desk.host.arena.slot(slot)[:] = content(key)
            sums.append(checksum(content(key)))
        try:
            self.desk.leases.commit(worker.owner.instance, number, sums)
        except NotPresent:
            assert not worker.is_connected
            return
        except UnknownReservation:
            pass  # an earlier run's
        del worker.reservations[number]

    @rule(at=which)
    def write_at_any_time(self, at: int) -> None:
        """A living worker may be half-way through writing, connected or not."""
        worker = self.workers[at]
        if worker.is_alive:
            for mine in worker.reservations.values():
                for _, slot in mine:
                    self.desk.host.arena.slot(slot)[: BLOCK // 2] = b"?" * (BLOCK // 2)

    @rule(at=which, corrupt=st.booleans())
    def give_back(self, at: int, corrupt: bool) -> None:
        worker = self.workers[at]
        if not worker.is_connected:
            return
        leases, reservations = list(worker.leases)[:1], list(worker.reservations)[:1]
        bad = set()
        if corrupt and leases:
            bad = set(self.desk.host.longest(packed(worker.leases[leases[0]])).numbers()[-1:])
        self.desk.leases.release(worker.owner.instance, leases, reservations, bad)
        for number in leases:
            del worker.leases[number]
        for number in reservations:
            del worker.reservations[number]

    # -- what happens to them --------------------------------------------------------------------------
    @rule(at=which)
    def vanish(self, at: int) -> None:
        worker = self.workers[at]
        if worker.is_connected:
            worker.is_connected = False
            self.desk.leases.vanish(worker.owner.instance)

    @rule(at=which, forget=st.booleans())
    def come_back(self, at: int, forget: bool) -> None:
        worker = self.workers[at]
        if not worker.is_alive or worker.is_connected:
            return
        if forget:  # it lists none of what it had
            worker.leases.clear()
            worker.reservations.clear()
        worker.is_connected = True
        self.desk.leases.returned(worker.owner.instance, worker.leases, worker.reservations)

    @rule(at=which)
    def die(self, at: int) -> None:
        """Killed; nobody has noticed yet."""
        self.workers[at].is_alive = False

    @rule(at=which)
    def prove_dead(self, at: int) -> None:
        worker = self.workers[at]
        if not worker.is_alive:
            self.desk.leases.died(worker.owner.instance)
            self.workers[at] = self.born()
            self.desk.leases.returned(self.workers[at].owner.instance, (), ())

    @rule()
    def restart_the_service(self) -> None:
        self.desk.host.close()
        alive = tuple(worker.owner.pid for worker in self.workers if worker.is_alive)
        host = open_host(Path(self.folder.name), SLOTS, alive=alive)
        self.desk = Desk(host, numbers=count(next(self.runs)))
        self.desk.leases.present.clear()
        for block, header in host.orphans:
            self.desk.leases.adopt(header.instance, [block])
        for worker in self.workers:
            worker.is_connected = False
            worker.leases.clear()

    @precondition(lambda self: self.desk.host.pool.leaves)
    @rule(pick=small)
    def evict(self, pick: int) -> None:
        leaves = sorted(self.desk.host.pool.leaves)
        self.desk.host.pool.evict(self.desk.host.pool.leaves[leaves[pick % len(leaves)]], "test")

    # -- what holds after every step -------------------------------------------------------------------
    @invariant()
    def every_slot_is_accounted_for(self) -> None:
        self.desk.check()

    @invariant()
    def what_is_found_is_whole(self) -> None:
        into = bytearray(BLOCK)
        for key, block in self.desk.host.pool.resident.items():
            assert self.desk.host.arena.read(block.page, key, memoryview(into))
            assert bytes(into) == content(key)

    @invariant()
    def slots_that_somebody_alive_may_write_to_are_in_nobody_elses_hands(self) -> None:
        pool = self.desk.host.pool
        for worker in self.workers:
            for mine in worker.reservations.values():
                for _, slot in mine:
                    assert not worker.is_alive or slot in pool.in_flight or slot in pool.quarantined

    @invariant()
    def nothing_is_left_of_whoever_holds_nothing(self) -> None:
        if not any(worker.leases or worker.reservations for worker in self.workers):
            held = [held for held in self.desk.leases.by_instance.values() if held.leases or held.reservations]
            assert not held


LeasesMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestLeasesMachine = LeasesMachine.TestCase
