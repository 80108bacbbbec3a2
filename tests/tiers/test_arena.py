"""The arena's file: who may open it, what is refused and in which words, and what its readers can rely on."""

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
from small_arenas import BLOCK, NAMESPACE, SLOTS, create, in_child, sealed

from kvprefetch.errors import ArenaRefused, TierUnavailable
from kvprefetch.tiers.arena import ArenaFile
from kvprefetch.tiers.slots import SlotHeader, SlotState, decode

KEY = sha256(b"key").digest()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "arenas" / "a.arena"


def test_service_and_worker_see_the_same_bytes(path: Path) -> None:
    service = create(path)
    worker = ArenaFile.attach(path, NAMESPACE)
    data = memoryview(os.urandom(BLOCK))
    checksum = worker.write(3, data)
    assert not worker.read(3, KEY, memoryview(bytearray(BLOCK))), "it is not sealed yet"
    service.write_header(3, sealed(KEY, checksum))
    into = memoryview(bytearray(BLOCK))
    assert worker.read(3, KEY, into)
    assert into == data
    assert service.slot(3) == data
    assert worker.header(3) == sealed(KEY, checksum)
    worker.close()
    service.close()


def test_slots_lie_apart_and_all_in_one_buffer(path: Path) -> None:
    arena = create(path)
    assert arena.slot_bytes % 4096 == 0
    assert arena.slot_bytes >= BLOCK
    assert arena.buffer.nbytes == SLOTS * arena.slot_bytes
    for slot in range(SLOTS):
        arena.slot(slot)[:] = bytes([slot + 1]) * BLOCK
    for slot in range(SLOTS):
        assert arena.buffer[slot * arena.slot_bytes : slot * arena.slot_bytes + BLOCK] == bytes([slot + 1]) * BLOCK
    assert all(arena.header(slot) == SlotHeader(SlotState.FREE) for slot in range(SLOTS)), "headers lie elsewhere"
    arena.close()


def test_nobody_else_may_look_into_it(path: Path) -> None:
    create(path).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_it_is_backed_from_the_start(path: Path) -> None:
    create(path, prefault=True).close()
    assert path.stat().st_blocks * 512 >= path.stat().st_size


def test_what_was_got_is_said_once(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "kvprefetch.tiers"):
        create(path, prefault=True, huge_pages=True, lock=True).close()
    (record,) = caplog.records
    assert "prefaulted: yes" in record.message
    assert "huge pages: " in record.message
    assert "locked: yes" in record.message or "locked: refused" in record.message
    assert record.levelname == ("WARNING" if "refused" in record.message else "INFO")


def test_locking_that_is_refused_is_said_and_no_error() -> None:
    """As a user who may lock nothing: nobody, where the tests run as root."""
    code = (
        "import logging, os, resource, shutil, tempfile; from kvprefetch.tiers.arena import ArenaFile\n"
        "logging.basicConfig(level=logging.INFO)\n"
        "resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))\n"
        "if not os.geteuid(): os.setuid(65534)\n"
        "folder = tempfile.mkdtemp(dir='/tmp')\n"
        "try: ArenaFile.create(folder + '/a.arena', 'n', 4096, 4, lock=True).close()\n"
        "finally: shutil.rmtree(folder)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "WARNING" in done.stderr
    assert "locked: refused (" in done.stderr


# -- what is refused -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("namespace", "block_bytes", "slots", "says"),
    [
        ("fedcba9876543210", BLOCK, SLOTS, "belongs to namespace 0123456789abcdef, not fedcba9876543210"),
        (NAMESPACE, BLOCK + 8, SLOTS, f"has blocks of {BLOCK} bytes, not {BLOCK + 8}"),
        (NAMESPACE, BLOCK, SLOTS + 1, f"has {SLOTS} slots, the settings ask for {SLOTS + 1}: set the size back, or"),
    ],
)
def test_a_file_of_another_kind_is_refused(path: Path, namespace: str, block_bytes: int, slots: int, says: str) -> None:
    create(path).close()
    before = path.read_bytes()
    with pytest.raises(ArenaRefused, match=says) as refused:
        ArenaFile.create(path, namespace, block_bytes, slots)
    assert f"delete {path}" in str(refused.value)
    assert path.read_bytes() == before
    create(path).close()


