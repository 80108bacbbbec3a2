"""The disk tier under everything that disks do: full, read-only, broken, cut, flipped, and killed in the middle."""

import errno
import os
import resource
import signal
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import hypothesis.strategies as st
import pytest
from conformance_tiers import NAMESPACE, Clock, chain, incoming
from hypothesis import HealthCheck, given, settings
from small_arenas import BLOCK, SLOTS, in_child

from kvprefetch.errors import ArenaRefused, TierUnavailable
from kvprefetch.tiers.contract import Incoming, Tier
from kvprefetch.tiers.disk import DiskTier
from kvprefetch.tiers.slots import HEADER_BYTES

BLOCKS = {words: incoming(words, BLOCK) for words in ("abc", "pqrst", "xy")}
BYTES = {block.key: bytes(block.data) for blocks in BLOCKS.values() for block in blocks}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "blocks" / "a.blocks"


@pytest.fixture
def tier(path: Path) -> Iterator[DiskTier]:
    tier = opened(path)
    yield tier
    tier.check()
    tier.close()


def opened(path: Path, slots: int = SLOTS) -> DiskTier:
    return DiskTier(path, NAMESPACE, BLOCK, slots, Clock())


def right(tier: Tier) -> list[str]:
    """What it gives is what was stored. The sequences of `BLOCKS`, as far as it has them."""
    found = []
    for words in BLOCKS:
        into = [memoryview(bytearray(BLOCK)) for _ in words]
        count = tier.load(chain(words), into)
        assert [bytes(view) for view in into[:count]] == [BYTES[key] for key in chain(words)[:count]]
        found.append(words[:count])
    return found


class Sick:
    """`os` with a call that fails: from the `after`-th on, `times` times."""

    def __init__(self, name: str, number: int, after: int = 0, times: int = 10**9) -> None:
        self.name, self.number, self.after, self.times, self.calls = name, number, after, times, 0

    def __getattr__(self, name: str) -> object:
        if name != self.name:
            return getattr(os, name)

        def call(*arguments: object) -> object:
            self.calls += 1
            if self.after < self.calls <= self.after + self.times:
                raise OSError(self.number, os.strerror(self.number))
            return getattr(os, name)(*arguments)

        return call


# -- the file --------------------------------------------------------------------------------------------
def test_nobody_else_may_look_into_it(tier: DiskTier, path: Path) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_it_takes_no_more_room_than_its_blocks_and_no_more_than_its_slots(tier: DiskTier, path: Path) -> None:
    assert path.stat().st_blocks * 512 < 3 * BLOCK
    size = path.stat().st_size
    for root in range(5):
        tier.store(incoming("uvwxyz", BLOCK, root=bytes([root])))
    assert path.stat().st_size == size


def test_a_second_service_is_refused(tier: DiskTier, path: Path) -> None:
    with pytest.raises(ArenaRefused, match="another service has"):
        opened(path)


@pytest.mark.parametrize(
    ("namespace", "block_bytes", "slots", "says"),
    [
        ("fedcba9876543210", BLOCK, SLOTS, "belongs to namespace"),
        (NAMESPACE, BLOCK + 8, SLOTS, f"has blocks of {BLOCK} bytes"),
        (NAMESPACE, BLOCK, SLOTS + 1, f"has {SLOTS} slots, the settings ask for {SLOTS + 1}"),
    ],
)
def test_a_file_of_another_kind_is_refused(path: Path, namespace: str, block_bytes: int, slots: int, says: str) -> None:
    opened(path).close()
    with pytest.raises(ArenaRefused, match=says):
        DiskTier(path, namespace, block_bytes, slots, Clock())
    opened(path).close()


def test_a_damaged_file_header_is_refused_in_words(path: Path) -> None:
    opened(path).close()
    with path.open("r+b") as file:
        file.seek(20)
        file.write(b"\xff")
    with pytest.raises(ArenaRefused, match=r"the header of .* is damaged: delete"):
        opened(path)


