"""When sessions start, and which signals come: the drawn part of a replay. All draws come from one seed."""

from bisect import bisect_left, bisect_right
from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import pairwise
from random import Random

from kvprefetch.errors import InvalidRequest
from kvprefetch.sim.trace import Request, Trace


@dataclass(frozen=True)
class Signals:
    """Each true return is signalled with probability `recall`, `lead` s ahead; `precision` of all signals are true.

    With precision 0 there are as many signals as returns were chosen to be signalled, and none is true.
    """

    recall: float = 0.9
    precision: float = 0.9
    lead: float = 5.0

    def __post_init__(self) -> None:
        if not (0 <= self.recall <= 1 and 0 <= self.precision <= 1 and 0 <= self.lead < float("inf")):
            raise InvalidRequest("recall and precision are from 0 to 1, lead is finite seconds, 0 or more")


@dataclass(frozen=True, slots=True)
class Signal:
    """Something observed in a session, after its request `latest`."""

    at: float
    latest: Request


def place(trace: Trace, concurrency: float, seed: int) -> Trace:
    """Sessions start as a Poisson process such that `concurrency` are alive on average; subagents with their parent.

    A trace whose times are on one clock already stays as it is.
    """
    if trace.is_placed:
        return trace
    families: dict[str, list[tuple[Request, ...]]] = defaultdict(list)
    for session in trace.sessions:
        families[session[0].session.partition("/")[0]].append(session)
    names = list(families)
    random = Random(seed)
    random.shuffle(names)
    length = sum(max(s[-1].at for s in family) for family in families.values()) / max(len(families), 1)
    start, placed = 0.0, []
    for name in names:
        placed += [tuple(replace(r, at=r.at + start) for r in session) for session in families[name]]
        start += random.expovariate(concurrency / max(length, 1e-9))
    return replace(trace, sessions=tuple(placed), is_placed=True)


def draw_signals(trace: Trace, signals: Signals, seed: int) -> list[Signal]:
    """Signals in order of time. False ones fall at uniform times on a session alive then, drawn uniformly."""
    random = Random(seed + 1)
    true = []
    returns = 0
    for session in trace.sessions:
        for before, request in pairwise(session):
            returns += 1
            if random.random() < signals.recall:
                true.append(Signal(max(request.at - signals.lead, before.at), before))
    if signals.precision > 0:
        false = round(len(true) * (1 - signals.precision) / signals.precision)
    else:
        false, true = len(true), []
    return sorted(true + _false_signals(trace, false, random), key=lambda signal: signal.at)


def _false_signals(trace: Trace, count: int, random: Random) -> list[Signal]:
    alive = sorted((s for s in trace.sessions if len(s) > 1), key=lambda s: s[0].at)
    if not alive or not count:
        return []
    starts = [session[0].at for session in alive]
    first, last = starts[0], max(session[-1].at for session in alive)
    longest = max(session[-1].at - session[0].at for session in alive)
    found: list[Signal] = []
    for _ in range(100 * count):  # where hardly anybody is ever alive, there are fewer
        at = random.uniform(first, last)
        started = range(bisect_left(starts, at - longest), bisect_right(starts, at))
        now = [alive[i] for i in started if alive[i][-1].at >= at]
        if now:
            session = random.choice(now)
            found.append(Signal(at, session[bisect_right(session, at, key=lambda r: r.at) - 1]))
        if len(found) == count:
            break
    return found
