"""The fault campaign: everything that can break is broken, and no answer is wrong, late or without a reason.

    python bench/faults.py --json bench/results/faults.json     # at most 15 minutes on 2 cores
    python bench/faults.py --quick                              # at most 2

All processes and signals are real; the model is a tiny random Llama in float32. What is counted is said in
`faults_case`; `memory_growth_mb` is of the service or the worker, whichever grew more, over 10,000 requests.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import faults_arena
import faults_disk
import faults_malformed
import faults_memory
import faults_network
import faults_redis
import faults_services
import faults_workers
from faults_case import Campaign
from faults_node import Node, write_model
from results_format import Results

PARTS = ("services", "workers", "arena", "network", "malformed", "memory", "disk", "redis")


def main() -> None:
    """Run the campaign; exit 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few cases of each kind")
    parser.add_argument("--only", action="append", choices=PARTS, help="these parts alone")
    parser.add_argument("--keep", type=Path, help="work, and leave the processes' logs, in this folder")
    options = parser.parse_args()
    began = time.monotonic()
    results = Results("faults", options.seed)
    with tempfile.TemporaryDirectory(prefix="kvprefetch-faults-") as folder:
        campaign = _run(options.keep or Path(folder), options)
    campaign.judge()
    for row in campaign.rows:
        if row.get("late") or "problems" in row or not row["counter"]:
            print(row)
    results.rows, results.figures = campaign.rows, campaign.figures()
    print({**results.figures, "seconds": round(time.monotonic() - began)})
    if options.json:
        results.write(options.json)
    sys.exit(any(value for name, value in results.figures.items() if name not in ("cases", "memory_growth_mb")))


def _run(folder: Path, options: argparse.Namespace) -> Campaign:
    model = write_model(folder / "model")
    alone = Node(folder / "alone", model, "alone")
    cold = alone.start_worker("cold", address="none")
    try:
        campaign = Campaign(folder, cold, options.seed, is_quick=options.quick)
        parts = options.only or PARTS
        if set(parts) - {"disk", "redis"}:
            _on_one_node(campaign, model, parts)
        if "disk" in parts:
            faults_disk.run(campaign)
        if "redis" in parts:
            faults_redis.run(campaign)
    finally:
        alone.close()
    return campaign


def _on_one_node(campaign: Campaign, model: Path, parts: Sequence[str]) -> None:
    """One service, two workers, and whoever is sacrificed."""
    node = Node(campaign.folder / "node", model, "node")
    try:
        node.serve(halting=True)
        one, two = node.start_worker("one"), node.start_worker("two")
        for worker in (campaign.cold, one, two):
            worker.ask(campaign.documents.next())  # the first forwards of a process are slower
        if "services" in parts:
            faults_services.run(campaign, node, one, two)
        if "workers" in parts:
            faults_workers.run(campaign, node, one, two)
        if "arena" in parts:
            faults_arena.run(campaign, node, one, two)
        if "network" in parts:
            faults_network.run(campaign, node, one)
        if "malformed" in parts:
            faults_malformed.run(campaign, node, one, two)
        if "memory" in parts:
            campaign.memory_growth_mb = faults_memory.run(campaign, node, one, two)
    finally:
        node.close()


if __name__ == "__main__":
    main()
