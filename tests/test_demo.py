"""The demo on a tiny model and a tiny story, and its command line on a real process."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tiny_models import tiny_llama, tiny_tokenizer

from kvprefetch.demo.compare import compare, steps_to_tell
from kvprefetch.demo.show import plot_report
from kvprefetch.demo.story import STORY, Ask, Open, standard_library
from kvprefetch.engines.engine import TransformersEngine
from kvprefetch.settings import Settings

TINY_STORY = (
    Open("a.py", 0.0),  # never asked about
    Open("b.py", 0.5),
    Ask("b.py", "What is it?", "first"),
    Ask("b.py", "And why?", "follow-up", 0.3),
)
TEXTS = {"a.py": "def a(): return 1\n" * 20, "b.py": "def b(): return 2\n" * 20}


def test_three_ways_give_the_same_answers_and_waste_shows(
    open_tiny: Callable[..., TransformersEngine], tmp_path: Path
) -> None:
    engine = open_tiny(pages=256)
    told: list[str] = []
    report = compare(engine, Settings(), TINY_STORY, TEXTS, lambda way, what: told.append(way), max_tokens=6)
    first, second = report["turns"]
    assert first["identical"]
    assert second["identical"]
    assert first["reused_tokens"] > 0 == first["reused_tokens_reactive"]
    assert second["reused_tokens"] >= second["reused_tokens_reactive"] > 0
    assert set(report["median"]) == {"cold", "reactive", "preloaded", "resident"}
    spent = report["prefetch"]
    assert spent["tokens_wasted"] > 0
    assert spent["tokens_computed"] == spent["tokens_used"] + spent["tokens_wasted"]
    assert len(told) == steps_to_tell(TINY_STORY)
    chart = tmp_path / "chart.png"
    plot_report(json.loads(json.dumps(report)), chart)
    assert chart.read_bytes().startswith(b"\x89PNG")


def test_the_story_opens_what_it_asks_about_and_more() -> None:
    opened = {step.file for step in STORY if isinstance(step, Open)}
    asked = {step.file for step in STORY if isinstance(step, Ask)}
    assert asked < opened
    assert set(standard_library()) == opened


def test_ctrl_c_in_a_pause_ends_the_demo_cleanly(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny_llama(max_position_embeddings=16_384).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    ours, theirs = os.openpty()
    command = [sys.executable, "-c", "from kvprefetch.cli.main import main; main()", "demo", "--model", str(folder)]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    while b"being read" not in shown:  # the preloaded way, where pauses take real time
        shown += os.read(ours, 4096)
    process.send_signal(signal.SIGINT)
    with suppress(OSError):  # the end of a terminal whose process is gone
        while more := os.read(ours, 4096):
            shown += more
    assert process.wait(timeout=60) == 1, shown
    assert b"Aborted" in shown
    assert b"Traceback" not in shown
