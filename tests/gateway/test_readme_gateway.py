"""The README's program, as it stands there but for the port: the second question about an opened document."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from gateways import Gateway, gateway
from processes import PATIENCE_S, written
from real_engines import RealEngine, needs_vllm, vllm, worker

README = Path(__file__).parents[2] / "README.md"
HANDBOOK = "Each year has thirty days of leave; ask for them two weeks before. " * 40


def program(site: Gateway) -> str:
    """The Python under the heading of the gateway."""
    section = README.read_text(encoding="utf-8").partition("## In front of vLLM")[2].partition("\n## ")[0]
    found = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert found is not None
    assert "http://127.0.0.1:8080" in found[1]
    return found[1].replace("http://127.0.0.1:8080", site.url)


def the_question_finds_the_handbook(engine: RealEngine, folder: Path, kind: str) -> None:
    written(folder / "handbook.md", HANDBOOK)
    with gateway(engine.url) as site:
        site.knows(kind)
        done = subprocess.run(
            [sys.executable, "-c", program(site)], cwd=folder, capture_output=True, text=True, timeout=PATIENCE_S
        )
        assert done.returncode == 0, done.stderr
        warmed, cached = done.stdout.splitlines()
        assert ast.literal_eval(warmed)["outcome"] == "warm"
        assert int(cached) > 0.8 * ast.literal_eval(warmed)["tokens"] > 100
        assert site.look("1")["use"] == "used"


def test_the_second_terminal_and_the_program_of_the_readme(tiny_model: Path, tmp_path: Path) -> None:
    settings = written(tmp_path / "small.toml", '[pool]\nsize = "64MiB"\n')
    with worker(tiny_model, "--settings", str(settings)) as engine:
        the_question_finds_the_handbook(engine, tmp_path, "kvprefetch")


@needs_vllm
@pytest.mark.vllm
def test_the_same_before_vllm(tiny_model: Path, tmp_path: Path) -> None:
    with vllm(tiny_model) as engine:
        the_question_finds_the_handbook(engine, tmp_path, "vllm")
