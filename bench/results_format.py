"""The one result format of all benches, and the facts about this run that belong in it."""

import json
import platform
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch


@dataclass
class Results:
    """What one run of a bench measured. `figures` are the names that goals are set for."""

    bench: str
    seed: int
    figures: dict[str, float] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Write the run as JSON."""
        body = {
            "bench": self.bench,
            "commit": _commit(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "hardware": hardware(),
            "command": shlex.join(["python", *sys.argv]),
            "seed": self.seed,
            "figures": {name: round(value, 4) for name, value in sorted(self.figures.items())},
            "rows": self.rows,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


def hardware() -> str:
    """Processor, memory and accelerator, in words."""
    memory = psutil.virtual_memory().total / 2**30
    text = f"{_processor()}, {psutil.cpu_count()} cores, {memory:.0f} GiB, torch {torch.__version__}"
    if torch.cuda.is_available():
        text += f", {torch.cuda.get_device_name()}"
    return text


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def _commit() -> str:
    folder = Path(__file__).parent
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=folder, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"
