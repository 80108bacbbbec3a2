"""Which context comes next: kvprefetch's predictor against tuned baselines, on what people and agents touched.

    python bench/predict.py DATA --json bench/results/predict.json

DATA is a folder of JSON lines files (`.jsonl` or `.jsonl.gz`) in the format of `file_navigation` (commits with the
files that they touch) or `agent_tool_events` (messages with tool calls). Every predictor sees all events in order of
time, predicts each use before it learns from it, and is judged on the later half; the baselines' settings are chosen
by hit@5 on the earlier half. Target: the next file touched, or read, in the session. Nothing is drawn.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from predict_baselines import FAMILIES, Calibrated
from predict_score import Score
from results_format import Results, hardware

from kvprefetch.errors import KVPrefetchError, TraceError
from kvprefetch.predict.which import Which
from kvprefetch.sim.events import Event, read_events
from kvprefetch.sim.formats import rows_of

FORMATS = {"file_navigation": {"tenant", "session", "ts", "files"}, "agent_tool_events": {"session", "user", "role"}}


def main() -> None:
    """Run on every file that fits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the traces")
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args()
    print(hardware())
    results, times = Results("predict", seed=0), []
    try:
        for path in files_of(options.data):
            rows, figures, spent = evaluate(read_events(path))
            name = path.name.partition(".")[0]
            results.rows += [{"dataset": name, **row} for row in rows]
            results.figures |= {f"{figure}_{name}": value for figure, value in figures.items()}
            times += spent
            _show(name, rows)
    except KVPrefetchError as error:
        sys.exit(f"bench/predict.py: {error}")
    results.figures["event_us_p50"] = median(times) * 1e6
    print({name: round(value, 4) for name, value in results.figures.items()})
    if options.json:
        results.write(options.json)


def files_of(folder: Path) -> list[Path]:
    """The folder's files of a known format, by the keys of their first line. Raises TraceError if there is none."""
    found = []
    for path in sorted(folder.glob("*.jsonl*")):
        keys = next(iter(rows_of(path)), {}).keys()
        if any(needed <= keys for needed in FORMATS.values()):
            found.append(path)
    if not found:
        raise TraceError(f"no file in {folder} has the format of {' or '.join(FORMATS)}: give the traces' folder")
    return found


def evaluate(events: Sequence[Event]) -> tuple[list[dict[str, Any]], dict[str, float], list[float]]:
    """Rows of all predictors, the figures that goals are set for, and the seconds that each use took ours."""
    uses = [event for event in events if event.context is not None]
    half = len(uses) // 2
    rows = [_baseline(family, uses, half) for family in FAMILIES]
    score, spent = _ours(events, half)
    rows.append({"predictor": "kvprefetch", "setting": "", **score.figures()})
    ours, best5 = rows[-1], max(row["hit5"] for row in rows[:-1])
    best1 = max(row["hit1"] for row in rows[:-1])
    figures = {
        "hit5_over_best_baseline": ours["hit5"] / max(best5, 1e-9),
        "hit1_over_best_baseline": ours["hit1"] / max(best1, 1e-9),
        "hit5": ours["hit5"],
        "hit1": ours["hit1"],
        "ece": ours["ece"],
        "brier_skill": ours["brier_skill"],
    }
    return rows, figures, spent


def _ours(events: Sequence[Event], half: int) -> tuple[Score, list[float]]:
    which, score, spent, seen = Which(), Score(), [], 0
    for event in events:
        if event.context is None:
            which.signalled(event.session, event.tenant, event.user, event.kind, event.about, event.at)
            continue
        began = time.perf_counter()
        said = which.predictions(event.session, event.tenant, event.user, which.now)
        middle = time.perf_counter()
        if seen >= half:
            listed = which.predictions(event.session, event.tenant, event.user, which.now, limit=1000)
            latest = which.kind_of(event.session, event.tenant)
            assert [p.context for p in listed[: len(said)]] == [p.context for p in said]
            score.add([(p.context, p.probability) for p in listed], event.context, latest)
        again = time.perf_counter()
        which.used(event.session, event.tenant, event.user, event.context, event.kind, event.at)
        spent.append(time.perf_counter() - again + middle - began)
        seen += 1
    return score, spent


def _baseline(family: str, uses: Sequence[Event], half: int) -> dict[str, Any]:
    """The family's best setting on the earlier half, judged on the later one."""
    tuned = {name: _run(Calibrated(make()), uses[:half], 0).hit5 for name, make in FAMILIES[family].items()}
    best = max(tuned, key=tuned.__getitem__)
    score = _run(Calibrated(FAMILIES[family][best]()), uses, half)
    return {"predictor": family, "setting": best, **score.figures()}


def _run(baseline: Calibrated, uses: Sequence[Event], judged_from: int) -> Score:
    score, latest = Score(), dict[str, str]()
    for number, event in enumerate(uses):
        said = baseline.predict(event)
        if number >= judged_from:
            score.add(said, event.context, latest.get(event.session, ""))
        baseline.learn(event, said)
        latest[event.session] = event.kind
    return score


def _show(name: str, rows: Sequence[dict[str, Any]]) -> None:
    print(f"\n{name:<42}{'hit@1':>8}{'hit@5':>8}{'log loss':>10}{'ECE':>8}{'skill':>8}")
    for row in rows:
        label = f"{row['predictor']} ({row['setting']})" if row["setting"] else row["predictor"]
        print(
            f"  {label:<40}{row['hit1']:>8.3f}{row['hit5']:>8.3f}{row['log_loss']:>10.2f}"
            f"{row['ece']:>8.3f}{row['brier_skill']:>8.3f}"
        )


if __name__ == "__main__":
    main()
