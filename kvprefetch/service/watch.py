"""Proof that a process is dead: its end seen through a pidfd, or its number gone or given to another process.

Promises
- `is_alive` never says False of a process that could still write to memory that it shares. A stopped process is
  alive; of a process that cannot be looked at, it is assumed.
- `Watch` lives on the event loop's thread, never blocks, and tells each death once. Time alone proves nothing.
- Without pidfds (an old kernel, too many open files) it looks every second instead.
"""

import asyncio
import logging
import os
import select
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger(__name__)

POLL_S = 1.0
_MOST_PID = 2**31  # of the kernel's type; a header that is damaged may name anything


def start_time(pid: int) -> int | None:
    """Ticks since boot when the process started; None: there is none, or it may not be looked at."""
    stat = _stat(pid)
    return int(stat[19]) if stat else None


def is_alive(pid: int, started: int) -> bool:
    """Whether the process `pid` that started at `started` ticks since boot may still run."""
    if not 0 < pid < _MOST_PID:
        return False
    try:
        fd = _open(pid)
    except ProcessLookupError:
        return False
    except OSError:
        return _looks_alive(pid, started)
    try:
        return _is_it(pid, started) and not _has_ended(fd)
    finally:
        os.close(fd)


class Watch:
    """Tells `on_death(instance)` when the process behind an instance is proved dead. See the module's promises."""

    def __init__(self, on_death: Callable[[bytes], None], poll_s: float = POLL_S) -> None:
        self.on_death, self.poll_s = on_death, poll_s
        self._watched: dict[bytes, tuple[int, int]] = {}
        self._fds: dict[bytes, int] = {}
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._watched)

    def add(self, instance: bytes, pid: int, started: int) -> None:
        """Watch this process from now on. One that is dead already is told soon, not at once."""
        if self._watched.get(instance) == (pid, started):
            return
        self.remove(instance)
        self._watched[instance] = pid, started
        loop = asyncio.get_running_loop()
        try:
            fd = _open(pid)
        except ProcessLookupError:
            loop.call_soon(self._tell, instance, pid, started)
            return
        except OSError:
            self._poll_later()
            return
        self._fds[instance] = fd  # from here on the number cannot mislead: a pidfd is of this one process
        if not _is_it(pid, started):
            loop.call_soon(self._tell, instance, pid, started)
            return
        loop.add_reader(fd, self._tell, instance, pid, started)

    def remove(self, instance: bytes) -> None:
        """Watch it no longer."""
        self._watched.pop(instance, None)
        fd = self._fds.pop(instance, None)
        if fd is not None:
            asyncio.get_running_loop().remove_reader(fd)
            os.close(fd)

    def close(self) -> None:
        """Watch nothing any more. Calling it again does nothing."""
        for instance in list(self._watched):
            self.remove(instance)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # -- within ----------------------------------------------------------------------------------------
    def _tell(self, instance: bytes, pid: int, started: int) -> None:
        if self._watched.get(instance) != (pid, started):
            return  # it was removed, or came back as another process
        self.remove(instance)
        log.info("worker %s (pid %d) is dead", instance[:4].hex(), pid)
        self.on_death(instance)

    def _poll_later(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self.poll_s, self._poll)

    def _poll(self) -> None:
        self._timer = None
        for instance, (pid, started) in list(self._watched.items()):
            if instance not in self._fds and not is_alive(pid, started):
                self._tell(instance, pid, started)
        if len(self._fds) < len(self._watched):
            self._poll_later()


def _open(pid: int) -> int:
    if not hasattr(os, "pidfd_open"):
        raise OSError("no pidfds here")
    return os.pidfd_open(pid)


def _has_ended(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


def _is_it(pid: int, started: int) -> bool:
    """Of a `pid` that a pidfd was opened for: whether it is this process, not a later one with its number."""
    return start_time(pid) in (None, started)  # None: it may not be looked at; then the pidfd alone decides


def _looks_alive(pid: int, started: int) -> bool:
    """Without a pidfd: there, started then, and no zombie whose threads are gone too."""
    stat = _stat(pid)
    if stat is None:
        return _exists(pid)
    if int(stat[19]) != started:
        return False
    return stat[0] not in ("Z", "X") or len(list(Path(f"/proc/{pid}/task").glob("*"))) > 1


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the third on (the state); the second, a name in brackets, may hold anything."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return text.rpartition(")")[2].split()
