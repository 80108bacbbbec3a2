"""Every kernel compiles for sm_80, sm_90 and sm_100 without a GPU, moves 16 bytes at once and spills nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, object]]:
    """What `compile_all` found. In a process of its own: in this one kernels may be interpreted."""
    command = [sys.executable, str(Path(__file__).with_name("compile_all.py"))]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_is_there_for_every_architecture(compiled: list[dict[str, object]]) -> None:
    found = {arch: sum(one["arch"] == arch for one in compiled) for arch in (80, 90, 100)}
    assert found == {80: 21, 90: 21, 100: 21}


def test_bytes_move_sixteen_at_a_time(compiled: list[dict[str, object]]) -> None:
    wide = [one for one in compiled if one["wide"]]
    assert len({one["kernel"] for one in wide}) == 17
    assert all(one["wide_loads"] for one in wide)
    assert all(one["wide_stores"] for one in wide if one["kernel"] != "checksum")


def test_nothing_spills(compiled: list[dict[str, object]]) -> None:
    assert [one for one in compiled if one["spills"]] == []
