"""Real processes for the fault campaign: started, waited for, stopped, continued and killed by their pid.

What they print goes to a file. Whoever starts one closes it, which kills it if need be. All waits are bounded: then
AssertionError, with the last lines that the process said.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

PATIENCE_S = 90.0  # busy machines are slow to start
_HALTING = Path(__file__).with_name("faults_halting.py")
_PLAIN = "from kvprefetch.cli.main import main; main()"


class Process:
    """A child with a log. See the module's promises."""

    def __init__(self, command: Sequence[str], log: Path, env: dict[str, str] | None = None) -> None:
        self.command, self.log = list(command), log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self._from = output.tell()
            self.process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    @property
    def text(self) -> str:
        """What it has said so far."""
        return self.log.read_bytes()[self._from :].decode(errors="replace")

    def says(self, words: str) -> str:
        """Wait for a line with these words; returns it."""

        def found() -> bool:
            return words in self.text or not self.is_running

        until(found, f"{self.command[-1]} does not say {words!r}")
        lines = [line for line in self.text.splitlines() if words in line]
        assert lines, f"{self.command} ended with {self.process.returncode}:\n{self.text[-3000:]}"
        return lines[0]

    def freeze(self) -> None:
        """SIGSTOP, and wait until it stands still."""
        self.process.send_signal(signal.SIGSTOP)
        until(lambda: self.is_frozen, f"{self.pid} does not stop")

    @property
    def is_frozen(self) -> bool:
        return state_of(self.pid) in ("T", "t")

    def resume(self) -> None:
        """SIGCONT."""
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """kill -9, and wait until it is gone."""
        self.process.kill()
        self.process.wait(PATIENCE_S)

    def stop(self) -> int:
        """SIGTERM; its exit status."""
        self.process.terminate()
        return self.process.wait(PATIENCE_S)

    def close(self) -> None:
        """See that it is gone."""
        if self.is_running:
            self.kill()


def command(*arguments: str, orders: Path | None = None) -> list[str]:
    """Of `kvprefetch ARGUMENTS`; with `orders` it can be made to halt at a step (faults_halting)."""
    if orders is None:
        return [sys.executable, "-c", _PLAIN, *arguments]
    return [sys.executable, str(_HALTING), str(orders), *arguments]


def state_of(pid: int) -> str:
    """The kernel's letter for it, "" if it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[0]


def resident_mb(pid: int) -> float:
    """Private memory of a process, without what it maps of files (the arena)."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    return 0.0


def waited_s(pid: int) -> float:
    """How long a process's threads have waited for a processor, all together, since they started."""
    total = 0
    for task in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with suppress(OSError):  # it has ended
            total += int(task.read_text(encoding="ascii").split()[1])
    return total / 1e9


def until(holds: Callable[[], bool], complaint: str, patience_s: float = PATIENCE_S, every_s: float = 0.02) -> None:
    """Wait until it holds."""
    deadline = time.monotonic() + patience_s
    while not holds():
        assert time.monotonic() < deadline, complaint
        time.sleep(every_s)


def free_port() -> int:
    """A port of this machine that nobody has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[bool]:
    """A file system of `size` bytes at `folder`; False where this user may not mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "tmpfs", str(folder)], capture_output=True, check=False
    )
    try:
        yield made.returncode == 0
    finally:
        if made.returncode == 0:
            subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False)
