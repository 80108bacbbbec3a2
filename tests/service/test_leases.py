from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
from arenas import ANN, BOB, CID, Desk, chain, open_host

from kvprefetch.errors import AccountingError, LimitExceeded
from kvprefetch.service.leases import NotPresent, UnknownReservation


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(open_host(tmp_path))
    yield desk
    desk.check()


def test_what_is_written_is_found_once_it_is_committed(desk: Desk) -> None:
    number, slots = desk.reserve(ANN, "abc")
    sums = desk.write("abc", slots)
    assert desk.found("abc") == ""
    desk.check()
    assert len(desk.leases.commit(ANN.instance, number, sums)) == 3
    assert desk.reads("abc") == "abc"
    assert desk.host.pool.free_pages == 5


def test_a_block_is_reserved_by_one_worker_at_a_time(desk: Desk) -> None:
    desk.keep("a")
    number, slots = desk.reserve(ANN, "abc")
    assert slots[0] is None
    assert None not in slots[1:]
    other, theirs = desk.reserve(BOB, "abcd")
    assert theirs[:3] == [None] * 3
    assert theirs[3] is not None
    assert desk.reserve(BOB, "abc") == (0, [None] * 3)
    assert number != other


def test_fewer_checksums_commit_the_leading_blocks_and_abandon_the_rest(desk: Desk) -> None:
    number, slots = desk.reserve(ANN, "abc")
    sums = desk.write("abc", slots)
    assert len(desk.leases.commit(ANN.instance, number, sums[:2])) == 2
    assert desk.reads("abc") == "ab"
    assert desk.host.pool.free_pages == 6


def test_more_checksums_than_slots_change_nothing(desk: Desk) -> None:
    number, slots = desk.reserve(ANN, "ab")
    sums = desk.write("ab", slots)
    with pytest.raises(ValueError, match="3 checksums for 2"):
        desk.leases.commit(ANN.instance, number, [*sums, 1])
    assert len(desk.leases.commit(ANN.instance, number, sums)) == 2


def test_a_reservation_is_committed_once_and_by_its_worker(desk: Desk) -> None:
    number, slots = desk.reserve(ANN, "ab")
    sums = desk.write("ab", slots)
    with pytest.raises(UnknownReservation):
        desk.leases.commit(BOB.instance, number, sums)
    desk.leases.commit(ANN.instance, number, sums)
    with pytest.raises(UnknownReservation, match="do not write to its slots again"):
        desk.leases.commit(ANN.instance, number, sums)


def test_a_lease_keeps_all_blocks_of_its_run(desk: Desk) -> None:
    desk.keep("abcd")
    lease = desk.lease(ANN, "abcd")
    _, slots = desk.reserve(BOB, "stuvwxyz")
    assert len(slots) == 4  # the other four are on lease
    assert desk.reads("abcd") == "abcd"
    desk.check()
    desk.leases.release(ANN.instance, [lease], [], set())
    _, more = desk.reserve(BOB, "123")
    assert len(more) == 3
    assert desk.found("abcd") == "a"


def test_what_is_given_back_twice_or_was_never_there_is_ignored(desk: Desk) -> None:
    desk.keep("ab")
    lease = desk.lease(ANN, "ab")
    number, _ = desk.reserve(ANN, "xy")
    for _ in range(2):
        desk.leases.release(ANN.instance, [lease, 77], [number, 78], {3})
        desk.check()
    desk.leases.release(CID.instance, [lease], [number], {0})
    assert desk.leases.counts()["leases"] == 0
    assert desk.found("ab") == "ab"


def test_another_worker_cannot_give_back_what_is_not_its_own(desk: Desk) -> None:
    desk.keep("ab")
    lease = desk.lease(ANN, "ab")
    number, _ = desk.reserve(ANN, "xy")
    desk.leases.release(BOB.instance, [lease], [number], set())
    counts = desk.leases.counts()
    assert (counts["leases"], counts["reservations"]) == (1, 1)


