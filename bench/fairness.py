"""Tenants that share memory and engine: what fairness costs, and what it protects."""

import argparse
import time
from pathlib import Path

from fairness_policies import maker_of

from kvprefetch.sim.formats import read_trace
from kvprefetch.sim.machine import Machine
from kvprefetch.sim.tenants import Dealing, Flood, deal, read_profiles
from kvprefetch.sim.together import Together, between, gpu_hit, hit, jain, ttft_p99, worst_window


def main() -> None:
    o = argparse.ArgumentParser()
    o.add_argument("data", type=Path)
    o.add_argument("--policies", default="reactive,maxmin,static")
    o.add_argument("--k", type=int, default=16)
    o.add_argument("--seed", type=int, default=0)
    o.add_argument("--hours", type=float, default=24)
    o.add_argument("--concurrency", type=float, default=16)
    o.add_argument("--quick", action="store_true")
    o.add_argument("--engine", action="store_true", help="engine test at 0.1 and 0.5/s, too")
    o = o.parse_args()
    trace = read_trace(o.data / "agent_sessions.jsonl.gz", "kv-cache-tester", 1)
    h = o.hours * 3600
    trace = deal(trace, read_profiles(o.data / "client_rates.jsonl.gz"), Dealing(o.k, o.concurrency, h, o.seed))
    t = time.perf_counter()
    run = Together(trace, Machine())
    print(
        f"requests {len(trace.requests())} sessions {len(trace.sessions)} tenants {len(run.tenants)} pressure {run.pressure:.2f}  {time.perf_counter() - t:.1f} s"
    )
    print([sum(len(s) for s in trace.sessions if s[0].tenant == x) for x in run.tenants])
    lo, hi = h / 3, 2 * h / 3
    flood = Flood(0.5, lo, hi).requests(64, o.seed)
    block = run.machine.block_tokens
    print(
        f"{'policy':<18}{'gpu':>7}{'all':>7}{'jain':>7}{'worst':>8}{'n':>6}{'below':>6} | {'mid gpu':>8}{'all':>7} | {'flood gpu':>8}{'all':>7}{'kept':>7}{'kept':>7}{'p99':>8}{'->':>8}{'worst':>8}{'below':>6} wall"
    )
    for p in o.policies.split(","):
        sharing, make = maker_of(p, [*run.tenants, "flood"])
        g = lambda t: sharing.shares.guaranteed(t, run.machine.gpu_tokens // block)
        t = time.perf_counter()
        a = run.serve(make)
        ta = time.perf_counter() - t
        t = time.perf_counter()
        b = run.serve(make, flood, apart=True)
        tb = time.perf_counter() - t
        am, bm = between(a, lo, hi), between(b, lo, hi)
        wa, wb = worst_window(a, g), worst_window(b, g)
        print(
            f"{p:<18}{gpu_hit(a):7.3f}{hit(a):7.3f}{jain(a):7.3f}{wa.points:8.1f}{wa.windows:6}{wa.below:6} | {gpu_hit(am):8.3f}{hit(am):7.3f} | {gpu_hit(bm):8.3f}{hit(bm):7.3f}{gpu_hit(bm) / gpu_hit(am):7.3f}{hit(bm) / hit(am):7.3f}{ttft_p99(am):8.2f}{ttft_p99(bm):8.2f}{wb.points:8.1f}{wb.below:6} {ta:.1f}+{tb:.1f}",
            flush=True,
        )
        if o.engine:
            for rate in (0.1, 0.5):
                f = Flood(rate, lo, min(hi, lo + 4 * 3600)).requests(64, o.seed)
                x = between(run.serve(make, f), lo, lo + 4 * 3600)
                y = between(a, lo, lo + 4 * 3600)
                print(
                    f"    engine {rate}/s p99 {ttft_p99(y):.2f} -> {ttft_p99(x):.2f}  gpu {gpu_hit(y):.3f} -> {gpu_hit(x):.3f}",
                    flush=True,
                )


main()
