"""A navigation trace placed on one clock: files opened, edited and asked about. What is drawn comes from one seed.

Each use of a file in the trace is a **visit**: the file is opened, looked at for a while (the dwell), and then asked
about. The dwell is drawn, log-normal with a median of 20 s and not below 2 s; a commit's files are visited one after
the other, and pauses between commits count for 10 minutes at most. Sessions start as a Poisson process; a tenant's
keep the order of the trace. An edit, which the trace shows at a file's next visit, happened right after the visit
before: from a place in the file that is drawn uniformly, the text is another.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import log
from random import Random

from kvprefetch.cache.spans import Path, Run
from kvprefetch.sim.arrivals import Signals, place
from kvprefetch.sim.events import Event
from kvprefetch.sim.trace import Request, Trace, joined

BLOCK = 32
CHARS_PER_TOKEN = 4
_QUESTION = 128  # tokens after the file's
_LONGEST = 128_000  # tokens of a file
_DWELL_S, _SPREAD, _SHORTEST_S = 20.0, 0.8, 2.0
_PAUSE_S = 600.0
_DELETED = "D"


@dataclass(frozen=True, slots=True)
class Visit:
    """A file is opened at `opened`, and `request` asks about it. Times in seconds on the run's clock."""

    context: str
    user: str
    kind: str  # what was done to the file
    opened: float
    request: Request
    after: Path  # the file's text from then on; () when it is deleted
    is_new: bool = False  # nobody knows this file before it is opened


@dataclass(frozen=True, slots=True)
class Opening:
    """A signal: the session's user opened this file, and perhaps will ask about it."""

    at: float
    session: str
    tenant: str
    user: str
    context: str


class Library:
    """Which text each file has, version by version: a path of named blocks."""

    def __init__(self, random: Random) -> None:
        self.random, self.names = random, 0

    def revised(self, path: Path, blocks: int, edited: bool) -> tuple[Run, ...]:
        """The next version, of `blocks` blocks: what lies before the edit stays."""
        kept = min(sum(count for _, count in path), blocks)
        if edited and kept:
            kept = self.random.randrange(kept)
        runs: list[Run] = []
        for first, count in path:
            take = min(count, kept - sum(count for _, count in runs))
            if take > 0:
                runs.append((first, take))
        fresh = blocks - sum(count for _, count in runs)
        if fresh:
            runs.append((self.names, fresh))
            self.names += fresh + 1  # a gap, so that other files' blocks never look like a continuation
        return joined(runs)


def place_visits(events: Sequence[Event], concurrency: float, seed: int) -> list[Visit]:
    """The visits, in order of their questions; `concurrency` sessions are alive on average."""
    uses = [event for event in events if event.context is not None]
    relative, random = {}, Random(seed + 3)
    for numbers in _sessions(uses).values():
        at = 0.0
        for n, number in enumerate(numbers):
            if n:
                pause = uses[number].at - uses[numbers[n - 1]].at
                at += random.uniform(1.0, 5.0) + min(max(pause, 0.0), _PAUSE_S)
            opened, at = at, at + max(random.lognormvariate(log(_DWELL_S), _SPREAD), _SHORTEST_S)
            relative[number] = opened, at
    starts = _starts(uses, relative, concurrency, seed)
    order = sorted(relative, key=lambda n: starts[_session(uses[n])] + relative[n][1])
    texts = _texts([uses[number] for number in order], Random(seed + 2))
    visits = []
    for number, text in zip(order, texts, strict=True):
        event, (opened, asked) = uses[number], relative[number]
        start, blocks = starts[_session(event)], sum(count for _, count in text.path)
        name = f"{event.tenant}|{event.session}".replace("/", "+")
        request = Request(name, event.tenant, start + asked, blocks * BLOCK + _QUESTION, 150, None, text.path)
        visits.append(Visit(event.context or "", event.user, event.kind, start + opened, request, text.after, text.new))
    return visits


def draw_openings(visits: Sequence[Visit], signals: Signals, seed: int) -> list[Opening]:
    """Each visit's opening is seen with probability `recall`; false ones are of a known file in a session then alive.

    A false opening's file is drawn among the tenant's files that were visited before; the user asks nothing.
    """
    random = Random(seed + 4)
    true = [visit for visit in visits if random.random() < signals.recall]
    openings = [
        Opening(v.opened, v.request.session, v.request.tenant, v.user, v.context) for v in true if signals.precision > 0
    ]
    share = (1 - signals.precision) / signals.precision if signals.precision > 0 else 1.0
    for _ in range(round(len(true) * share) if visits else 0):
        somewhere = random.randrange(len(visits))
        host = visits[somewhere]  # alive about then
        known = visits[random.randrange(somewhere + 1)]
        if known.request.tenant == host.request.tenant:
            at = host.request.at + random.uniform(0.0, _DWELL_S)
            openings.append(Opening(at, host.request.session, host.request.tenant, host.user, known.context))
    return sorted(openings, key=lambda opening: opening.at)


def _session(event: Event) -> tuple[str, str]:
    return event.tenant, event.session


def _sessions(uses: Sequence[Event]) -> dict[tuple[str, str], list[int]]:
    sessions: dict[tuple[str, str], list[int]] = {}
    for number, event in enumerate(uses):
        sessions.setdefault(_session(event), []).append(number)
    return sessions


def _starts(
    uses: Sequence[Event], relative: dict[int, tuple[float, float]], concurrency: float, seed: int
) -> dict[tuple[str, str], float]:
    """When each session starts. Whose turn it is, is drawn; a tenant's sessions keep their order, as its files do."""
    sessions = _sessions(uses)
    drafts = []
    for number, numbers in enumerate(sessions.values()):
        tenant, asked = uses[numbers[0]].tenant, [relative[n][1] for n in numbers]
        drafts.append(tuple(Request(str(number), tenant, at, 1, 0, None, ()) for at in asked))
    slots: dict[str, list[float]] = {}
    for draft in place(Trace(BLOCK, tuple(drafts), is_placed=False), concurrency, seed).sessions:
        slots.setdefault(draft[0].tenant, []).append(draft[0].at - drafts[int(draft[0].session)][0].at)
    turns = {tenant: iter(sorted(starts)) for tenant, starts in slots.items()}
    return {session: next(turns[session[0]]) for session in sessions}


@dataclass(slots=True)
class _Text:
    """A file as one visit finds it, and leaves it."""

    path: tuple[Run, ...]
    new: bool
    after: Path


def _texts(uses: Sequence[Event], random: Random) -> list[_Text]:
    """Each visit's text. What follows on a deletion is another file."""
    library, latest, texts = Library(random), dict[tuple[str, str], _Text](), list[_Text]()
    for event in uses:
        key = event.tenant, event.context or ""
        blocks = max(min(event.chars // CHARS_PER_TOKEN, _LONGEST) // BLOCK, 1)
        last = latest.pop(key, None)
        path = library.revised(last.path if last else (), blocks, edited=event.kind in ("M", "T"))
        if last:
            last.after = path
        text = _Text(path, last is None, after=() if event.kind == _DELETED else path)
        texts.append(text)
        if event.kind != _DELETED:
            latest[key] = text
    return texts


def cold(visits: Sequence[Visit]) -> list[Visit]:
    """The same visits, where no text was ever seen before."""
    names, found = 0, []
    for visit in visits:
        blocks = visit.request.blocks
        found.append(replace(visit, request=replace(visit.request, path=((names, blocks),))))
        names += blocks + 1
    return found
