"""Who may read which slots of one arena, and who may write to which. Pure: no clock, no I/O.

Promises
- A lease keeps a run of blocks where they are: it holds the run's tail, which keeps all before it.
- A reservation is its worker's alone to write, in order, until it is committed or given back.
- `vanish`: the worker's slots are quarantined and its leases kept, for it may live on, stopped or cut off. Only
  `died` (it is proved dead), `returned` (it says what it still holds) and its own `release` free them.
- Only a worker that is present (it has `returned`, and neither vanished nor died since) is given anything.
- What is unknown is ignored, save by `commit`. One worker's leases and reservations are bounded (LimitExceeded).
- Numbers are drawn from `numbers`; a restarted service must draw others, so that old ones are unknown to it.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from kvprefetch.cache.block import Block, State
from kvprefetch.cache.keys import BlockKey
from kvprefetch.errors import AccountingError, LimitExceeded
from kvprefetch.tiers.host import HostTier
from kvprefetch.tiers.slots import Owner


@dataclass(eq=False, slots=True)
class Lease:
    """A holder of the pool's."""

    number: int
    instance: bytes
    blocks: list[Block]  # the run's tails


@dataclass(eq=False, slots=True)
class Reservation:
    """A holder of the pool's, while its worker is there."""

    number: int
    instance: bytes
    writing: list[Block]
    blocks: list[Block]  # the same; none of them while its worker has vanished, and the slots are quarantined

    @property
    def is_doubtful(self) -> bool:
        return not self.blocks


@dataclass(eq=False, slots=True)
class Orphans:
    """Slots that a worker had reserved from an earlier run of the service; quarantined, held by nobody."""

    blocks: list[Block]
    listed: set[int] = field(default_factory=set)  # reservations of that run which it may still write to


@dataclass(eq=False, slots=True)
class Held:
    """All of one worker."""

    leases: dict[int, Lease] = field(default_factory=dict)
    reservations: dict[int, Reservation] = field(default_factory=dict)
    orphans: Orphans | None = None


class UnknownReservation(LookupError):
    """None of this worker has that number."""


class NotPresent(LookupError):
    """No worker with this instance is registered now."""