def test_a_damaged_block_is_found_no_more(desk: Desk) -> None:
    desk.keep("abc")
    lease = desk.lease(ANN, "abc")
    slot = desk.host.pool.resident[chain("ab")[-1]].page
    assert desk.leases.release(ANN.instance, [lease], [], {slot}) == [chain("ab")[-1]]
    assert desk.found("abc") == "a"
    assert desk.keep("ab") == 1
    assert desk.reads("abc") == "abc"


def test_slots_outside_the_lease_are_not_dropped_for_it(desk: Desk) -> None:
    desk.keep("abc")
    desk.keep("xyz")
    lease = desk.lease(ANN, "abc")
    theirs = {block.page for key, block in desk.host.pool.resident.items() if key in chain("xyz")}
    assert desk.leases.release(ANN.instance, [lease], [], theirs) == []
    assert desk.found("xyz") == "xyz"


def test_what_a_vanished_worker_writes_is_quarantined_and_what_it_reads_is_kept(desk: Desk) -> None:
    desk.keep("ab")
    desk.lease(ANN, "ab")
    desk.reserve(ANN, "xyz")
    desk.leases.vanish(ANN.instance)
    desk.check()
    counts = desk.leases.counts()
    assert counts["quarantined_vanished"] == 3
    assert counts["leases_of_vanished"] == 1
    _, slots = desk.reserve(BOB, "12345678")
    assert len(slots) == 3  # of eight: two on lease, three in quarantine
    assert desk.found("ab") == "ab"


def test_who_has_vanished_is_given_nothing(desk: Desk) -> None:
    desk.keep("ab")
    number, slots = desk.reserve(ANN, "xy")
    desk.leases.vanish(ANN.instance)
    with pytest.raises(NotPresent, match=r"Workers\.Work"):
        desk.lease(ANN, "ab")
    with pytest.raises(NotPresent):
        desk.reserve(ANN, "z")
    with pytest.raises(NotPresent):
        desk.leases.commit(ANN.instance, number, desk.write("xy", slots))
    assert desk.leases.counts()["quarantined_vanished"] == 2


def test_what_a_dead_worker_held_is_free(desk: Desk) -> None:
    desk.keep("ab")
    desk.lease(ANN, "ab")
    desk.reserve(ANN, "xyz")
    desk.leases.vanish(ANN.instance)
    desk.leases.died(ANN.instance)
    desk.check()
    assert desk.leases.counts() == {
        "leases": 0,
        "leases_of_vanished": 0,
        "reservations": 0,
        "quarantined_vanished": 0,
        "quarantined_orphaned": 0,
        "readmitted_died": 3,
        "readmitted_returned": 0,
    }
    _, slots = desk.reserve(BOB, "12345678")
    assert len(slots) == 8


def test_one_that_dies_before_it_vanishes_is_cleared_up_as_well(desk: Desk) -> None:
    desk.reserve(ANN, "xyz")
    desk.leases.died(ANN.instance)
    desk.leases.vanish(ANN.instance)
    assert desk.host.pool.free_pages == 8
    assert desk.leases.freed["slots_died"] == 3


def test_a_worker_that_returns_goes_on_with_what_it_lists(desk: Desk) -> None:
    desk.keep("ab")
    kept, lost = desk.lease(ANN, "ab"), desk.lease(ANN, "a")
    mine, slots = desk.reserve(ANN, "xy")
    desk.reserve(ANN, "12")
    desk.leases.vanish(ANN.instance)
    desk.leases.returned(ANN.instance, [kept], [mine])
    desk.check()
    counts = desk.leases.counts()
    assert (counts["leases"], counts["reservations"], counts["readmitted_returned"]) == (1, 1, 2)
    assert lost not in desk.leases.by_instance[ANN.instance].leases
    assert len(desk.leases.commit(ANN.instance, mine, desk.write("xy", slots))) == 2
    assert desk.reads("xy") == "xy"


