"""Isolation between tenants: what an attacker learns of another's prompts, beside what it learns of how busy it is.

    python bench/isolation.py --json bench/results/isolation.json

For each surface, balanced probes: a fair coin decides whether the victim has sent exactly what the attacker looks for
or something else of the same length; the attacker guesses from all that it is shown. Figures are the ends of the
99 % interval of the area under the ROC curve, over all surfaces that show contents (0.5: no better than a coin).

Rows of kind "control" are the same attacks where isolation is taken out; there they must succeed. Rows of kind "known"
are what this design does show: how busy others are, through what is lent; what members of a group ask in its name; and
under pressure whether somebody has used a public context.
"""

import argparse
import random
import sys
import tempfile
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

from isolation_auc import Auc, of_scores, of_sights
from isolation_probes import (
    CONTENT,
    SECONDS,
    Probe,
    busy,
    busy_within_guarantee,
    member,
    public_use,
    public_use_under_pressure,
)
from isolation_world import ATTACKER, VICTIM, world
from results_format import Results, hardware

HALF_WIDTH = 0.02
KNOWN: tuple[Probe, ...] = (busy, busy_within_guarantee, member, public_use, public_use_under_pressure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--probes", type=int, default=10_000, help="for each surface that shows contents")
    parser.add_argument("--fewer", type=int, default=400, help="for each control, and what is known to show")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(hardware())
    results = Results("isolation", options.seed)
    results.rows = measured(options.probes, options.fewer, options.seed)
    results.figures = figures(results.rows)
    print(results.figures)
    if options.json:
        results.write(options.json)
    if not is_good(results.rows):
        sys.exit("an attacker does better than a coin, or a control does not show what it must")


def measured(probes: int, fewer: int, seed: int) -> list[dict[str, Any]]:
    """A row for each surface."""
    rows = []
    for kind, attacks, count, broken in (
        ("content", CONTENT, probes, False),
        ("control", CONTENT, fewer, True),
        ("known", KNOWN, fewer, False),
    ):
        for attack in attacks:
            for surface, auc in attacked(attack, count, seed, broken=broken).items():
                rows.append(row_of(kind, surface, auc))
                print(rows[-1], flush=True)
    return rows


def attacked(attack: Probe, probes: int, seed: int, *, broken: bool = False) -> dict[str, Auc]:
    """Run one attack in a world of its own; how well it does on each of its surfaces."""
    bits = coins(probes, random.Random(seed))
    sights: dict[str, list[Hashable]] = {}
    with tempfile.TemporaryDirectory() as folder, world(Path(folder), seed, broken=broken) as there:
        there.share(**{ATTACKER: 0.25, VICTIM: 0.25})
        for bit in bits:
            for surface, sight in attack(there, bit).items():
                sights.setdefault(surface, []).append(sight)
    return {surface: auc_of(surface, bits, seen) for surface, seen in sights.items()}


def coins(probes: int, source: random.Random) -> list[bool]:
    """Fair, and as many of either case in each half."""
    halves = [[at % 2 == 0 for at in range(probes // 2)] for _ in range(2)]
    for half in halves:
        source.shuffle(half)
    return halves[0] + halves[1]


def auc_of(surface: str, bits: Sequence[bool], seen: Sequence[Hashable]) -> Auc:
    """Numbers of seconds are compared; of anything else it is learnt what it is worth."""
    if surface.endswith(SECONDS):
        return of_scores(bits, [-float(str(seconds)) for seconds in seen])
    return of_sights(bits, seen)


def row_of(kind: str, surface: str, auc: Auc) -> dict[str, Any]:
    """For the results."""
    return {
        "kind": kind,
        "surface": surface,
        "probes": auc.probes,
        "auc": round(auc.area, 4),
        "low": round(auc.low, 4),
        "high": round(auc.high, 4),
    }


def figures(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The widest ends over all surfaces that show contents, and what is known to show."""
    content = [row for row in rows if row["kind"] == "content"]
    found = {
        "attack_auc_interval_low": min(row["low"] for row in content),
        "attack_auc_interval_high": max(row["high"] for row in content),
    }
    return found | {f"{row['surface']}_auc": row["auc"] for row in rows if row["kind"] == "known"}


def is_good(rows: Sequence[dict[str, Any]]) -> bool:
    """Contents show nothing, and would where isolation is broken: seconds may, as the machine is noisy."""
    content = [row for row in rows if row["kind"] == "content"]
    controls = [row for row in rows if row["kind"] == "control" and not row["surface"].endswith((SECONDS, "steps"))]
    return all(
        row["low"] <= 0.5 <= row["high"] and (row["high"] - row["low"]) / 2 <= HALF_WIDTH for row in content
    ) and all(row["low"] > 0.6 for row in controls)


if __name__ == "__main__":
    main()