def test_a_worker_does_not_attach_to_another_models_arena(path: Path) -> None:
    create(path).close()
    with pytest.raises(ArenaRefused, match="belongs to namespace"):
        ArenaFile.attach(path, "fedcba9876543210")


def test_a_worker_without_an_arena_is_told_why(path: Path) -> None:
    with pytest.raises(TierUnavailable, match="must run as one user and see the same folder"):
        ArenaFile.attach(path, NAMESPACE)


def another_version(raw: bytearray) -> None:
    from kvprefetch.tiers.checksum import checksum

    raw[16] += 1
    raw[104:112] = checksum(bytes(raw[:104])).to_bytes(8, "little")


def another_magic(raw: bytearray) -> None:
    raw[:16] = b"something else.."


def a_flip(raw: bytearray) -> None:
    raw[30] ^= 4


def nothing_left(raw: bytearray) -> None:
    raw.clear()


def half_a_header(raw: bytearray) -> None:
    del raw[50:]


def a_cut(raw: bytearray) -> None:
    del raw[-1:]


def more_than_there_was(raw: bytearray) -> None:
    raw += b"x"


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (another_version, "has layout version 2, this kvprefetch has 1"),
        (another_magic, "is no arena file of kvprefetch"),
        (a_flip, "the header of .* is damaged"),
        (nothing_left, "is too short"),
        (half_a_header, "is too short"),
        (a_cut, "something has cut it"),
        (more_than_there_was, "something has cut it"),
    ],
)
def test_a_file_that_is_not_right_is_refused(path: Path, spoil: Callable[[bytearray], None], says: str) -> None:
    create(path).close()
    raw = bytearray(path.read_bytes())
    spoil(raw)
    path.write_bytes(raw)
    for opening in (lambda: create(path), lambda: ArenaFile.attach(path, NAMESPACE)):
        with pytest.raises(ArenaRefused, match=says) as refused:
            opening()
        assert "delete" in str(refused.value)
    path.unlink()
    create(path).close()


def test_every_flip_in_the_file_header_is_noticed(path: Path) -> None:
    create(path).close()
    raw = path.read_bytes()
    for at in range(112):
        flipped = bytearray(raw)
        flipped[at] ^= 1 << at % 8
        path.write_bytes(flipped)
        with pytest.raises(ArenaRefused):
            create(path)


def test_a_link_and_a_folder_where_others_may_write_are_refused(path: Path) -> None:
    create(path).close()
    link = path.with_name("link.arena")
    link.symlink_to(path)
    with pytest.raises(TierUnavailable, match="link"):
        create(link)
    link.unlink()
    path.parent.chmod(0o777)
    with pytest.raises(ArenaRefused, match="others may write to the folder"):
        create(path)


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TierUnavailable, match="cannot be made"):
        create(tmp_path / "file" / "a.arena")


def test_a_full_file_system_is_an_error_and_leaves_nothing(small_disk: Path) -> None:
    path = small_disk / "a.arena"
    with pytest.raises(TierUnavailable, match=r"the file system has \d+ bytes left\): set a smaller size"):
        ArenaFile.create(path, NAMESPACE, 4096, 4096)
    with pytest.raises(TierUnavailable, match="the file system has"):
        ArenaFile.create(path, NAMESPACE, 4096, 200, huge_pages=False, prefault=False)  # sparse, it would go in
    assert list(small_disk.iterdir()) == []
    ArenaFile.create(path, NAMESPACE, 4096, 32).close()


@pytest.mark.parametrize("prefault", [True, False])
def test_memory_that_runs_out_while_it_is_taken_is_an_error_too(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, prefault: bool
) -> None:
    """Somebody else was faster than the check."""
    monkeypatch.setattr("kvprefetch.tiers.mapped._require_space", lambda descriptor, size: None)
    with pytest.raises(TierUnavailable, match=r"too little memory|No space left"):
        ArenaFile.create(small_disk / "a.arena", NAMESPACE, 4096, 4096, prefault=prefault)
    assert list(small_disk.iterdir()) == []


# -- two services ----------------------------------------------------------------------------------------
def test_a_second_service_is_refused_until_the_first_has_gone(path: Path) -> None:
    first = create(path)
    with pytest.raises(ArenaRefused, match=r"another service has .*: stop it"):
        create(path)
    first.close()
    create(path).close()


