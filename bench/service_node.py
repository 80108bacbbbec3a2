"""A node for a bench: a folder in shared memory, a settings file, and real processes of the command line.

Promises
- Everything is on this machine: Unix sockets, and ports of 127.0.0.1 that the system picks.
- Only processes that were started here are ended, by their pid; the folder goes with the node.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

PATIENCE_S = 300.0
"""A busy machine is slow to start a process with torch in it."""
_KVPREFETCH = "from kvprefetch.cli.main import main; main()"


class Absent(Exception):
    """Something that a section needs is not on this machine; the message says what."""


class Process:
    """A python process of ours whose output is collected; use it in `with`."""

    def __init__(self, *arguments: str, code: str = _KVPREFETCH, environment: dict[str, str] | None = None) -> None:
        self.arguments = arguments
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def says(self, words: str) -> str:
        """Wait for a line with these words; returns it. Raises RuntimeError where the process ends or is silent."""
        found: list[str] = []

        def look() -> bool:
            found.extend(line for line in list(self.lines) if words in line)
            return bool(found) or self.process.poll() is not None

        wait_until(look, f"{self.arguments} does not say {words!r}")
        if not found:
            self._reader.join(1)
            found.extend(line for line in self.lines if words in line)
        if not found:
            raise RuntimeError(f"{self.arguments} ended with {self.process.returncode}: " + "\n".join(self.lines[-20:]))
        return found[0]

    def stop(self) -> int:
        """SIGTERM, and wait; its exit status."""
        self.process.terminate()
        return self.process.wait(PATIENCE_S)

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *exception: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(PATIENCE_S)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))


class Node:
    """One node's settings; use it in `with`. `more`: TOML of further tables; `listen`: places besides the socket."""

    def __init__(self, arena: str, more: str = "", *, listen: tuple[str, ...] = (), service: str = "") -> None:
        shared = Path("/dev/shm")
        self.folder = Path(tempfile.mkdtemp(prefix="kvprefetch-bench-", dir=shared if shared.is_dir() else None))
        self.address = f"unix://{self.folder}/service.sock"
        self.settings = self.folder / "kvprefetch.toml"
        places = ", ".join(f'"{place}"' for place in (self.address, *listen))
        text = f"""
        secret = "of a bench"
        [service]
        listen = [{places}]
        state_dir = "{self.folder}/state"
        {service}
        [arena]
        dir = "{self.folder}/arena"
        size = "{arena}"
        {more}
        """
        self.settings.write_text("\n".join(line.strip() for line in text.splitlines()), encoding="utf-8")

    def serve(self) -> Process:
        """`kvprefetch serve`, listening."""
        service = Process("serve", "--settings", str(self.settings))
        try:
            service.says("listening")
        except BaseException:
            service.__exit__()
            raise
        return service

    def start_worker(self, model: str, threads: int, token: str = "") -> Process:
        """`kvprefetch worker`, which loads its model meanwhile; see `url_of`. `token`: where there are credentials."""
        where = ("--service", self.address, "--settings", str(self.settings), "--port", "0")
        environment = {"OMP_NUM_THREADS": str(threads), "KVPREFETCH_TOKEN": token}
        return Process("worker", "--model", model, *where, environment=environment)

    def __enter__(self) -> "Node":
        return self

    def __exit__(self, *exception: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def url_of(worker: Process) -> str:
    """Where it serves, as `openai` wants it. Waits for it."""
    return worker.says(" at http:").split(" at ")[1]


def wait_until(holds: Callable[[], bool], complaint: str, patience_s: float = PATIENCE_S) -> None:
    """Wait until it holds. Raises RuntimeError."""
    deadline = time.monotonic() + patience_s
    while not holds():
        if time.monotonic() > deadline:
            raise RuntimeError(complaint)
        time.sleep(0.02)
