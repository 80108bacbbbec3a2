"""The checkers: style, format, types, and which module may import which."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = Path(sys.executable).parent


@pytest.mark.parametrize("command", ["ruff check .", "ruff format --check .", "mypy", "lint-imports"])
def test_checker_is_content(command: str) -> None:
    name, *arguments = command.split()
    done = subprocess.run([str(SCRIPTS / name), *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}:\n{done.stdout[-4000:]}{done.stderr[-2000:]}"
