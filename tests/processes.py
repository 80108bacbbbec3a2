"""Real processes of the command line, for the stories that need them: started, waited for, and ended by their pid."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

PATIENCE_S = 90.0  # busy machines are slow to start


class Process:
    """`kvprefetch ARGUMENTS` in a process of its own. Its output is collected as it comes."""

    def __init__(self, *arguments: str, env: dict[str, str] | None = None) -> None:
        code = "from kvprefetch.cli.main import main; main()"
        self.arguments = arguments
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    @property
    def pid(self) -> int:
        return self.process.pid

    def says(self, words: str) -> str:
        """Wait for a line with these words; returns it."""
        found: list[str] = []

        def look() -> bool:
            found.extend(line for line in list(self.lines) if words in line)
            return bool(found) or self.process.poll() is not None

        until(look, f"{self.arguments[0]} does not say {words!r}")
        assert found, f"{self.arguments} ended with {self.process.returncode}: " + "\n".join(self.lines[-30:])
        return found[0]

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """kill -9, and wait until it is gone."""
        self.process.kill()
        self.process.wait(PATIENCE_S)

    def stop(self) -> int:
        """SIGTERM; its exit status."""
        self.process.terminate()
        return self.process.wait(PATIENCE_S)

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *exception: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        self.process.wait(PATIENCE_S)


def until(holds: Callable[[], bool], complaint: str, patience_s: float = PATIENCE_S) -> None:
    """Wait until it holds."""
    deadline = time.monotonic() + patience_s
    while not holds():
        assert time.monotonic() < deadline, complaint
        time.sleep(0.02)


def written(path: Path, text: str) -> Path:
    """A file with this text."""
    path.write_text(text, encoding="utf-8")
    return path