class Leases:
    """See the module's promises."""

    def __init__(
        self, host: HostTier, numbers: Iterator[int], *, most_leases: int = 4_096, most_reservations: int = 1_024
    ) -> None:
        self.host, self.pool, self.numbers = host, host.pool, numbers
        self.most_leases, self.most_reservations = most_leases, most_reservations
        self.present: set[bytes] = set()
        self.by_instance: dict[bytes, Held] = {}
        self.readmitted: Counter[str] = Counter()  # slots out of quarantine, by why
        self.freed: Counter[str] = Counter()  # leases, and slots that were not in quarantine, by what happened to whom

    # -- what workers ask for --------------------------------------------------------------------------
    def lease(self, instance: bytes, tails: list[Block]) -> int:
        """Hold the run with these tails; the lease's number. Raises LimitExceeded, NotPresent."""
        held = self._held_by(instance)
        if len(held.leases) >= self.most_leases:
            raise LimitExceeded(f"this worker holds {len(held.leases)} leases: release those whose copies are done")
        lease = Lease(next(self.numbers), instance, tails)
        self.pool.hold(lease.blocks)
        self.pool.holders.add(lease)
        held.leases[lease.number] = lease
        return lease.number

    def reserve(
        self,
        owner: Owner,
        parent: BlockKey,
        keys: Sequence[BlockKey],
        tenant: str,
        *,
        now: float,
        speculative_until: float | None = None,
    ) -> tuple[int, list[Block | None]]:
        """Slots for a leading part of `keys`; None where somebody holds or writes that block already.

        The reservation's number is 0 if there is nothing to write. Raises LimitExceeded, NotPresent.
        """
        held = self._held_by(owner.instance)
        if len(held.reservations) >= self.most_reservations:
            raise LimitExceeded(f"this worker has {len(held.reservations)} reservations: commit or release some")
        blocks = self.host.reserve(keys, parent, tenant, owner, now=now, speculative_until=speculative_until)
        writing = [block for block in blocks if block is not None]
        if not writing:
            self._forget_if_empty(owner.instance)
            return 0, blocks
        reservation = Reservation(next(self.numbers), owner.instance, writing, writing)
        self.pool.holders.add(reservation)
        held.reservations[reservation.number] = reservation
        return reservation.number, blocks

    def commit(self, instance: bytes, number: int, checksums: Sequence[int]) -> list[Block]:
        """Let others find the leading blocks of a reservation, one for each checksum; the rest is abandoned.

        Returns what can be found from now on, unheld. Raises NotPresent, UnknownReservation; ValueError, having
        changed nothing, for more checksums than blocks.
        """
        held = self._held_by(instance)
        reservation = held.reservations.get(number)
        if reservation is None:
            self._forget_if_empty(instance)
            self._settle_orphans(instance, {number})
            raise UnknownReservation(f"reservation {number} is unknown: do not write to its slots again")
        if len(checksums) > len(reservation.writing):
            raise ValueError(f"{len(checksums)} checksums for {len(reservation.writing)} reserved slots")
        self._resume(reservation)
        del held.reservations[number]
        self.pool.holders.discard(reservation)
        written, rest = reservation.writing[: len(checksums)], reservation.writing[len(checksums) :]
        sealed = [self.host.seal(block, checksum) for block, checksum in zip(written, checksums, strict=True)]
        for block in rest:
            self.host.abandon(block)
        self.pool.release(reversed(sealed))
        self._forget_if_empty(instance)
        return sealed

    def release(
        self, instance: bytes, leases: Iterable[int], reservations: Iterable[int], corrupt: set[int]
    ) -> list[BlockKey]:
        """Give back. Of the slots of these leases, `corrupt` had wrong bytes; the blocks that were dropped for it."""
        held = self.by_instance.get(instance)
        if held is None:
            return []
        dropped: list[BlockKey] = []
        for number in leases:
            lease = held.leases.pop(number, None)
            if lease is not None:
                dropped += self._drop(lease, corrupt) if corrupt else []
                self._let_go(lease)
        numbers = set(reservations)
        for number in numbers:
            reservation = held.reservations.pop(number, None)
            if reservation is not None:
                self._abandon(reservation)
        self._settle_orphans(instance, numbers)
        self._forget_if_empty(instance)
        return dropped

    # -- what happens to workers -----------------------------------------------------------------------
    def vanish(self, instance: bytes) -> None:
        """Its stream broke: nobody may use its slots, until one of the next two."""
        self.present.discard(instance)
        held = self.by_instance.get(instance)
        if held is None:
            return
        for reservation in held.reservations.values():
            if not reservation.is_doubtful:
                for block in reservation.writing:
                    self.host.quarantine(block)
                reservation.blocks = []

    def died(self, instance: bytes) -> None:
        """Its process is proved dead: all that it held is free."""
        self.present.discard(instance)
        held = self.by_instance.pop(instance, None)
        if held is None:
            return
        for lease in held.leases.values():
            self._let_go(lease)
        self.freed["leases_died"] += len(held.leases)
        for reservation in held.reservations.values():
            self.freed["slots_died"] += 0 if reservation.is_doubtful else len(reservation.writing)
            self._abandon(reservation, "died")
        if held.orphans is not None:
            self._readmit(held.orphans.blocks, "died")

    def returned(self, instance: bytes, leases: Iterable[int], reservations: Iterable[int]) -> None:
        """It is back and says what it holds: all else is given back.

        Reservations that we do not know were made by an earlier run of the service: while it lists any, what it had
        reserved then stays in quarantine.
        """
        self.present.add(instance)
        held = self.by_instance.get(instance)
        if held is None:
            return
        for lost in held.leases.keys() - set(leases):
            self._let_go(held.leases.pop(lost))
            self.freed["leases_returned"] += 1
        still = set(reservations)
        for number in held.reservations.keys() - still:
            self._abandon(held.reservations.pop(number), "returned")
        for reservation in held.reservations.values():
            self._resume(reservation)
        if held.orphans is not None:
            held.orphans.listed = still - held.reservations.keys()
            self._settle_orphans(instance, set())
        self._forget_if_empty(instance)

    def adopt(self, instance: bytes, blocks: Sequence[Block]) -> None:
        """At start: quarantined slots that this living worker had reserved from an earlier run of the service."""
        held = self.by_instance.setdefault(instance, Held())
        if held.orphans is None:
            held.orphans = Orphans([])
        held.orphans.blocks.extend(blocks)

    # -- figures and proof -----------------------------------------------------------------------------
    def counts(self) -> dict[str, int]:
        """What is held now: leases, reservations, and quarantined slots by why."""
        holders = self.by_instance.values()
        vanished = [held for instance, held in self.by_instance.items() if instance not in self.present]
        return {
            "leases": sum(len(held.leases) for held in holders),
            "leases_of_vanished": sum(len(held.leases) for held in vanished),
            "reservations": sum(len(held.reservations) for held in holders),
            "quarantined_vanished": sum(
                len(r.writing) for held in holders for r in held.reservations.values() if r.is_doubtful
            ),
            "quarantined_orphaned": sum(len(held.orphans.blocks) for held in holders if held.orphans),
            "readmitted_died": self.readmitted["died"],
            "readmitted_returned": self.readmitted["returned"],
        }

    def check(self) -> None:
        """Prove that every slot that is written or quarantined is somebody's, or raise AccountingError."""
        writing, doubtful = Counter[int](), Counter[int]()
        for held in self.by_instance.values():
            for reservation in held.reservations.values():
                (doubtful if reservation.is_doubtful else writing).update(b.page for b in reservation.writing)
            if held.orphans is not None:
                doubtful.update(block.page for block in held.orphans.blocks)
        for name, ours in (("quarantined", doubtful), ("being written", writing)):
            twice = [page for page, times in ours.items() if times > 1]
            if twice:
                raise AccountingError(f"slots {twice} are {name} by several workers")
        if doubtful.keys() != self.pool.quarantined.keys():
            raise AccountingError(
                f"quarantined slots {set(self.pool.quarantined)} are not the workers' {set(doubtful)}"
            )
        if not writing.keys() <= self.pool.in_flight.keys():
            raise AccountingError(f"reserved slots {set(writing)} are not all of those in flight")

    # -- within ----------------------------------------------------------------------------------------
    def _held_by(self, instance: bytes) -> Held:
        if instance not in self.present:
            raise NotPresent(f"worker {instance[:4].hex()} is not registered: open a Workers.Work stream first")
        return self.by_instance.setdefault(instance, Held())

    def _drop(self, lease: Lease, corrupt: set[int]) -> list[BlockKey]:
        """Put those of the leased blocks that lie in slots `corrupt` out of the index."""
        held = (block for tail in lease.blocks for block in chain_of(tail))
        bad = {block.page: block for block in held if block.page in corrupt and block.state is State.RESIDENT}
        for page, block in bad.items():
            self.host.drop(page, block.key)
        return [block.key for block in bad.values()]

    def _let_go(self, lease: Lease) -> None:
        self.pool.holders.discard(lease)
        self.pool.release(lease.blocks)

    def _abandon(self, reservation: Reservation, why: str = "returned") -> None:
        self.pool.holders.discard(reservation)
        if reservation.is_doubtful:
            self._readmit(reservation.writing, why)
        else:
            for block in reservation.writing:
                self.host.abandon(block)

    def _resume(self, reservation: Reservation) -> None:
        if reservation.is_doubtful:
            for block in reservation.writing:
                self.host.resume(block)
            reservation.blocks = reservation.writing

    def _settle_orphans(self, instance: bytes, given_back: set[int]) -> None:
        """What a worker that is back had reserved from an earlier run is free once it lists none of that run."""
        held = self.by_instance.get(instance)
        if held is None or held.orphans is None or instance not in self.present:
            return
        held.orphans.listed -= given_back
        if not held.orphans.listed:
            self._readmit(held.orphans.blocks, "returned")
            held.orphans = None

    def _readmit(self, blocks: Iterable[Block], why: str) -> None:
        for block in blocks:
            self.host.readmit(block)
            self.readmitted[why] += 1

    def _forget_if_empty(self, instance: bytes) -> None:
        held = self.by_instance.get(instance)
        if held is not None and not (held.leases or held.reservations or held.orphans):
            del self.by_instance[instance]


def chain_of(last: Block) -> Iterator[Block]:
    """The blocks of a sequence from its last to its first."""
    block: Block | None = last
    while block is not None:
        yield block
        block = block.parent
