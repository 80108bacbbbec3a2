"""Replay visits under one policy, and report. A file's text is known from its first opening on, an edit when made."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from kvprefetch.errors import InvalidRequest
from kvprefetch.sim.foresight import Foresighted
from kvprefetch.sim.navigators import Navigator, Oracle, Popularity, key_of
from kvprefetch.sim.prefilling import PrefillingWorker, QuietClock
from kvprefetch.sim.replay import Experiment
from kvprefetch.sim.report import Served, prefix_tokens, ttft
from kvprefetch.sim.visits import BLOCK, Opening, Visit, cold, draw_openings
from kvprefetch.sim.worker import Live

NAMES = "cold, reactive, popularity, kvprefetch, kvprefetch-inferred, oracle"
PER_USEFUL = 3.0
"""Tokens that may be computed per useful one."""
_AHEAD_S = 5.0  # the oracle is told of a question at its opening, and again so long before it

_MAKERS: dict[str, Callable[[], Navigator]] = {
    "cold": Navigator,
    "reactive": Navigator,
    "popularity": Popularity,
    "kvprefetch": lambda: Foresighted(PER_USEFUL),
    "kvprefetch-inferred": lambda: Foresighted(PER_USEFUL),
    "oracle": Oracle,
}


class NavigationReplay:
    """Placed visits, replayed under as many policies as one likes."""

    def __init__(self, visits: Sequence[Visit], experiment: Experiment) -> None:
        self.visits = visits
        self.experiment = replace(experiment, machine=replace(experiment.machine, block_tokens=BLOCK))
        self.openings = draw_openings(visits, experiment.signals, experiment.seed)

    def run(self, policy: str) -> dict[str, Any]:
        """The report of one policy; `wall_s` is real time, all else virtual. Raises InvalidRequest for a name."""
        if policy not in _MAKERS:
            raise InvalidRequest(f"no policy {policy!r}; there are {NAMES}")
        began = time.perf_counter()
        visits = cold(self.visits) if policy == "cold" else self.visits
        served: list[Served] = []
        known = _known(visits)

        def record(live: Live) -> None:
            served.append(_served(live, known[live.request.identity]))

        clock, strategy = QuietClock(), _MAKERS[policy]()
        worker = PrefillingWorker(self.experiment.machine, clock, strategy, record)
        for visit in visits:
            _schedule(clock, worker, strategy, visit, foresees=policy == "oracle")
        for opening in self.openings if policy == "kvprefetch" else ():
            clock.at(opening.at, _opened(strategy, opening))
        clock.run()
        return _report(policy, worker, served, time.perf_counter() - began)


def _schedule(clock: QuietClock, worker: PrefillingWorker, strategy: Navigator, visit: Visit, foresees: bool) -> None:
    """What happens at a visit. The library learns of a text when it is first opened or edited, not before."""
    request, key = visit.request, (visit.request.tenant, visit.context)

    def open_it() -> None:
        strategy.library[key] = request.path

    def ask() -> None:
        worker.asked(key_of(request.session, visit.context))
        worker.arrive(request)
        strategy.library[key] = visit.after
        strategy.asked(visit)

    if visit.is_new:
        clock.at(visit.opened, open_it)
    if foresees:
        for at in (visit.opened, max(visit.opened, request.at - _AHEAD_S)):
            clock.at(at, lambda: strategy.foreseen(visit))
    clock.at(request.at, ask)


def _opened(strategy: Navigator, opening: Opening) -> Callable[[], None]:
    return lambda: strategy.opened(opening)


def _known(visits: Sequence[Visit]) -> dict[tuple[str, float, int], int]:
    """Blocks of each request's text that an endless cache would hold, by the request's identity."""
    seen: dict[int, int] = {}  # first block of a run → how much of it was seen
    known = {}
    for visit in visits:
        total, matches = 0, True
        for first, count in visit.request.path:
            have = min(seen.get(first, 0), count)
            total += have if matches else 0
            matches = matches and have == count
            seen[first] = max(seen.get(first, 0), count)
        known[visit.request.identity] = total
    return known


def _served(live: Live, known: int) -> Served:
    gpu = min(live.gpu_blocks, known)
    host = min(live.host_blocks, known - gpu)
    return Served(
        tenant=live.request.tenant,
        ttft_s=live.ttft_s,
        is_follow_up=known > 0,
        is_long_return=False,
        gpu=gpu * BLOCK,
        host=host * BLOCK,
        recomputed=(known - gpu - host) * BLOCK,
        at=live.request.at,
    )


def _report(policy: str, worker: PrefillingWorker, served: list[Served], wall_s: float) -> dict[str, Any]:
    moves = worker.moves
    return {
        "policy": policy,
        "requests": len(served),
        "ttft_s": ttft(served),
        "prefix_tokens": prefix_tokens(served),
        "prefetch": {
            "moved_tokens": moves.moved * BLOCK,
            "useful_tokens": moves.useful * BLOCK,
            "computed_tokens": worker.computed_blocks * BLOCK,
            "computed_useful_tokens": worker.computed_useful * BLOCK,
            "late_share": moves.late / max(moves.started, 1),
            "gpu_seconds": worker.speculative_s,
        },
        "tenants": [],
        "evictions": worker.gpu.evictions,
        "gpu_seconds": worker.gpu_seconds,
        "wall_s": wall_s,
    }
