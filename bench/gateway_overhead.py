"""What the gateway itself costs a request, with 50 streams at once.

The upstream is no engine: an engine's own speed would hide what is asked here. It is a process of its own that costs
next to nothing, holds each request for 0.1 s and then sends 40 chunks, one each 50 ms, as an engine would: a thousand
chunks a second for all streams. Rounds of the same streams with and without the gateway take turns. The cost of a
request is its time at the client less its time at the upstream; the figures are the differences of the quantiles with
and without. Client, gateway and upstream share the processors of this machine, and so disturb each other.
"""

import sys
from pathlib import Path
from typing import Any

import gateway_upstream
import psutil
from gateway_bench import percentile
from gateway_engine import start_gateway
from gateway_streams import Costs, bodies, stream_all
from results_format import Results
from service_node import Process

STREAMS = 50
ROUND_S = 8.0


async def overhead(results: Results, pairs: int) -> None:
    """The row and the figures."""
    costs = {False: Costs(), True: Costs()}
    cpu_s, streams = 0.0, [bodies(results.seed * 1_000 + number) for number in range(STREAMS)]
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import gateway_upstream as u, uvloop"
    with Process(code=f"{code}; uvloop.run(u.main())") as upstream:
        direct = "http://127.0.0.1:" + upstream.says("listening").rpartition(" ")[2]
        with start_gateway(direct) as gateway:
            process = psutil.Process(gateway.pid)
            await stream_all(gateway.url, streams, 1.0)
            await stream_all(direct, streams, 0.5)
            for pair in range(pairs):
                for through in (False, True) if pair % 2 else (True, False):
                    before = _cpu_s(process)
                    found = await stream_all(gateway.url if through else direct, streams, ROUND_S)
                    cpu_s += (_cpu_s(process) - before) if through else 0.0
                    for name in ("first_ms", "whole_ms", "chunk_ms"):
                        getattr(costs[through], name).extend(getattr(found, name))
            memory = process.memory_info().rss / 2**20
    row = row_of(costs[False], costs[True], cpu_s)
    found_row = {"section": "overhead", "upstream": "paced, no engine", "streams": STREAMS, **row}
    found_row |= {"python": sys.version.split()[0], "gateway_mib": round(memory)}
    print(found_row, flush=True)
    results.rows.append(found_row)
    for name in ("overhead_ms_p50", "overhead_ms_p99", "chunks_per_s"):
        results.figures[name] = row[name]


def row_of(direct: Costs, through: Costs, cpu_s: float) -> dict[str, Any]:
    """Both arms as one row."""
    row: dict[str, Any] = {"n": len(through.first_ms), "n_direct": len(direct.first_ms)}
    row |= {"chunks": len(through.chunk_ms), "gateway_cpu_s": round(cpu_s, 2)}
    row["chunks_per_s"] = round(len(through.chunk_ms) / max(cpu_s, 1e-9), 1)
    row["chunks_in_each_answer"] = gateway_upstream.CHUNKS
    for what in ("first", "whole", "chunk"):
        for percent in (50, 99):
            without, within = (percentile(getattr(costs, f"{what}_ms"), percent) for costs in (direct, through))
            row |= {f"{what}_direct_ms_p{percent}": round(without, 3), f"{what}_ms_p{percent}": round(within, 3)}
            row[f"{what}_overhead_ms_p{percent}"] = round(within - without, 3)
    for percent in (50, 99):
        row[f"overhead_ms_p{percent}"] = row[f"first_overhead_ms_p{percent}"]
    return row


def _cpu_s(process: psutil.Process) -> float:
    used = process.cpu_times()
    return float(used.user + used.system)
