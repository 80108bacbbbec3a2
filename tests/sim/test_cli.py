"""`kvprefetch simulate` as its users call it."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kvprefetch.cli.main import main
from kvprefetch.cli.simulate import parse_signals
from kvprefetch.errors import InvalidRequest
from kvprefetch.sim.arrivals import Signals

Simulate = Callable[..., tuple[int, str]]


def turn(session: str, at: float, first: int, count: int) -> dict[str, object]:
    return {"session": session, "at": at, "tokens": 64 * count, "out": 4, "blocks": [[first, count]]}


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Two sessions of ten turns, by turns, each of up to 200 blocks of its own."""
    path = tmp_path / "trace.jsonl"
    rows = [turn(name, 400.0 * n + start, first, 100 + 10 * n) for n in range(10) for name, start, first in
            (("a", 0.0, 1_000), ("b", 200.0, 5_000))]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def simulate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Simulate:
    """Run the command; its exit code and all that it printed."""

    def run(trace: Path, *options: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["kvprefetch", "simulate", str(trace), "--format", "jsonl", *options])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out + said.err

    return run


def test_every_policy_reports_what_it_did(simulate: Simulate, trace: Path, tmp_path: Path) -> None:
    policies = (
        "gpu-lru,reactive,ttl:300,pause,next-turn,trigger,oracle:5,belady,by-index,kvprefetch,kvprefetch:1.4,"
        "kvprefetch-inferred"
    )
    code, said = simulate(trace, "--policies", policies, "--gpu-tokens", "12800", "--json", str(tmp_path / "out.json"))
    assert code == 0, said
    report = json.loads((tmp_path / "out.json").read_text())
    by_name = {policy["policy"]: policy for policy in report["policies"]}
    assert list(by_name) == policies.split(",")
    for policy in by_name.values():
        assert policy.keys() >= {"ttft_s", "prefix_tokens", "prefetch", "tenants", "evictions", "wall_s"}
        assert policy["ttft_s"].keys() == {"all", "follow_up", "return_5min"}
        assert policy["ttft_s"]["return_5min"].keys() >= {"p50", "p95", "p99", "mean"}
        assert policy["prefetch"].keys() >= {"moved_tokens", "useful_tokens", "late_share", "gpu_seconds"}
    known = {sum(policy["prefix_tokens"].values()) for policy in by_name.values()}
    assert known == {2 * 64 * sum(100 + 10 * n for n in range(9))}, "what is reusable is the same for all"
    median = {name: policy["ttft_s"]["return_5min"]["p50"] for name, policy in by_name.items()}
    assert median["oracle:5"] < median["reactive"] < median["gpu-lru"]
    assert median["kvprefetch"] <= median["reactive"]


@pytest.mark.parametrize(
    "wrong",
    [
        ("--policies", "wishful"),
        ("--policies", "kvprefetch:lots"),
        ("--signals", "recall=2"),
        ("--signals", "colour=red"),
        ("--signals", "recall=x"),
        ("--reload-gbps", "0"),
        ("--gpu-tokens", "0"),
    ],
)
def test_what_cannot_be_asked_is_a_usage_error(simulate: Simulate, trace: Path, wrong: tuple[str, str]) -> None:
    code, said = simulate(trace, *wrong)
    assert code == 2
    assert "Error" in said


def test_a_file_that_is_no_trace_is_one_line_and_exit_1(simulate: Simulate, tmp_path: Path) -> None:
    path = tmp_path / "notes.jsonl"
    path.write_text('{"session": "a"}\n')
    code, said = simulate(path)
    assert code == 1
    assert "notes.jsonl" in said
    assert "Traceback" not in said


def test_signals_are_read_by_name() -> None:
    assert parse_signals("recall=.5, precision=1,lead=20") == Signals(0.5, 1.0, 20.0)
    assert parse_signals("") == Signals()
    with pytest.raises(InvalidRequest):
        parse_signals("recall")
