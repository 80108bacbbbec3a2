"""Files of slots: made whole or not at all, this user's alone, and one process's alone.

Raises ArenaRefused for a file or folder that must not be used, saying what to do; TierUnavailable where the system
does not give one. A process that ends, however it ends, leaves no lock; at most one draft stays, until the next try.
"""

import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from kvprefetch.errors import ArenaRefused, TierUnavailable
from kvprefetch.tiers.layout import PAGE, Layout, decode, require_same

T = TypeVar("T")


def open_alone(path: Path, layout: Layout, prepare: Callable[[int], T]) -> tuple[int, T]:
    """Open `path`, or make it, for nobody but us; its descriptor, which has the lock, and what `prepare` returns.

    `prepare(descriptor)` runs when the file's header is known to be right, and before a new file gets its name.
    """
    _make_private_folder(path.parent)
    draft = path.with_name(f".{path.name}.new")
    with in_words(path, layout), _locked(path.parent):
        try:
            descriptor, is_new = open_private(path, os.O_RDWR), False
        except FileNotFoundError:
            descriptor, is_new = open_private(draft, os.O_RDWR | os.O_CREAT | os.O_TRUNC), True
        try:
            _have_alone(descriptor, path)
            if is_new:
                os.ftruncate(descriptor, layout.file_bytes)
                os.pwrite(descriptor, layout.encode(), 0)
            else:
                require_same(decode(os.pread(descriptor, PAGE, 0), layout.kind, path), layout, path)
            prepared = prepare(descriptor)
            if is_new:
                draft.rename(path)
        except BaseException:
            os.close(descriptor)
            if is_new:
                draft.unlink(missing_ok=True)
            raise
    return descriptor, prepared


def open_private(path: Path, flags: int) -> int:
    """Open a file of this user's. Raises OSError, or ArenaRefused where it is somebody else's."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    if os.fstat(descriptor).st_uid != os.geteuid():
        os.close(descriptor)
        raise ArenaRefused(f"{path} belongs to another user: delete it or set another folder")
    return descriptor


def unlock(descriptor: int) -> None:
    """Let others have the file, even if the descriptor lives on somewhere; and close it."""
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


@contextmanager
def in_words(path: Path, layout: Layout) -> Iterator[None]:
    """Make TierUnavailable of what the system raises."""
    try:
        yield
    except OSError as error:
        raise TierUnavailable(
            f"no {layout.kind} file of {layout.file_bytes} bytes at {path} ({error.strerror}): "
            "set a smaller size or another folder"
        ) from error


def _make_private_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError as error:
        raise TierUnavailable(f"the folder {folder} cannot be made ({error.strerror}): set another one") from error
    if found.st_uid not in (os.geteuid(), 0) or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ArenaRefused(f"others may write to the folder {folder}: make it yours (chmod 700) or set another one")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One at a time makes or opens files here."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _have_alone(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ArenaRefused(f"another service has {path}: stop it, or set another folder for this one") from error
