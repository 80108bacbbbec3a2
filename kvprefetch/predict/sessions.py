"""Who comes back, and when: what each session did last, and the gap that is open since.

State is bounded: `max_sessions` sessions, the longest idle forgotten first (their gaps stay counted as far as they were
seen), about 400 bytes each; and the cells of `GapModel`. Numbers of gaps are shared between tenants, nothing else.
"""

import heapq
from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import count
from math import log2

from kvprefetch.predict.gaps import BINS, EDGES, GapModel, Levels
from kvprefetch.predict.outlook import Outlook
from kvprefetch.predict.rates import Shares

_LONG = (5.0, 60.0, 600.0)  # what a session's last gap was like
_IDLE = (
    5.0,
    60.0,
    300.0,
    900.0,
    1800.0,
    3600.0,
    7200.0,
    14_400.0,
    43_200.0,
)  # how long it was quiet when a signal came
_SOON_S = 10.0
_TURNS = (1, 2, 4, 8)


@dataclass(slots=True, eq=False)
class Quiet:
    """A session between its requests."""

    session: str
    tenant: str
    turns: int = 0
    tokens: int = 0  # of its latest prompt
    last_gap: float | None = None
    levels: Levels = ()
    since: float = 0.0  # the event that the open gap is counted from
    turn_at: float = 0.0  # when its last turn ended
    turn_levels: Levels = ()
    bin: int = 0  # the open gap has outlived all bins before this one
    is_open: bool = False