def test_a_file_that_cannot_be_written_to_is_not_opened(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(path).close()
    monkeypatch.setattr("kvprefetch.tiers.files.os", Sick("open", errno.EROFS, after=1))
    with pytest.raises(TierUnavailable, match="Read-only file system"):
        opened(path)


def test_a_closed_tier_says_so(path: Path) -> None:
    tier = opened(path)
    tier.close()
    for call in (
        lambda: tier.load(chain("a"), [memoryview(bytearray(BLOCK))]),
        lambda: tier.store(BLOCKS["abc"]),
        lambda: tier.discard(chain("a")),
    ):
        with pytest.raises(TierUnavailable, match="was closed"):
            call()


class Slow:
    """`os`, but reading waits until it may go on."""

    def __init__(self) -> None:
        self.reading, self.go_on = threading.Event(), threading.Event()

    def __getattr__(self, name: str) -> object:
        return getattr(os, name)

    def preadv(self, descriptor: int, into: list[memoryview], at: int) -> int:
        self.reading.set()
        self.go_on.wait(5)
        return os.preadv(descriptor, into, at)


def test_closing_waits_for_loads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = opened(path)
    tier.store(BLOCKS["abc"])
    order: list[object] = []
    monkeypatch.setattr("kvprefetch.tiers.disk.os", slow := Slow())
    into = [memoryview(bytearray(BLOCK)) for _ in "abc"]
    loading = threading.Thread(target=lambda: order.append(tier.load(chain("abc"), into)))
    loading.start()
    slow.reading.wait(5)
    closing = threading.Thread(target=lambda: (tier.close(), order.append("closed")))
    closing.start()
    closing.join(0.05)
    assert order == []
    slow.go_on.set()
    loading.join()
    closing.join()
    assert order == [3, "closed"]


def test_blocks_that_are_being_read_are_not_displaced(tier: DiskTier, monkeypatch: pytest.MonkeyPatch) -> None:
    tier.store(BLOCKS["abc"])
    found: list[object] = []
    monkeypatch.setattr("kvprefetch.tiers.disk.os", slow := Slow())
    loading = threading.Thread(target=lambda: found.append(right(tier)))
    loading.start()
    slow.reading.wait(5)
    tier.check()
    assert tier.store(incoming("uvwxyz", BLOCK)) == SLOTS - 3
    assert tier.discard(chain("abc")) == 0
    slow.go_on.set()
    loading.join()
    assert found == [["abc", "", ""]]
    assert tier.usage().counters.get("corrupt", 0) == 0


# -- writing that fails ----------------------------------------------------------------------------------
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("after", range(9))  # three writes a block
def test_a_store_that_fails_at_any_write_breaks_nothing(
    tier: DiskTier, path: Path, monkeypatch: pytest.MonkeyPatch, number: int, after: int
) -> None:
    tier.store(BLOCKS["xy"])
    monkeypatch.setattr("kvprefetch.tiers.disk.os", Sick("pwrite", number, after))
    with pytest.raises(TierUnavailable, match="cannot be written to"):
        tier.store(BLOCKS["abc"])
    assert tier.usage().counters["failed"] == 1
    tier.check()
    whole = "abc"[: after // 3]
    assert right(tier) == [whole, "", "xy"]
    monkeypatch.undo()
    tier.close()
    again = opened(path)
    assert right(again) == [whole, "", "xy"], "nor after a restart"
    assert again.usage().counters["damaged"] == 0
    assert again.store(BLOCKS["abc"]) == 3
    assert right(again) == ["abc", "", "xy"]
    again.check()
    again.close()


@pytest.mark.parametrize("after", range(3))
def test_a_store_that_fails_while_it_replaces_a_block_breaks_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    tier = opened(path)
    tier.store(BLOCKS["pqrst"])
    tier.store(incoming("z", BLOCK))
    with monkeypatch.context() as patch:
        patch.setattr("kvprefetch.tiers.disk.os", Sick("pwrite", errno.EIO, after))
        with pytest.raises(TierUnavailable):
            tier.store(BLOCKS["xy"])
    tier.check()
    assert right(tier) == ["", "pqrs", ""]
    tier.close()
    tier = opened(path)
    assert right(tier)[1] in ("pqrs", "pqrst")
    tier.check()
    tier.close()


def test_a_full_disk_is_survived(small_disk: Path) -> None:
    tier = opened(small_disk / "a.blocks", slots=1000)
    many = [block for root in range(100) for block in incoming("abc", BLOCK, root=bytes([root]))]
    with pytest.raises(TierUnavailable, match="No space left on device"):
        tier.store(many)
    tier.check()
    assert 3 < tier.usage().blocks < 150
    into = [memoryview(bytearray(BLOCK)) for _ in "abc"]
    assert tier.load(chain("abc", root=bytes([0])), into) == 3
    tier.discard(chain("abc", root=bytes([0])))
    assert tier.store(incoming("z", BLOCK)) == 1, "slots that were written to once have their room"
    tier.close()
    tier = opened(small_disk / "a.blocks", slots=1000)
    tier.check()
    assert tier.load(chain("abc", root=bytes([1])), into) == 3
    tier.close()


def test_a_disk_that_is_full_from_the_start_gives_no_tier(path: Path) -> None:
    def start() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        with pytest.raises(TierUnavailable, match="set a smaller size or another folder"):
            opened(path)
        assert not list(path.parent.iterdir())

    assert in_child(start) == 0


def test_discarding_on_a_broken_disk_forgets_nothing(tier: DiskTier, monkeypatch: pytest.MonkeyPatch) -> None:
    tier.store(BLOCKS["abc"])
    monkeypatch.setattr("kvprefetch.tiers.disk.os", Sick("pwrite", errno.EIO))
    with pytest.raises(TierUnavailable, match="cannot be written to"):
        tier.discard(chain("abc"))
    monkeypatch.undo()
    assert tier.find(chain("abc")) == 3


# -- reading that fails ----------------------------------------------------------------------------------
def test_a_sector_that_cannot_be_read_costs_its_block(tier: DiskTier, monkeypatch: pytest.MonkeyPatch) -> None:
    tier.store(BLOCKS["abc"])
    monkeypatch.setattr("kvprefetch.tiers.disk.os", Sick("preadv", errno.EIO, after=1, times=1))
    assert right(tier)[0] == "a"
    monkeypatch.undo()
    assert tier.usage().counters["unreadable"] == 1
    assert tier.find(chain("abc")) == 1
    tier.store(BLOCKS["abc"])
    assert right(tier)[0] == "abc"


def test_a_bad_block_that_cannot_be_freed_is_gone_all_the_same(tier: DiskTier, monkeypatch: pytest.MonkeyPatch) -> None:
    tier.store(BLOCKS["abc"])

    class Dead(Sick):
        def __getattr__(self, name: str) -> object:
            return super().__getattr__("pwrite" if name == "preadv" else name)

    monkeypatch.setattr("kvprefetch.tiers.disk.os", Dead("pwrite", errno.EIO))
    assert right(tier)[0] == ""
    monkeypatch.undo()
    assert tier.find(chain("abc")) == 0


# -- killed ----------------------------------------------------------------------------------------------
def store_and_die(path: Path, writes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight blocks in six slots; the process is killed in the middle of the n-th write."""

    class Deadly:
        left = writes

        def __getattr__(self, name: str) -> object:
            return self.pwrite if name == "pwrite" else getattr(os, name)

        def pwrite(self, descriptor: int, data: memoryview, at: int) -> int:
            if not self.left:
                os.pwrite(descriptor, data[: len(data) // 2], at)
                os.kill(os.getpid(), signal.SIGKILL)
            self.left -= 1
            return os.pwrite(descriptor, data, at)

    tier = opened(path)
    monkeypatch.setattr("kvprefetch.tiers.disk.os", Deadly())
    tier.store(BLOCKS["abc"])
    tier.store(BLOCKS["pqrst"])
    tier.discard(chain("pqrst")[3:])
    tier.store(BLOCKS["xy"])


@pytest.mark.parametrize("writes", range(32))
def test_a_service_killed_at_any_write_leaves_whole_blocks_and_free_slots(
    path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    status = in_child(lambda: store_and_die(path, writes, monkeypatch))
    assert status == -signal.SIGKILL
    tier = opened(path)
    tier.check()
    assert tier.usage().counters["damaged"] <= 1
    found = right(tier)
    assert tier.usage().counters.get("corrupt", 0) == 0
    if 9 <= writes < 15:
        assert found[0] == "abc", "what was stored before is there"
    assert tier.store(BLOCKS["pqrst"]) == 5
    assert right(tier)[1] == "pqrst"
    tier.check()
    tier.close()


# -- damaged files ---------------------------------------------------------------------------------------
def whole_file(path: Path) -> bytes:
    if not path.exists():
        tier = opened(path)
        tier.store(BLOCKS["abc"])
        tier.store(BLOCKS["xy"])
        tier.close()
        path.with_suffix(".saved").write_bytes(path.read_bytes())
    return path.with_suffix(".saved").read_bytes()


few = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(size=st.integers(0, 4096 * 16))
@few
def test_of_a_cut_file_the_rest_is_served(path: Path, size: int) -> None:
    raw = whole_file(path)
    path.write_bytes(raw[:size])
    serve_what_is_left(path)


@given(flips=st.lists(st.tuples(st.integers(0, 4096 * 16), st.integers(0, 7)), min_size=1, max_size=8))
@few
def test_of_a_flipped_file_the_rest_is_served(path: Path, flips: list[tuple[int, int]]) -> None:
    raw = bytearray(whole_file(path))
    for at, bit in flips:
        raw[at % len(raw)] ^= 1 << bit
    path.write_bytes(raw)
    serve_what_is_left(path)


@given(at=st.integers(4096, 4096 * 14), size=st.integers(1, 8192))
@few
def test_what_a_power_cut_left_unwritten_is_not_served(path: Path, at: int, size: int) -> None:
    """The header was on the disk already, its block's bytes were not."""
    raw = bytearray(whole_file(path))
    raw[at : at + size] = bytes(min(size, len(raw) - at))
    path.write_bytes(raw)
    serve_what_is_left(path)


def serve_what_is_left(path: Path) -> None:
    try:
        tier = opened(path)
    except ArenaRefused:
        return
    right(tier)
    tier.check()
    assert tier.store(BLOCKS["abc"]) == 3
    right(tier)
    tier.check()
    tier.close()


@pytest.mark.parametrize("byte", range(0, HEADER_BYTES, 15))
def test_a_damaged_header_is_dropped_and_counted_and_the_rest_is_served(path: Path, byte: int) -> None:
    raw = bytearray(whole_file(path))
    raw[4096 + HEADER_BYTES + byte] ^= 1  # of the slot of "b"
    path.write_bytes(raw)
    tier = opened(path)
    assert right(tier) == ["a", "", "xy"]
    assert tier.usage().counters["damaged"] == 1
    assert tier.find(chain("abc")[2:]) == 1
    tier.close()


def test_blocks_behind_the_end_of_a_cut_file_are_counted(path: Path) -> None:
    raw = whole_file(path)
    tier = opened(path)
    end = tier.layout.slot_at(3) + 17
    tier.close()
    path.write_bytes(raw[:end])
    tier = opened(path)
    assert right(tier) == ["abc", "", ""]
    assert tier.usage().counters["damaged"] == 2
    tier.close()
    tier = opened(path)
    assert path.stat().st_size == tier.layout.file_bytes
    tier.close()


def test_opening_reads_the_table_of_headers_and_nothing_else(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = opened(path, slots=5_000)
    tier.store(BLOCKS["abc"])
    tier.close()
    read = 0

    class Counting:
        def __getattr__(self, name: str) -> object:
            return self.pread if name == "pread" else getattr(os, name)

        def pread(self, descriptor: int, size: int, at: int) -> bytes:
            nonlocal read
            read += size
            return os.pread(descriptor, size, at)

    monkeypatch.setattr("kvprefetch.tiers.disk.os", Counting())
    tier = opened(path, slots=5_000)
    assert read == 5_000 * HEADER_BYTES
    assert right(tier)[0] == "abc"
    tier.close()


def test_of_two_stores_of_one_block_at_once_one_is_kept(tier: DiskTier, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting, go_on = threading.Event(), threading.Event()

    class SlowFirst(Sick):
        def __getattr__(self, name: str) -> object:
            if name == "pwrite" and threading.current_thread() is first:
                waiting.set()
                go_on.wait(5)
            return getattr(os, name)

    first = threading.Thread(target=lambda: tier.store(BLOCKS["abc"][:1]))
    monkeypatch.setattr("kvprefetch.tiers.disk.os", SlowFirst("", 0))
    first.start()
    waiting.wait(5)
    assert tier.store(BLOCKS["abc"]) == 3
    go_on.set()
    first.join()
    tier.check()
    assert tier.usage().blocks == 3
    assert right(tier)[0] == "abc"


# -- threads ---------------------------------------------------------------------------------------------
def test_stores_of_several_threads_keep_one_of_each(tier: DiskTier) -> None:
    """One at a time is promised; several must not break the books."""
    failures: list[BaseException] = []

    def store(blocks: list[Incoming]) -> None:
        try:
            for _ in range(20):
                tier.store(blocks)
                tier.discard([block.key for block in blocks[1:]])
        except BaseException as error:  # noqa: BLE001 - told by the assertion below
            failures.append(error)

    threads = [threading.Thread(target=store, args=(BLOCKS[words],)) for words in ("abc", "abc", "xy")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    tier.check()
    right(tier)