def test_a_block_in_quarantine_may_be_written_by_somebody_else_meanwhile(desk: Desk) -> None:
    """Whoever comes first is found; the other's slot is freed when it commits."""
    mine, slots = desk.reserve(ANN, "ab")
    desk.leases.vanish(ANN.instance)
    assert desk.keep("ab", BOB) == 2
    desk.leases.returned(ANN.instance, [], [mine])
    desk.check()
    assert len(desk.leases.commit(ANN.instance, mine, desk.write("ab", slots))) == 2
    assert desk.reads("ab") == "ab"
    assert desk.host.pool.free_pages == 6


def test_a_workers_leases_and_reservations_are_bounded(tmp_path: Path) -> None:
    desk = Desk(open_host(tmp_path), most_leases=2, most_reservations=1)
    desk.keep("a")
    for _ in range(2):
        desk.lease(ANN, "a")
    with pytest.raises(LimitExceeded, match="release those"):
        desk.lease(ANN, "a")
    desk.lease(BOB, "a")
    desk.reserve(ANN, "x")
    with pytest.raises(LimitExceeded, match="commit or release"):
        desk.reserve(ANN, "y")
    desk.check()


def test_the_next_run_of_the_service_quarantines_what_living_workers_had_reserved(tmp_path: Path) -> None:
    first = Desk(open_host(tmp_path))
    first.keep("ab")
    lease = first.lease(ANN, "ab")
    number, _ = first.reserve(ANN, "xyz")
    first.reserve(BOB, "12")
    first.host.close()

    second = restarted(tmp_path, alive=(ANN.pid,))
    assert second.reads("ab") == "ab"
    assert second.leases.counts()["quarantined_orphaned"] == 3  # bob's are free: he is dead
    second.leases.returned(ANN.instance, [lease], [number])
    second.check()
    assert second.leases.counts()["quarantined_orphaned"] == 3  # it may still write to them
    with pytest.raises(UnknownReservation):
        second.leases.commit(ANN.instance, number, [1, 2, 3])
    second.check()
    assert second.host.pool.free_pages == 6


def test_orphaned_slots_are_free_when_their_worker_does_not_list_them(tmp_path: Path) -> None:
    first = Desk(open_host(tmp_path))
    first.reserve(ANN, "xyz")
    first.host.close()
    second = restarted(tmp_path, alive=(ANN.pid,))
    second.leases.returned(ANN.instance, [], [])
    second.check()
    assert second.host.pool.free_pages == 8


def test_orphaned_slots_are_free_when_their_worker_gives_them_back_or_dies(tmp_path: Path) -> None:
    first = Desk(open_host(tmp_path))
    number, _ = first.reserve(ANN, "xyz")
    first.reserve(BOB, "12")
    first.host.close()
    second = restarted(tmp_path, alive=(ANN.pid, BOB.pid))
    second.leases.returned(ANN.instance, [], [number])
    second.leases.release(ANN.instance, [], [number], set())
    second.check()
    assert second.leases.counts()["quarantined_orphaned"] == 2
    second.leases.died(BOB.instance)
    second.check()
    assert second.host.pool.free_pages == 8


def test_the_proof_sees_a_slot_that_is_nobodys(desk: Desk) -> None:
    desk.reserve(ANN, "xyz")
    desk.leases.vanish(ANN.instance)
    held = desk.leases.by_instance.pop(ANN.instance)
    with pytest.raises(AccountingError, match="quarantined"):
        desk.check()
    desk.leases.by_instance[ANN.instance] = held


def restarted(folder: Path, alive: tuple[int, ...]) -> Desk:
    """The service's next run: the workers have not registered with it yet."""
    desk = Desk(open_host(folder, alive=alive), numbers=count(1_000))
    desk.leases.present.clear()
    for block, header in desk.host.orphans:
        desk.leases.adopt(header.instance, [block])
    desk.check()
    return desk
