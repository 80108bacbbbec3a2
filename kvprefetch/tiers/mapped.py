"""A file mapped into memory: backed from the start, in huge pages and locked where that is asked for and allowed."""

import ctypes
import errno
import mmap
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, Linux 5.14: fault pages in for writing, without writing
_HUGE_SETTING = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")


def require_space(descriptor: int, more: int) -> None:
    """Raise OSError (ENOSPC) unless the file system has `more` bytes left."""
    system = os.fstatvfs(descriptor)
    if more > system.f_bavail * system.f_frsize:
        raise OSError(errno.ENOSPC, f"{more} bytes wanted, {system.f_bavail * system.f_frsize} left")


def map_file(
    descriptor: int, size: int, *, prefault: bool, huge_pages: bool, lock: bool, note: Callable[[str], None]
) -> mmap.mmap:
    """Map `size` bytes for reading and writing, all of them backed, so that no access can fail later (SIGBUS).

    `note` is told what was got and what was not. Raises OSError: ENOSPC where the file system has too little.
    """
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


def _populate(mapping: mmap.mmap) -> bool:
    """False: this system cannot."""
    try:
        mapping.madvise(_POPULATE_WRITE)
    except OSError as error:
        if error.errno in (errno.EFAULT, errno.ENOMEM):  # what else would have been SIGBUS at the first touch
            raise OSError(errno.ENOSPC, "too little memory for it is left") from error
        return False
    return True


def _huge_pages(mapping: mmap.mmap) -> str:
    """What was got, in words."""
    begin = f"{address_of(mapping):x}-"
    try:
        areas = Path("/proc/self/smaps").read_text(encoding="ascii", errors="replace")
        setting = _HUGE_SETTING.read_text(encoding="ascii")
    except OSError:
        return "unknown"
    area = areas[areas.find("\n" + begin) + 1 :] if "\n" + begin in areas else ""
    sizes = {}
    for line in area.splitlines()[1:]:
        name, _, value = line.partition(":")
        if "-" in name:  # the next area
            break
        sizes[name] = value.split()
    kib = sum(int(sizes[name][0]) for name in ("ShmemPmdMapped", "FilePmdMapped") if sizes.get(name))
    chosen = setting[setting.find("[") + 1 : setting.find("]")]
    return f"{kib // 1024} MiB" if kib else f"none (the system's setting for shared memory is {chosen!r})"


def _lock(mapping: mmap.mmap) -> str:
    """Keep it out of swap; what came of it, in words."""
    libc = ctypes.CDLL(None, use_errno=True)
    failed = libc.mlock(ctypes.c_void_p(address_of(mapping)), ctypes.c_size_t(len(mapping)))
    return f"refused ({os.strerror(ctypes.get_errno())}; see `ulimit -l`)" if failed else "yes"