@dataclass
class Sessions:
    """See the module's promises. Events may come late or twice: time never runs backwards here."""

    max_sessions: int = 100_000
    gaps: GapModel = field(default_factory=GapModel)
    known: OrderedDict[str, Quiet] = field(default_factory=OrderedDict)
    kept_shares: Shares = field(default_factory=lambda: Shares(start=0.9))
    now: float = 0.0
    _crossings: list[tuple[float, int, Quiet, float]] = field(default_factory=list)
    _order: "count[int]" = field(default_factory=count)

    # -- events ----------------------------------------------------------------------------------------
    def requested(self, session: str, tenant: str, now: float, kept: float | None = None) -> None:
        """A request of the session has come: its open gap has ended.

        `kept`: the share of its previous prompt that this one begins with, where known.
        """
        now = self._advance(now)
        quiet = self._know(session, tenant)
        if quiet.is_open:
            self.gaps.ended(quiet.levels, now - quiet.since)
            quiet.last_gap = now - quiet.turn_at
            if kept is not None:
                self.kept_shares.learn(_kept_levels(quiet, now), min(max(kept, 0.0), 1.0))
        quiet.is_open = False

    def turn_ended(self, session: str, tenant: str, now: float, kind: str = "", tokens: int = 0) -> None:
        """Its answer is complete. `kind`: what it ended with, such as "tool_use"; `tokens` of its prompt."""
        now = self._advance(now)
        quiet = self._know(session, tenant)
        quiet.turns += 1
        quiet.turn_at = now
        size, grown = tokens.bit_length(), max(tokens - quiet.tokens, 0).bit_length()
        quiet.tokens = tokens
        turns, last = bin_among(quiet.turns, _TURNS), bin_among(quiet.last_gap, _LONG)
        quiet.turn_levels = (
            "turn",
            ("turn", kind, turns),
            ("turn", kind, turns, last),
            ("turn", kind, turns, last, size),
            ("turn", kind, turns, last, size, grown),
            ("turn", kind, turns, last, size, grown, tenant),
        )
        self._open(quiet, quiet.turn_levels, now)

    def signalled(self, session: str, tenant: str, now: float, kind: str) -> None:
        """Something was observed in it: a new gap is counted from now, if it is quiet.

        How much a signal says depends on how likely a return was without it: a signal of a session that is hardly
        ever back at this age is mostly a false one. So the new gap's cell is that of the kind and of those odds.
        """
        now = self._advance(now)
        quiet = self._know(session, tenant)
        if not quiet.is_open:
            return
        soon = self.gaps.within(quiet.turn_levels, now - quiet.turn_at, _SOON_S)
        odds = round(log2(max(soon, 1e-6) / max(1 - soon, 1e-6)))
        levels = (("signal", kind), ("signal", kind, odds), ("signal", kind, odds, tenant))
        self._open(quiet, levels, now)

    def ended(self, session: str, now: float) -> None:
        """The session is over; no request of it will come."""
        self._advance(now)
        self.known.pop(session, None)

    # -- outlook ---------------------------------------------------------------------------------------
    def index(self, session: str, now: float) -> float:
        """The rate, per second, at which holding the session's context pays; inf while a request runs; 0 unknown."""
        quiet = self.known.get(session)
        if quiet is None:
            return 0.0
        if not quiet.is_open:
            return float("inf")
        return self.gaps.index(quiet.levels, max(now - quiet.since, 0.0))

    def is_current(self, session: str, last_used: float) -> bool:
        """Whether what was last used then belongs to the session's latest turn, and not to a branch it has left."""
        quiet = self.known.get(session)
        return quiet is not None and quiet.is_open and last_used >= quiet.turn_at

    def within(self, session: str, now: float, horizon: float) -> float:
        """P(its next request comes within `horizon` s); 0 if it is unknown or running."""
        quiet = self.known.get(session)
        if quiet is None or not quiet.is_open:
            return 0.0
        return self.gaps.within(quiet.levels, max(now - quiet.since, 0.0), horizon)

    def is_quiet(self, session: str) -> bool:
        """Whether it is known and no request of it runs."""
        quiet = self.known.get(session)
        return quiet is not None and quiet.is_open

    def idle(self, session: str, now: float) -> int:
        """How long it has been quiet, as a number on a short scale."""
        quiet = self.known.get(session)
        return bin_among(now - quiet.turn_at, _IDLE) if quiet else -1

    def kept(self, session: str, now: float) -> float:
        """The share of its context that its next request will probably begin with, if it comes about now."""
        quiet = self.known.get(session)
        return self.kept_shares.mean(_kept_levels(quiet, now)) if quiet else 0.0

    def outlook(self, session: str, now: float, work_s: float) -> Outlook:
        """When its next request comes, as a job of `work_s` seconds needs to know it."""
        quiet = self.known.get(session)
        if quiet is None or not quiet.is_open:
            return Outlook(0.0, 0.0, 0.0, 0.0, 0.0)
        age, levels, gaps = max(now - quiet.since, 0.0), quiet.levels, self.gaps
        hold = gaps.hold(levels, age)
        return Outlook(
            within=gaps.within(levels, age, hold),
            before_ready=gaps.within(levels, age, min(work_s, hold)),
            residency=gaps.residency(levels, age, hold),
            hold_s=hold,
            index=gaps.index(levels, age),
        )

    def outcomes(self, session: str) -> float:
        """How many gaps of this kind were seen to end."""
        quiet = self.known.get(session)
        return self.gaps.gaps(quiet.levels) if quiet and quiet.levels else 0.0

    # -- within ----------------------------------------------------------------------------------------
    def _know(self, session: str, tenant: str) -> Quiet:
        quiet = self.known.get(session)
        if quiet is None:
            quiet = self.known[session] = Quiet(session, tenant)
            if len(self.known) > self.max_sessions:
                self.known.popitem(last=False)
        self.known.move_to_end(session)
        return quiet

    def _open(self, quiet: Quiet, levels: Levels, now: float) -> None:
        quiet.levels, quiet.since, quiet.bin, quiet.is_open = levels, now, 0, True
        self._cross(quiet)

    def _cross(self, quiet: Quiet) -> None:
        """Be woken when the open gap has outlived its bin."""
        if quiet.bin < BINS - 1:
            when = quiet.since + EDGES[quiet.bin + 1]
            heapq.heappush(self._crossings, (when, next(self._order), quiet, quiet.since))

    def _advance(self, now: float) -> float:
        """Count what open gaps have outlived until `now`; a clock that jumps back stands still here."""
        if not now > self.now:  # also NaN
            return self.now
        if now == float("inf"):
            return self.now
        self.now = now
        while self._crossings and self._crossings[0][0] <= now:
            _, _, quiet, since = heapq.heappop(self._crossings)
            if not quiet.is_open or quiet.since != since:
                continue
            self.gaps.outlived(quiet.levels, quiet.bin)
            quiet.bin += 1
            if self.known.get(quiet.session) is quiet:
                self._cross(quiet)
        return now


def _kept_levels(quiet: Quiet, now: float) -> Levels:
    idle = bin_among(now - quiet.turn_at, _IDLE)
    size = quiet.tokens // 20_000
    return ("kept", ("kept", idle), ("kept", idle, size), ("kept", idle, size, quiet.tenant))


def bin_among(value: float | None, edges: tuple[float, ...]) -> int:
    """Which stretch between `edges` it lies in; −1 for none."""
    return -1 if value is None else sum(value >= edge for edge in edges)