def test_views_that_live_on_do_not_keep_the_file(path: Path) -> None:
    first = create(path)
    view = first.slot(2)
    view[:4] = b"kept"
    first.close()
    first.close()
    assert view[:4] == b"kept"
    second = create(path)
    assert second.slot(2)[:4] == b"kept"
    second.close()


def test_a_killed_service_leaves_the_file_to_the_next(path: Path) -> None:
    code = (
        "import sys, time; from kvprefetch.tiers.arena import ArenaFile\n"
        f"arena = ArenaFile.create(sys.argv[1], '{NAMESPACE}', {BLOCK}, {SLOTS}); print('open', flush=True)\n"
        "time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    with pytest.raises(ArenaRefused, match="another service"):
        create(path)
    process.kill()
    process.wait()
    process.stdout.close()
    create(path).close()


def test_of_services_that_start_at_once_one_gets_it(path: Path) -> None:
    code = (
        "import sys, time; from kvprefetch.tiers.arena import ArenaFile; from kvprefetch.errors import ArenaRefused\n"
        "sys.stdin.readline()\n"
        "try:\n"
        f"    arena = ArenaFile.create(sys.argv[1], '{NAMESPACE}', {BLOCK}, {SLOTS})\n"
        "except ArenaRefused: print('refused', flush=True)\n"
        "else: print('open', flush=True); sys.stdin.readline()\n"
    )
    command = [sys.executable, "-c", code, str(path)]
    everyone = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) for _ in range(4)
    ]
    for one in everyone:
        assert one.stdin is not None
        one.stdin.write("go\n")
    answers = [one.stdout.readline().strip() for one in everyone if one.stdout is not None]
    for one in everyone:
        one.communicate()
    assert sorted(answers) == ["open", "refused", "refused", "refused"]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_service_killed_while_it_makes_the_file_leaves_none(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> None:
        def killed(descriptor: int, size: int, **options: object) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr("kvprefetch.tiers.arena.map_file", killed)
        create(path)

    assert in_child(make) == -signal.SIGKILL
    assert not path.exists()
    create(path).close()
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_header_is_invalid_while_it_is_written_and_its_state_comes_last(path: Path) -> None:
    arena = create(path)
    arena.write_header(2, sealed(KEY, 1))
    mapping, at = arena._mapping, arena.layout.header_at(2)
    assert mapping is not None
    seen: list[SlotHeader | None] = []
    stores: list[object] = []

    class Watched:
        def __setitem__(self, where: int | slice, value: int | bytes) -> None:
            stores.append(where)
            mapping[where] = value  # type: ignore[index]
            seen.append(decode(mapping[at : at + 256]))

    arena._mapping = Watched()  # type: ignore[assignment]
    arena.write_header(2, sealed(KEY, 2))
    arena._mapping = mapping
    assert seen == [None, None, sealed(KEY, 2)]
    assert stores[-1] == at
    arena.close()


# -- reading ---------------------------------------------------------------------------------------------
def test_a_block_is_read_only_under_its_key_sealed_and_whole(path: Path) -> None:
    arena = create(path)
    data = memoryview(bytearray(os.urandom(BLOCK)))
    whole = sealed(KEY, arena.write(0, data))
    into = memoryview(bytearray(BLOCK))
    for header in (
        SlotHeader(SlotState.FREE),
        SlotHeader(SlotState.RESERVED, KEY, length=BLOCK, checksum=whole.checksum),
        sealed(sha256(b"another").digest(), whole.checksum),
        sealed(KEY, whole.checksum, length=BLOCK - 1),
        sealed(KEY, whole.checksum ^ 1),
    ):
        arena.write_header(0, header)
        assert not arena.read(0, KEY, into)
        assert not arena.holds(0, KEY)
    arena.write_header(0, whole)
    assert arena.read(0, KEY, into)
    assert arena.holds(0, KEY)
    arena.slot(0)[BLOCK - 1] ^= 1
    assert not arena.read(0, KEY, into)
    assert not arena.holds(0, KEY)
    assert arena.holds(0, KEY, verify=False)
    assert arena.read(0, KEY, into, verify=False), "as was asked for"
    arena.close()


def test_a_slot_that_changed_while_it_was_copied_is_not_taken(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same key again, but later: only the sequence tells."""
    arena = create(path)
    data = memoryview(bytearray(os.urandom(BLOCK)))
    arena.write_header(0, sealed(KEY, arena.write(0, data), sequence=1))
    into = memoryview(bytearray(BLOCK))
    assert arena.read(0, KEY, into, verify=False)

    def change(*_: object) -> None:
        arena.write_header(0, sealed(KEY, 0, sequence=2))

    monkeypatch.setattr("kvprefetch.tiers.arena.ctypes.memmove", change)
    assert not arena.read(0, KEY, into, verify=False)
    arena.close()


def test_every_flip_in_a_slots_header_makes_its_block_unreadable(path: Path) -> None:
    arena = create(path)
    arena.write_header(0, sealed(KEY, arena.write(0, memoryview(os.urandom(BLOCK)))))
    into, at = memoryview(bytearray(BLOCK)), arena.layout.header_at(0)
    assert arena._mapping is not None
    for byte in range(256):
        arena._mapping[at + byte] ^= 1 << byte % 8
        assert not arena.read(0, KEY, into)
        arena._mapping[at + byte] ^= 1 << byte % 8
    assert arena.read(0, KEY, into)
    arena.close()


def test_what_is_no_slot_and_what_is_closed_is_no_memory_of_ours(path: Path) -> None:
    arena = create(path)
    into = memoryview(bytearray(BLOCK))
    calls: list[Callable[[int], object]] = [
        arena.header,
        arena.slot,
        lambda slot: arena.read(slot, KEY, into),
        lambda slot: arena.write(slot, into),
        lambda slot: arena.write_header(slot, sealed(KEY, 0)),
    ]
    for call in calls:
        for slot in (-1, SLOTS):
            with pytest.raises(TierUnavailable, match="no slot"):
                call(slot)
    with pytest.raises(ValueError, match=f"blocks have {BLOCK} bytes"):
        arena.write(0, into[1:])
    with pytest.raises(ValueError, match=f"blocks have {BLOCK} bytes"):
        arena.read(0, KEY, into[1:])
    arena.close()
    for call in calls:
        with pytest.raises(TierUnavailable, match="was closed"):
            call(0)


WRITER = """
import sys
from hashlib import sha256
from kvprefetch.tiers.arena import ArenaFile
from kvprefetch.tiers.slots import SlotHeader, SlotState, decode
path, namespace, block, slots = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
arena = ArenaFile.create(path, namespace, block, slots)
print("open", flush=True)
number = 0
while True:  # no leases: every slot is written to as fast as that goes
    number += 1
    slot, key = number % slots, sha256(bytes([number * 7 % 5])).digest()
    arena.write_header(slot, SlotHeader(SlotState.RESERVED, key, sequence=number, length=block))
    checksum = arena.write(slot, memoryview(bytearray(number.to_bytes(8, "little") * (block // 8))))
    arena.write_header(slot, SlotHeader(SlotState.SEALED, key, sequence=number, length=block, checksum=checksum))
"""


@pytest.mark.parametrize("verify", [True, False])
def test_a_reader_never_takes_a_half_written_block(path: Path, verify: bool) -> None:
    """Against a writer that respects no lease. Without verification too, where stores stay in order (x86)."""
    if not verify and os.uname().machine != "x86_64":
        pytest.skip("this machine may reorder")
    block, slots = 64 * 1024, 3
    command = [sys.executable, "-c", WRITER, str(path), NAMESPACE, str(block), str(slots)]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert writer.stdout is not None
    try:
        writer.stdout.readline()
        arena = ArenaFile.attach(path, NAMESPACE)
        into = memoryview(bytearray(block))
        keys = [sha256(bytes([number])).digest() for number in range(5)]
        taken, until = 0, time.monotonic() + 1.0
        while time.monotonic() < until:
            for slot in range(slots):
                for key in keys:
                    if arena.read(slot, key, into, verify=verify):
                        taken += 1
                        assert bytes(into) == bytes(into[:8]) * (block // 8)
                        number = int.from_bytes(into[:8], "little")
                        assert (number % slots, keys[number * 7 % 5]) == (slot, key)
        assert taken, "it was quick enough at least once"
        arena.close()
    finally:
        writer.kill()
        writer.wait()
        writer.stdout.close()
