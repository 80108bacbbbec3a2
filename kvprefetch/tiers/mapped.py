"""A file mapped into memory: backed from the start, in huge pages and locked where that is asked for and allowed."""

import ctypes
import errno
import mmap
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, Linux 5.14: fault pages in for writing, without writing
_PIECE = 2**20  # bytes populated in one go
_HUGE_SETTING = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")


def map_file(
    descriptor: int, size: int, *, prefault: bool, huge_pages: bool, lock: bool, note: Callable[[str], None]
) -> mmap.mmap:
    """Map `size` bytes for reading and writing, all of them backed, so that no access can fail later (SIGBUS).

    `note` is told what was got and what was not. Raises OSError: ENOSPC where the file system has too little.
    """
    _require_space(descriptor, size)
    mapping = mmap.mmap(descriptor, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    if huge_pages:  # before the first page is there: pages do not become huge later
        with suppress(OSError):  # what was got is seen below
            mapping.madvise(mmap.MADV_HUGEPAGE)
    is_populated = prefault and _populate(mapping)
    os.posix_fallocate(descriptor, 0, size)
    if prefault and not is_populated:
        for at in range(0, size, mmap.PAGESIZE):
            mapping[at]
    note(f"prefaulted: {'yes' if prefault else 'not asked for'}")
    note(f"huge pages: {_huge_pages(mapping) if huge_pages else 'not asked for'}")
    note(f"locked: {_lock(mapping) if lock else 'not asked for'}")
    return mapping


def address_of(writable: mmap.mmap | memoryview | bytearray) -> int:
    """Where a contiguous writable buffer begins; valid as long as it is."""
    return ctypes.addressof(ctypes.c_char.from_buffer(writable))


def _require_space(descriptor: int, size: int) -> None:
    """Rather not begin what cannot end."""
    system = os.fstatvfs(descriptor)
    left = system.f_bavail * system.f_frsize
    if size - os.fstat(descriptor).st_blocks * 512 > left:
        raise OSError(errno.ENOSPC, f"the file system has {left} bytes left")


def _populate(mapping: mmap.mmap) -> bool:
    """False: this system cannot. `madvise` keeps the interpreter lock: other threads run between the pieces."""
    try:
        for at in range(0, len(mapping), _PIECE):
            mapping.madvise(_POPULATE_WRITE, at, min(_PIECE, len(mapping) - at))
    except OSError as error:
        if error.errno in (errno.EFAULT, errno.ENOMEM):  # what else would have been SIGBUS at the first touch
            raise OSError(errno.ENOSPC, "too little memory for it is left") from error
        return False
    return True


def _huge_pages(mapping: mmap.mmap) -> str:
    """What was got, in words."""
    try:
        setting = _HUGE_SETTING.read_text(encoding="utf-8")
        chosen = setting[setting.find("[") + 1 : setting.find("]")]
        kib = 0 if chosen in ("never", "deny") else _huge_kib(mapping)
    except (OSError, ValueError):
        return "unknown"
    return f"{kib // 1024} MiB" if kib else f"none (the system's setting for shared memory is {chosen!r})"


def _huge_kib(mapping: mmap.mmap) -> int:
    """What the system's list of memory areas says of this one."""
    begin, inside, kib = f"{address_of(mapping):x}-", False, 0
    with Path("/proc/self/smaps").open(encoding="utf-8", errors="replace") as areas:
        for line in areas:
            name, *value = line.split()
            if "-" in name:
                inside = name.startswith(begin)
            elif inside and name in ("ShmemPmdMapped:", "FilePmdMapped:"):
                kib += int(value[0])
    return kib


def _lock(mapping: mmap.mmap) -> str:
    """Keep it out of swap; what came of it, in words."""
    libc = ctypes.CDLL(None, use_errno=True)
    failed = libc.mlock(ctypes.c_void_p(address_of(mapping)), ctypes.c_size_t(len(mapping)))
    return f"refused ({os.strerror(ctypes.get_errno())}; see `ulimit -l`)" if failed else "yes"
