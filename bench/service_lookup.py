"""Look-ups over the service's Unix socket, from several worker processes at once: paced, and as fast as they can.

Paced, each client asks at random moments at a fixed mean rate, whatever came of its last question; the times are those
of the call as the worker makes it, packing and unpacking included. The figures are those of the paced run with leases
at 25 a second of each client. A look-up of one key says what the call costs whatever is looked up.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import quantiles
from types import TracebackType
from typing import Any

from results_format import Results
from service_client import BLOCK_BYTES, Registered, chain
from service_node import Node

CLIENTS = 4
LONGEST = 8_192
SIZES = (1, 64, 256, 1_024, 2_048, 8_192)
MAIN = 2_048
RATE = 25.0  # look-ups a second of each client, where it is paced
RATES = (5.0, 50.0, 100.0)  # others
_OTHERS = 24_576  # blocks that the arena holds besides


class Clients:
    """The client processes; use it in `with`."""

    def __init__(self, address: str, keys: Path) -> None:
        program = [sys.executable, str(Path(__file__).with_name("service_client.py")), address, str(keys)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipe: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.processes = [subprocess.Popen(program, env=environment, **pipe) for _ in range(CLIENTS)]

    def run(self, seed: int, **order: Any) -> dict[str, Any]:
        """Have all of them do the same at the same time; the row of it."""
        start = time.monotonic() + 0.2  # one clock for all processes
        for number, process in enumerate(self.processes):
            assert process.stdin is not None
            process.stdin.write(json.dumps({"start": start, "seed": seed + number, **order}) + "\n")
            process.stdin.flush()
        return row_of(order, [json.loads(self._line(process)) for process in self.processes])

    def wait_ready(self) -> None:
        """Until all are registered."""
        for process in self.processes:
            self._line(process)

    def _line(self, process: "subprocess.Popen[str]") -> str:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError("a client of the look-ups ended; what it said is above")
        return line

    def __enter__(self) -> "Clients":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self.processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def look_ups(results: Results, seed: int) -> None:
    """All rows, and the two figures."""
    keys = chain(LONGEST, seed)
    arena = (LONGEST + _OTHERS + 1_024) * (BLOCK_BYTES + 256)
    with Node(str(arena)) as node, node.serve():
        filler = Registered(node.address)
        filler.fill(keys, os.urandom(BLOCK_BYTES))
        for other in range(_OTHERS // MAIN):
            filler.fill(chain(MAIN, seed + 1_000 + other), os.urandom(BLOCK_BYTES))
        file = node.folder / "keys"
        file.write_bytes(b"".join(keys))
        with Clients(node.address, file) as clients:
            clients.wait_ready()
            clients.run(seed, keys=MAIN, lease=True, rate=0, seconds=1)  # warm-up
            main = _all_rows(clients, results, seed)
        filler.close()
    results.figures["lookup_2048_ms_p50"] = main["p50_ms"]
    results.figures["lookup_2048_ms_p99"] = main["p99_ms"]


def _all_rows(clients: Clients, results: Results, seed: int) -> dict[str, Any]:
    """The row of the figures."""

    def row(**order: Any) -> dict[str, Any]:
        found = {"section": "look-ups", **clients.run(seed, **order)}
        results.rows.append(found)
        print(found, flush=True)
        return found

    main = row(keys=MAIN, lease=True, rate=RATE, seconds=30)
    for rate in RATES:
        row(keys=MAIN, lease=True, rate=rate, seconds=5)
    for size in SIZES:
        for lease in (True, False):
            if (size, lease) != (MAIN, True):
                row(keys=size, lease=lease, rate=RATE, seconds=5)
            row(keys=size, lease=lease, rate=0, seconds=2)
    row(keys=MAIN, lease=True, rate=RATE, seconds=5, miss=True)
    return main


def row_of(order: dict[str, Any], answers: list[dict[str, Any]]) -> dict[str, Any]:
    """What several clients measured, as one row."""
    looks = [ms for answer in answers for ms in answer["look_ups"]]
    releases = [ms for answer in answers for ms in answer["releases"]]
    row: dict[str, Any] = {
        "keys": order["keys"],
        "lease": bool(order["lease"]),
        "load": "paced" if order["rate"] else "saturated",
        "clients": len(answers),
        "n": len(looks),
        "look_ups_per_s": round(sum(len(answer["look_ups"]) / answer["seconds"] for answer in answers), 1),
        "p50_ms": percentile(looks, 50),
        "p99_ms": percentile(looks, 99),
        "max_ms": round(max(looks), 3),
        "over_50_ms": sum(ms > 50 for ms in looks),
    }
    if releases:
        row |= {"release_p50_ms": percentile(releases, 50), "release_p99_ms": percentile(releases, 99)}
    if order["rate"]:
        row |= {"asked_per_s": order["rate"] * len(answers), "began_late": sum(answer["late"] for answer in answers)}
    if order.get("miss"):
        row["found"] = 0
    return row


def percentile(values: list[float], percent: int) -> float:
    """Of at least one value, in its own unit."""
    if len(values) == 1:
        return round(values[0], 4)
    return round(quantiles(values, n=100, method="inclusive")[percent - 1], 4)
