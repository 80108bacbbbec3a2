"""Traces of several tenants: sessions dealt to tenants who come at the rates of real clients, and a tenant that floods.

No public trace has tenants and contexts: which session is whose is drawn here (all draws from one seed), and what
follows from it is labelled synthetic.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
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

Session = tuple[Request, ...]
Profile = tuple[float, ...]
"""A client's requests per second, in windows of `WINDOW_S`."""


@dataclass(frozen=True)
class Dealing:
    """Whose sessions come when: `concurrency` are alive on average in a run of `horizon_s`."""

    tenants: int = 16
    concurrency: float = 16.0
    horizon_s: float = 24 * 3600.0
    seed: int = 0
    kept: float = 1.0  # share of the sessions of a trace whose times are on one clock already


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
    """Sessions of `trace` dealt to tenants in proportion to clients' rates, cut off at the end of the run.

    Tenants share no block: each has tools of its own, and each session blocks of its own. Of a trace whose times are
    on one clock already, the sessions that are kept come when they came.
    """
    random = Random(dealing.seed)
    dealt = _dealt_as_it_is if trace.is_placed else _dealt
    sessions = [
        kept
        for session in dealt(trace, profiles, dealing, random)
        if (kept := tuple(request for request in session if 0 <= request.at < dealing.horizon_s))
    ]
    return Trace(trace.block_tokens, tuple(sorted(sessions, key=lambda session: session[0].at)), is_placed=True)


def _dealt(trace: Trace, profiles: Sequence[Profile], dealing: Dealing, random: Random) -> Iterator[Session]:
    """Sessions in a drawn order, over again when all have come. They start as their tenant's client sends, at a drawn
    time of its record; everyone has one at least.
    """
    families: dict[str, list[Session]] = defaultdict(list)
    for session in trace.sessions:
        families[session[0].session.partition("/")[0]].append(session)
    lengths = [max(session[-1].at for session in family) for family in families.values()]
    span = dealing.horizon_s + LEAD_S
    count = round(dealing.concurrency * span * len(lengths) / max(sum(lengths), 1e-9))
    order = list(families.values())
    random.shuffle(order)
    for number, (tenant, start) in enumerate(_starts(profiles, dealing.tenants, count, span, random)):
        for session in order[number % len(order)]:
            yield tuple(_moved(request, start - LEAD_S, tenant, number + 1) for request in session)


def _dealt_as_it_is(trace: Trace, profiles: Sequence[Profile], dealing: Dealing, random: Random) -> Iterator[Session]:
    """Each session to a tenant drawn by its client's rate, the first ones to one tenant each."""
    windows = int(dealing.horizon_s / WINDOW_S) or 1
    rates = [sum(cutting) for cutting in _cuttings(profiles, dealing.tenants, windows, random)]
    sessions = [session for session in trace.sessions if random.random() < dealing.kept]
    for number, session in enumerate(sessions):
        tenant = number if number < dealing.tenants else random.choices(range(dealing.tenants), rates)[0]
        yield tuple(_moved(request, 0.0, tenant, tenant + 1) for request in session)


def working_set(trace: Trace) -> float:
    """Tokens of the latest contexts of all sessions that are under way, on average over the run."""
    if not trace.sessions:
        return 0.0
    total, last = 0.0, 0.0
    for session in trace.sessions:
        ends = [request.at for request in session[1:]] + [session[-1].at + (session[-1].busy_s or 0.0)]
        total += sum(request.tokens * (end - request.at) for request, end in zip(session, ends, strict=True))
        last = max(last, ends[-1])
    return total / max(last - min(session[0].at for session in trace.sessions), 1e-9)


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


def _moved(request: Request, by: float, tenant: int, scope: int) -> Request:
    """It comes `by` seconds later, as the tenant's, with blocks named in this scope; tools are in the tenant's."""

    def named(run: Run) -> Run:
        first, count = run
        return (first + scope * _SCOPE if first >= 0 else first - tenant * _SCOPE), count

    return replace(
        request,
        session=f"{scope}.{request.session}",
        tenant=f"tenant-{tenant:02}",
        at=request.at + by,
        path=tuple(map(named, request.path)),
    )
