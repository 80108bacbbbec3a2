"""Bad input that no other test sends to a running service: each is a status code and a line that says what to do."""

import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from services import TestWorker, calling, running, small

from kvprefetch.tiers.checksum import checksum

FIELDS = struct.calcsize("<16sIIQQ64s")  # of a file's header, before its checksum
CODE = grpc.StatusCode


def another_version(raw: bytearray) -> None:
    struct.pack_into("<I", raw, 16, 2)
    struct.pack_into("<Q", raw, FIELDS, checksum(bytes(raw[:FIELDS])))


def flipped(raw: bytearray) -> None:
    raw[20] ^= 1


def something_else(raw: bytearray) -> None:
    raw[:16] = b"somebody's notes"


def cut(raw: bytearray) -> None:
    del raw[len(raw) // 2 :]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (another_version, "layout version 2, this kvprefetch has 1"),
        (flipped, "damaged"),
        (something_else, "no arena file"),
        (cut, "cut"),
    ],
)
def test_an_arena_that_must_not_be_used_is_named_with_what_to_do_and_works_again_without_it(
    tmp_path: Path, spoil: Callable[[bytearray], None], says: str
) -> None:
    with running(small(tmp_path)) as service, calling(service.address) as channel:
        worker = TestWorker(channel)
        path = Path(worker.wait_for("registered")[0].arena)
        worker.leave()
    raw = bytearray(path.read_bytes())
    spoil(raw)
    path.write_bytes(raw)
    with running(small(tmp_path)) as service, calling(service.address) as channel:
        refused = TestWorker(channel)
        assert refused.error is not None
        assert refused.error.code() is CODE.FAILED_PRECONDITION
        line = refused.error.details() or ""
        assert says in line
        assert f"delete {path}" in line.replace("delete it", f"delete {path}")
        path.unlink()
        again = TestWorker(channel)
        assert again.error is None
        again.leave()


def test_an_arena_without_room_says_which_setting_is_too_small(tmp_path: Path) -> None:
    settings = small(tmp_path)
    settings = replace(settings, arena=replace(settings.arena, size="8KiB"))
    with running(settings) as service, calling(service.address) as channel:
        refused = TestWorker(channel)
        assert refused.error is not None
        assert refused.error.code() is CODE.FAILED_PRECONDITION
        assert "arena.size" in (refused.error.details() or "")
