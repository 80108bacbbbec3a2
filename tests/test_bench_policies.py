"""The bench of policies, on traces of a few sessions."""

import json
import random
import sys
from pathlib import Path

import policies
import policies_plot
import pytest
from policies_figures import share
from policies_runs import traces_of


def agent_session(number: int, rng: random.Random) -> dict[str, object]:
    """A session that returns a few times, sometimes after more than five minutes."""
    at, requests, blocks = 0.0, [], 100
    for _ in range(5):
        requests.append({"t": at, "in": blocks * 64, "out": 50, "api_time": 2.0, "hash_rle": [[1, blocks]]})
        at += 2.0 + rng.choice((3.0, 400.0))
        blocks += 10
    return {"id": f"s{number}", "block_size": 64, "hash_id_scope": "local", "requests": requests}


def traces_in(folder: Path) -> None:
    """One small file of each format, and one of none."""
    rng = random.Random(1)
    mooncake = [
        {
            "timestamp": 2000 * n,
            "input_length": 2048,
            "output_length": 4,
            "hash_ids": [n % 3 * 10 + b for b in range(4)],
        }
        for n in range(12)
    ]
    commits = [
        {"tenant": "t", "user": "u", "session": f"s{n // 4}", "ts": 60 * n, "files": [[f"{n % 3}.py", "M", 4000]]}
        for n in range(12)
    ]
    files: dict[str, list[dict[str, object]]] = {
        "chats": [agent_session(n, rng) for n in range(4)],
        "served": mooncake,
        "commits": commits,
        "other": [{"something": "else"}],
    }
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_all_sections_run_and_write_their_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    traces_in(tmp_path)
    written, picture = tmp_path / "out.json", tmp_path / "out.png"
    arguments = ["--quick", "--processes", "1", "--json", str(written), "--picture", str(picture)]
    monkeypatch.setattr(sys, "argv", ["bench/policies.py", str(tmp_path), *arguments])
    policies.main()
    found = json.loads(written.read_text())
    figures = found["figures"]
    for name in ("return5_gain_share", "moved_per_useful_budget_1.4", "inferred_gain_share"):
        assert figures[name] == figures[f"{name}_chats"]
    for name in ("navigation_gain_share", "speculative_waste"):
        assert figures[name] == figures[f"{name}_commits"]
    assert figures["worst_vs_lru"] == min(figures["by_index_over_lru_chats"], figures["by_index_over_lru_served"])
    assert figures["workers_served"] >= 1
    assert {"belady_gap_closed_chats", "belady_gap_closed_served"} <= figures.keys()
    assert {"worst_follow_up_p50_ratio", "worst_follow_up_p99_ratio", "peak_rss_mib"} <= figures.keys()
    assert {row["policy"] for row in found["rows"]} >= set(policies_plot.SHOWN)
    assert sum(row["section"] == "grid" for row in found["rows"]) == 1 + 2 * 2
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("folder", ["absent", "."])
def test_without_traces_it_says_so(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench/policies.py", str(tmp_path / folder)])
    with pytest.raises(SystemExit) as ended:
        policies.main()
    assert str(tmp_path) in str(ended.value.code)
    assert "Traceback" not in capsys.readouterr().err


def test_each_format_is_told_by_its_first_line(tmp_path: Path) -> None:
    traces_in(tmp_path)
    named = {kind: [path.name for path in paths] for kind, paths in traces_of(tmp_path).items()}
    assert named == {"kv-cache-tester": ["chats.jsonl"], "mooncake": ["served.jsonl"], "navigation": ["commits.jsonl"]}


def test_the_trace_of_the_goals_comes_first() -> None:
    names = [Path("a.jsonl"), Path("agent_sessions.jsonl.gz"), Path("b.jsonl")]
    assert [path.name for path in policies.in_order(names)] == ["agent_sessions.jsonl.gz", "a.jsonl", "b.jsonl"]


def test_a_share_of_nothing_is_nothing() -> None:
    assert share(1.0, 0.0) == 0.0
    assert share(1.0, 4.0) == 0.25
