"""Reading what people and agents touched."""

import json
from pathlib import Path
from typing import Any

import pytest

from kvprefetch.errors import TraceError
from kvprefetch.sim.events import read_events

COMMIT = {"tenant": "t", "user": "u", "session": "s", "ts": 5, "files": [["a.py", "M", 40], ["b.py", "A", None]]}
SAID = {"session": "s", "user": "u", "role": "user", "ts": 1.0}
CALLED = {
    "session": "s", "user": "u", "role": "agent", "ts": 2.0,
    "tools": [
        {"type": "read", "name": "Read", "target": "a.py", "chars": 12},
        {"type": "shell", "name": "Bash", "target": None, "chars": 3},
        {"type": "read", "name": "Read", "target": None, "chars": 3},
    ],
}  # fmt: skip


def written(tmp_path: Path, *rows: Any) -> Path:
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def test_a_commits_files_are_uses(tmp_path: Path) -> None:
    events = read_events(written(tmp_path, COMMIT))
    assert [(e.tenant, e.context, e.kind, e.at, e.chars) for e in events] == [
        ("t", "a.py", "M", 5.0, 40),
        ("t", "b.py", "A", 5.0, 0),
    ]


def test_an_agents_reads_are_uses_and_all_else_signals(tmp_path: Path) -> None:
    events = read_events(written(tmp_path, CALLED, SAID))
    assert [(e.kind, e.context, e.about) for e in events] == [
        ("message", None, ""),
        ("Read", "a.py", ""),
        ("Bash", None, ""),
        ("Read", None, ""),
    ]


@pytest.mark.parametrize(
    "rows",
    [
        (),
        ("{broken",),
        ({"ts": 1},),
        ({**COMMIT, "ts": "soon"},),
        ({**COMMIT, "files": [["a.py"]]},),
        ({**COMMIT, "files": None},),
        (COMMIT, {"tenant": "t"}),
        (SAID, {**CALLED, "tools": [{"type": "read"}]}),
        (SAID, {**CALLED, "ts": None}),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, rows: tuple[Any, ...]) -> None:
    with pytest.raises(TraceError, match=r"trace\.jsonl"):
        read_events(written(tmp_path, *rows))
