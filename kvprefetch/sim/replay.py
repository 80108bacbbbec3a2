"""Replay a placed trace under one policy, and report."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import pairwise
from typing import Any

from kvprefetch.cache.guard import Guard
from kvprefetch.sim.arrivals import Signals, draw_signals
from kvprefetch.sim.clock import VirtualClock
from kvprefetch.sim.future import Future, reusable_blocks
from kvprefetch.sim.machine import Machine
from kvprefetch.sim.ours import ByIndex
from kvprefetch.sim.policies import make_strategy
from kvprefetch.sim.report import LONG_IDLE_S, Served, by_tenant, prefix_tokens, ttft
from kvprefetch.sim.static import static_hits
from kvprefetch.sim.trace import Request, Trace
from kvprefetch.sim.worker import Live, SimWorker


@dataclass(frozen=True)
class Experiment:
    """What a replay holds fixed, whatever the policy."""

    machine: Machine
    workers: int = 1
    signals: Signals = field(default_factory=Signals)
    seed: int = 0


class Replay:
    """One placed trace, replayed under as many policies as one likes."""

    def __init__(self, trace: Trace, experiment: Experiment) -> None:
        self.experiment = replace(experiment, machine=replace(experiment.machine, block_tokens=trace.block_tokens))
        self.trace = trace
        self.idle = _idle_before(trace)
        self.reusable = reusable_blocks(trace)
        self.future = cache(lambda: Future(trace))
        self.static = static_hits(trace, self.experiment.machine.gpu_tokens // trace.block_tokens, self.reusable)

    def run(self, policy: str) -> dict[str, Any]:
        """The report of one policy; `wall_s` is real time, all else virtual."""
        return self.serve(policy)[0]

    def serve(self, policy: str) -> tuple[dict[str, Any], list[Served]]:
        """The report, and every request's end."""
        began = time.perf_counter()
        trace = self.future().cut(self.trace) if policy == "belady" else self.trace
        signals = self._signals(policy)
        maker = make_strategy(policy, self.future)
        clock, served = VirtualClock(), []
        machine = self.experiment.machine

        def record(live: Live) -> None:
            served.append(self._served(live))

        workers = [SimWorker(machine, clock, maker(), record) for _ in range(self.experiment.workers)]
        home = _homes(trace, workers)
        for request in trace.requests():
            clock.at(request.at, _call(home[_family(request)].arrive, request))
        for signal in draw_signals(trace, signals, self.experiment.seed) if signals else ():
            clock.at(signal.at, _call(home[_family(signal.latest)].strategy.signalled, signal.latest))
        clock.run()
        return self._report(policy, workers, served, time.perf_counter() - began), served

    def _signals(self, policy: str) -> Signals | None:
        word, _, lead = policy.partition(":")
        if word == "oracle":
            return Signals(recall=1.0, precision=1.0, lead=float(lead))
        return self.experiment.signals if word in ("trigger", "kvprefetch") else None

    def _served(self, live: Live) -> Served:
        request, block = live.request, self.trace.block_tokens
        idle = self.idle.get(request.identity)
        known = min(self.reusable[request.identity], live.blocks)
        gpu = min(live.gpu_blocks, known)
        host = min(live.host_blocks, known - gpu)
        return Served(
            tenant=request.tenant,
            ttft_s=live.ttft_s,
            is_follow_up=idle is not None,
            is_long_return=idle is not None and idle > LONG_IDLE_S and known > 0,
            gpu=gpu * block,
            host=host * block,
            recomputed=(known - gpu - host) * block,
            at=request.at,
        )

    def _report(self, policy: str, workers: list[SimWorker], served: list[Served], wall_s: float) -> dict[str, Any]:
        block = self.trace.block_tokens
        moved = sum(w.moves.moved for w in workers)
        late = sum(w.moves.late for w in workers)
        started = sum(w.moves.started for w in workers)
        return {
            "policy": policy,
            "requests": len(served),
            "ttft_s": ttft(served),
            "prefix_tokens": prefix_tokens(served),
            "prefetch": {
                "moved_tokens": moved * block,
                "useful_tokens": sum(w.moves.useful for w in workers) * block,
                "late_share": late / max(started, 1),
                "gpu_seconds": 0.0,
            },
            "tenants": by_tenant(served, self.static),
            "evictions": sum(w.gpu.evictions for w in workers),
            **_guard([w.strategy.guard for w in workers if isinstance(w.strategy, ByIndex)]),
            "gpu_seconds": sum(w.gpu_seconds for w in workers),
            "wall_s": wall_s,
        }


def _guard(guards: list[Guard]) -> dict[str, Any]:
    """How often the index was given up for LRU, and the share of requests that came under LRU."""
    if not guards:
        return {}
    by_lru, requests = sum(g.requests_by_lru for g in guards), sum(g.requests for g in guards)
    return {"guard": {"fallbacks": sum(g.fallbacks for g in guards), "share": by_lru / max(requests, 1)}}


def _idle_before(trace: Trace) -> dict[tuple[str, float, int], float]:
    """Seconds between a follow-up's arrival and the end of the request before it in its session."""
    idle = {}
    for session in trace.sessions:
        for before, request in pairwise(session):
            idle[request.identity] = request.at - before.at - (before.busy_s or 0.0)
    return idle


def _family(request: Request) -> str:
    return request.session.partition("/")[0]


def _homes(trace: Trace, workers: list[SimWorker]) -> dict[str, SimWorker]:
    """Sessions stay where they start: where fewest requests will come (a router's even load)."""
    load: Counter[int] = Counter(dict.fromkeys(range(len(workers)), 0))
    homes: dict[str, SimWorker] = {}
    for session in trace.sessions:
        family = _family(session[0])
        if family not in homes:
            least = min(load, key=lambda i: (load[i], i))
            homes[family] = workers[least]
            load[least] += len(session)
    return homes


def _call(action: Callable[[Request], None], request: Request) -> Callable[[], None]:
    return lambda: action(request)
