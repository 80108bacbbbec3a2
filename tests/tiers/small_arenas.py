"""Small arenas, and processes that die in the middle of something."""

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from kvprefetch.tiers.arena import ArenaFile
from kvprefetch.tiers.slots import SlotHeader, SlotState

NAMESPACE = "0123456789abcdef"
BLOCK = 5_000
SLOTS = 6


def create(path: Path, slots: int = SLOTS, **options: bool) -> ArenaFile:
    """The service's side of a small arena."""
    return ArenaFile.create(path, NAMESPACE, BLOCK, slots, **{"prefault": False, "huge_pages": False, **options})


def sealed(key: bytes, checksum: int, *, sequence: int = 1, length: int = BLOCK) -> SlotHeader:
    """The header of a whole block."""
    return SlotHeader(SlotState.SEALED, key, sequence=sequence, checksum=checksum, length=length)


def in_child(action: Callable[[], object]) -> int:
    """Run `action` in a process of its own; its exit status, or minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
        except BaseException:  # noqa: BLE001 - it is told, and the process ends
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
