"""A navigation trace placed on one clock: files opened, edited and asked about. What is drawn comes from one seed.

Each use of a file in the trace is a **visit**: the file is opened, looked at for a while (the dwell), and then asked
about. The dwell is drawn, log-normal with a median of 20 s and not below 2 s; a commit's files are visited one after
the other, and pauses between commits count for 10 minutes at most. An edit, which the trace shows at a file's next
visit, happened after the visit before: from a place in the file that is drawn uniformly, the text is another.
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
    paths = _texts(uses, Random(seed + 2))
    relative, random = {}, Random(seed + 3)
    for numbers in _sessions(uses).values():
        at = 0.0
        for n, number in enumerate(numbers):
            if n:
                pause = uses[number].at - uses[numbers[n - 1]].at
                at += random.uniform(1.0, 5.0) + min(max(pause, 0.0), _PAUSE_S)
            opened, at = at, at + max(random.lognormvariate(log(_DWELL_S), _SPREAD), _SHORTEST_S)
            relative[number] = opened, at
    return _placed(uses, paths, relative, concurrency, seed)


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


def _sessions(uses: Sequence[Event]) -> dict[tuple[str, str], list[int]]:
    sessions: dict[tuple[str, str], list[int]] = {}
    for number, event in enumerate(uses):
        sessions.setdefault((event.tenant, event.session), []).append(number)
    return sessions


def _texts(uses: Sequence[Event], random: Random) -> list[tuple[tuple[Run, ...], Path]]:
    """Each visit's text, and the text that the file has afterwards."""
    library, latest, before = Library(random), dict[tuple[str, str], int](), list[tuple[Run, ...]]()
    after: list[Path] = []
    for number, event in enumerate(uses):
        key = event.tenant, event.context or ""
        blocks = max(min(event.chars // CHARS_PER_TOKEN, _LONGEST) // BLOCK, 1)
        last = latest.get(key)
        text = library.revised(before[last] if last is not None else (), blocks, edited=event.kind in ("M", "T"))
        if last is not None:
            after[last] = text
        before.append(text)
        after.append(() if event.kind == _DELETED else text)
        latest[key] = number
    return list(zip(before, after, strict=True))


def _placed(
    uses: Sequence[Event],
    paths: Sequence[tuple[tuple[Run, ...], Path]],
    relative: dict[int, tuple[float, float]],
    concurrency: float,
    seed: int,
) -> list[Visit]:
    order = list(_sessions(uses).values())
    drafts = []
    for numbers in order:
        requests = []
        for number in numbers:
            event, blocks = uses[number], sum(count for _, count in paths[number][0])
            name = f"{event.tenant}|{event.session}".replace("/", "+")
            tokens = blocks * BLOCK + _QUESTION
            requests.append(Request(name, event.tenant, relative[number][1], tokens, 150, None, paths[number][0]))
        drafts.append(tuple(requests))
    placed = {s[0].session: s for s in place(Trace(BLOCK, tuple(drafts), is_placed=False), concurrency, seed).sessions}
    visits = []
    for numbers, draft in zip(order, drafts, strict=True):
        for number, request in zip(numbers, placed[draft[0].session], strict=True):
            opened, asked = relative[number]
            event = uses[number]
            visits.append(
                Visit(
                    event.context or "", event.user, event.kind, request.at - asked + opened, request, paths[number][1]
                )
            )
    return sorted(visits, key=lambda visit: visit.request.at)


def cold(visits: Sequence[Visit]) -> list[Visit]:
    """The same visits, where no text was ever seen before."""
    names, found = 0, []
    for visit in visits:
        blocks = visit.request.blocks
        found.append(replace(visit, request=replace(visit.request, path=((names, blocks),))))
        names += blocks + 1
    return found
