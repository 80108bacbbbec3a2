"""Traces of several tenants: sessions dealt to tenants who come at the rates of real clients, and a tenant that floods.

No public trace has tenants and contexts: which session is whose is drawn here (all draws from one seed), and what
follows from it is labelled synthetic.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from kvprefetch.cache.spans import Run
from kvprefetch.errors import TraceError
from kvprefetch.sim.formats import rows_of
from kvprefetch.sim.trace import Request, Trace

WINDOW_S = 600.0
LEAD_S = 12 * 3600.0
"""Sessions start so long before the run: those that are alive when it begins are of all ages."""
_SCOPE = 1 << 50  # names of one session's blocks, or of one tenant's tools, stay apart from all others'
_UNIQUE = 1 << 80  # names of a flood's blocks

Profile = tuple[float, ...]
"""A client's requests per second, in windows of `WINDOW_S`."""


@dataclass(frozen=True)
class Dealing:
    """Whose sessions come when: `concurrency` are alive on average in a run of `horizon_s`."""

    tenants: int = 16
    concurrency: float = 16.0
    horizon_s: float = 24 * 3600.0
    seed: int = 0


@dataclass(frozen=True)
class Flood:
    """A tenant that sends unique prompts of `tokens` as a Poisson process of `rate` per second."""

    rate: float
    start_s: float
    end_s: float
    tokens: int = 65_536
    out: int = 100
    tenant: str = "flood"

    def requests(self, block_tokens: int, seed: int) -> list[Request]:
        """All of them, by arrival. No block is ever asked for twice."""
        random, found, blocks = Random(seed + 2), list[Request](), self.tokens // block_tokens
        at = self.start_s + random.expovariate(self.rate)
        while at < self.end_s:
            number = len(found)
            path = ((_UNIQUE + number * (blocks + 1), blocks),)
            found.append(Request(f"{self.tenant}-{number}", self.tenant, at, self.tokens, self.out, None, path))
            at += random.expovariate(self.rate)
        return found


def read_profiles(path: Path) -> list[Profile]:
    """Clients' rates: a line for each, with `windows` of [start in s, requests/s, …]. Raises TraceError."""
    try:
        profiles = [tuple(float(window[1]) for window in row["windows"]) for row in rows_of(path)]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise TraceError(f"{path.name} holds no clients' rates: {type(error).__name__}: {error}") from error
    if not any(any(profile) for profile in profiles):
        raise TraceError(f"{path.name} holds no client that ever sends")
    return profiles


def deal(trace: Trace, profiles: Sequence[Profile], dealing: Dealing) -> Trace:
    """Sessions of `trace` dealt to tenants, whose sessions start in proportion to a client's rate, at a drawn time of
    its record. Everyone has one at least.

    Sessions are those of the trace in a drawn order, over again when all have come, each time with blocks of its own;
    tools are shared by a tenant's sessions. What would come before or after the run is cut off.
    """
    random = Random(dealing.seed)
    families: dict[str, list[tuple[Request, ...]]] = defaultdict(list)
    for session in trace.sessions:
        families[session[0].session.partition("/")[0]].append(session)
    lengths = [max(session[-1].at for session in family) for family in families.values()]
    span = dealing.horizon_s + LEAD_S
    count = round(dealing.concurrency * span * len(lengths) / max(sum(lengths), 1e-9))
    order = list(families.values())
    random.shuffle(order)
    sessions: list[tuple[Request, ...]] = []
    for number, (tenant, start) in enumerate(_starts(profiles, dealing.tenants, count, span, random)):
        for session in order[number % len(order)]:
            moved = (_moved(request, start - LEAD_S, tenant, number) for request in session)
            kept = tuple(request for request in moved if 0 <= request.at < dealing.horizon_s)
            sessions += [kept] if kept else []
    return Trace(trace.block_tokens, tuple(sorted(sessions, key=lambda session: session[0].at)), is_placed=True)


def working_set(trace: Trace) -> float:
    """Tokens of the latest contexts of all sessions that are under way, on average over the run."""
    if not trace.sessions:
        return 0.0
    total, last = 0.0, 0.0
    for session in trace.sessions:
        ends = [request.at for request in session[1:]] + [session[-1].at + (session[-1].busy_s or 0.0)]
        total += sum(request.tokens * (end - request.at) for request, end in zip(session, ends, strict=True))
        last = max(last, ends[-1])
    return total / (last - min(session[0].at for session in trace.sessions))


def _starts(
    profiles: Sequence[Profile], tenants: int, count: int, span: float, random: Random
) -> list[tuple[int, float]]:
    """`count` times with the tenant of each, and one for each tenant at least."""
    windows = int(span / WINDOW_S) or 1
    rates = _cuttings(profiles, tenants, windows, random)
    cells = [(tenant, window) for tenant in range(tenants) for window in range(windows)]
    chosen = [(tenant, random.choices(range(windows), rates[tenant])[0]) for tenant in range(tenants)]
    if count > tenants:
        chosen += random.choices(cells, [rates[tenant][window] for tenant, window in cells], k=count - tenants)
    random.shuffle(chosen)
    return [(tenant, (window + random.random()) * span / windows) for tenant, window in chosen]


def _cuttings(profiles: Sequence[Profile], tenants: int, windows: int, random: Random) -> list[Profile]:
    """For each tenant so many windows of a client's record, in which it sends; clients in turn, in a drawn order."""
    order = [profile for profile in profiles if any(profile)]
    random.shuffle(order)
    found: list[Profile] = []
    while len(found) < tenants:
        profile = order.pop(0)
        order.append(profile)
        first = random.randrange(max(len(profile) - windows, 0) + 1)
        cutting = profile[first : first + windows]
        if any(cutting):
            found.append(cutting + (0.0,) * (windows - len(cutting)))
    return found


def _moved(request: Request, by: float, tenant: int, number: int) -> Request:
    def named(run: Run) -> Run:
        first, count = run
        return (first + (number + 1) * _SCOPE if first >= 0 else first - tenant * _SCOPE), count

    return replace(
        request,
        session=f"{number}.{request.session}",
        tenant=f"tenant-{tenant:02}",
        at=request.at + by,
        path=tuple(map(named, request.path)),
    )
