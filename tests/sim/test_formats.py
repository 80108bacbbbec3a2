"""Traces in the formats that others write."""

import gzip
import json
from pathlib import Path

import pytest

from kvprefetch.errors import TraceError
from kvprefetch.sim.formats import read_trace


def written(folder: Path, *rows: object, name: str = "trace.jsonl") -> Path:
    path = folder / name
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n"
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def agent(name: str, tools: int, *requests: dict[str, object], scope: str = "local") -> dict[str, object]:
    return {
        "id": name, "block_size": 64, "hash_id_scope": scope, "tool_tokens": tools, "system_tokens": 0,
        "requests": list(requests),
    }  # fmt: skip


def call(t: float, first: int, count: int, **more: object) -> dict[str, object]:
    return {"t": t, "in": 64 * count, "out": 1, "hash_rle": [[first, count]], "api_time": 1.0, **more}


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz"])
def test_sessions_share_the_blocks_of_equal_tools_alone(tmp_path: Path, name: str) -> None:
    rows = [agent(x, tools, call(0, 1, 5)) for x, tools in (("a", 128), ("b", 128), ("c", 192))]
    trace = read_trace(written(tmp_path, *rows, name=name), "kv-cache-tester", tenants=2)
    a, b, c = (dict.fromkeys(n for first, k in s[0].path for n in range(first, first + k)) for s in trace.sessions)
    assert (len(a.keys() & b.keys()), len(a.keys() & c.keys()), len(a)) == (2, 0, 5)
    assert [s[0].tenant for s in trace.sessions] == ["tenant-0", "tenant-0", "tenant-1"]


def test_global_names_are_kept(tmp_path: Path) -> None:
    rows = [agent(x, 0, call(0, 7, 3), scope="global") for x in "ab"]
    trace = read_trace(written(tmp_path, *rows), "kv-cache-tester", 1)
    assert [s[0].path for s in trace.sessions] == [((7, 3),), ((7, 3),)]


def test_a_subagent_is_a_session_on_its_parents_clock(tmp_path: Path) -> None:
    row = agent("a", 0, call(0, 1, 2), {"t": 10.0, "agent_id": "x", "requests": [call(2.0, 9, 1)]})
    trace = read_trace(written(tmp_path, row), "kv-cache-tester", 1)
    assert [(s[0].session, s[0].at) for s in trace.sessions] == [("a", 0.0), ("a/x", 12.0)]


def test_mooncakes_sessions_are_inferred_from_prefixes(tmp_path: Path) -> None:
    ids = [[0, 1, 2], [0, 5, 6], [0, 1, 2, 3], [0, 9, 10, 11]]
    rows = [
        {"timestamp": 1000 * n, "input_length": 512 * len(found) + 5, "output_length": 3, "hash_ids": [*found, 90 + n]}
        for n, found in enumerate(ids)
    ]
    trace = read_trace(written(tmp_path, *rows), "mooncake", 1)
    assert [[r.at for r in s] for s in trace.sessions] == [[0.0, 2.0], [1.0], [3.0]]
    assert trace.sessions[0][1].blocks == 4


def test_our_own_lines(tmp_path: Path) -> None:
    rows = [
        {"session": "a", "at": 5, "tokens": 9, "blocks": [[1, 2]], "block_tokens": 4, "tenant": "t"},
        {"session": "a", "at": 1, "tokens": 8, "blocks": [1, 2]},
    ]
    trace = read_trace(written(tmp_path, *rows), "jsonl", 1)
    assert trace.block_tokens == 4
    assert [(r.at, r.path, r.tenant) for r in trace.sessions[0]] == [
        (1.0, ((1, 2),), "tenant-0"),
        (5.0, ((1, 2),), "t"),
    ]


@pytest.mark.parametrize(
    "line", ["{", "[1]", '{"session": "a"}', '{"session": "a", "at": "x", "tokens": 1, "blocks": []}']
)
def test_what_cannot_be_read_is_named(tmp_path: Path, line: str) -> None:
    with pytest.raises(TraceError, match=r"trace\.jsonl"):
        read_trace(written(tmp_path, line), "jsonl", 1)


def test_a_broken_archive_is_an_error_of_ours(tmp_path: Path) -> None:
    path = written(tmp_path, "{}", name="t.jsonl.gz")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(TraceError):
        read_trace(path, "jsonl", 1)
