"""The bench of fairness, on traces of a few sessions."""

import json
import random
import sys
from pathlib import Path

import fairness
import fairness_interactive
import fairness_pool
import pytest
from fairness_hints import false_hint_gain
from fairness_interactive import Beside, interactive
from fairness_policies import maker_of
from fairness_runs import find_traces

from kvprefetch.errors import InvalidRequest, TraceError

PROMISED = (
    "worst_tenant_points", "flood_gpu_hit_kept", "flood_hit_kept", "flood_p99_ratio", "total_hit_over_lru",
    "total_hit_over_lru_value", "interactive_p99_ratio", "evict_us", "bytes_per_block", "attack_auc_interval_low",
    "attack_auc_interval_high", "false_hint_gain",
)  # fmt: skip


def agent_session(number: int, rng: random.Random) -> dict[str, object]:
    """A session of a few turns within ten minutes."""
    at, requests, blocks = 0.0, [], 100
    for _ in range(8):
        requests.append({"t": at, "in": blocks * 64, "out": 50, "api_time": 2.0, "hash_rle": [[1, blocks]]})
        at += 2.0 + rng.uniform(1.0, 150.0)
        blocks += 10
    return {"id": f"s{number}", "block_size": 64, "hash_id_scope": "local", "requests": requests}


def mooncake_request(number: int) -> dict[str, object]:
    """One of nine prompts, again and again."""
    names = [number % 9 * 10 + block for block in range(4)]
    return {"timestamp": 20_000 * number, "input_length": 2048, "output_length": 4, "hash_ids": names}


def traces_in(folder: Path, *, with_rates: bool = True) -> None:
    """One small file of each format."""
    rng = random.Random(1)
    files: dict[str, list[dict[str, object]]] = {
        "chats": [agent_session(n, rng) for n in range(6)],
        "conversation": [mooncake_request(n) for n in range(90)],
    }
    if with_rates:
        files["rates"] = [
            {"client": c, "window_s": 600, "windows": [[600.0 * n, 1.0 + c, 0.0] for n in range(90)]} for c in range(3)
        ]
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def bench(folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    arguments = ["bench/fairness.py", str(folder), "--processes", "1", "--hours", "0.2", "--tenants", "3", *options]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(fairness_interactive, "SECONDS", 5.0)
    monkeypatch.setattr(fairness, "measure", lambda *given: fairness_pool.measure(2_000, 5, 20))
    fairness.main()


def test_all_sections_run_and_write_their_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    traces_in(tmp_path)
    written, picture = tmp_path / "out.json", tmp_path / "out.png"
    bench(tmp_path, monkeypatch, "--quick", "--probes", "30", "--json", str(written), "--picture", str(picture))
    found = json.loads(written.read_text())
    figures, rows = found["figures"], found["rows"]
    assert set(PROMISED) <= figures.keys()
    assert figures["flood_gpu_hit_kept"] == figures["flood_gpu_hit_kept_k3"]
    assert {f"flood_p99_ratio_{name}" for name in ("fifo", "reactive", "maxmin", "static")} <= figures.keys()
    assert {"flood_p99_ratio_0.1_k3_conversation", "curve_total_hit_over_lru_fair:0.25"} <= figures.keys()
    assert {row["section"] for row in rows} >= {"interactive", "the trade-off"}
    assert {row["scene"] for row in rows if "scene" in row} == {"quiet", "memory", "engine"}
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_policies_may_be_compared_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    traces_in(tmp_path)
    bench(tmp_path, monkeypatch, "--seeds", "1", "--policies", "reactive,fair:1")
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("chats")]
    assert [line[3] for line in lines] == 4 * ["reactive"] + 4 * ["fair:1"]


@pytest.mark.parametrize(("options", "said"), [(["--policies", "best"], "no policy 'best'"), ([], "clients' rates")])
def test_what_cannot_be_run_is_said(
    options: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    traces_in(tmp_path, with_rates=bool(options))
    with pytest.raises(SystemExit) as ended:
        bench(tmp_path, monkeypatch, *options)
    assert said in str(ended.value.code)
    assert "Traceback" not in capsys.readouterr().err


def test_traces_are_told_by_their_keys(tmp_path: Path) -> None:
    traces_in(tmp_path)
    found = find_traces(tmp_path)
    assert (found.sessions.stem, found.rates.stem) == ("chats", "rates")
    assert found.requests is not None
    assert found.kind_of(found.requests) != found.kind_of(found.sessions)
    found.sessions.unlink()
    with pytest.raises(TraceError, match="kv-cache-tester"):
        find_traces(tmp_path)


def test_everyone_is_guaranteed_the_same_part_of_an_equal_share() -> None:
    sharing, _ = maker_of("fair:0.5", ["ann", "bob", "flood"])
    assert [sharing.shares.of(name).guarantee for name in ("ann", "flood")] == pytest.approx([0.5 / 3, 0.5 / 3])
    with pytest.raises(InvalidRequest, match="no policy"):
        maker_of("unheard", [])


def test_a_short_request_waits_for_a_chunk_of_a_long_one_not_for_their_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fairness_interactive, "SECONDS", 30.0)
    found = interactive(["fifo", "fair"], 0, Beside())
    assert found["fifo"]["ratio"] > 10
    assert found["fair"]["ratio"] < 1.5


def test_a_pool_is_measured_in_a_process_of_its_own() -> None:
    cost = fairness_pool.measure(2_000, 5, 20)
    assert 0 < cost.evict_us < cost.make_room_us
    assert cost.bytes_per_block > 0


def test_false_hints_gain_nothing() -> None:
    found = false_hint_gain()
    assert found["false_hint_gain"] <= 1
    assert found["false_hint_cost"] <= 0.02
