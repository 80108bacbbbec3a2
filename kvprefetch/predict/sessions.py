"""Who comes back, and when: what each session did last, and the gap that is open since.

State is bounded: `max_sessions` sessions of all tenants together, the longest idle forgotten first (their gaps stay
counted as far as they were seen), some 450 bytes each, 750 with a signal; and the cells of `GapModel` and `Shares`. How
often gaps end and how much is kept is shared between tenants, nothing else. A session's name says whose it is: two
tenants must not use the same one.
"""

import heapq
from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import count
from math import inf, log, log2

from kvprefetch.predict.gaps import BINS, EDGES, Cell, GapModel, Levels, bin_of
from kvprefetch.predict.outlook import Outlook
from kvprefetch.predict.rates import Shares

_IDLE = (5.0, 60.0, 300.0, 900.0, 1800.0, 3600.0, 7200.0, 14_400.0, 43_200.0)
"""Stretches of idleness that are told apart."""
_SOON_S = 10.0
_CROSSED = 256  # bins that one event counts as outlived, at most: a live request waits for it
_FORGET = 0.9  # what a session's longest gap counts for after another one
_STEP = 16_384  # tokens


@dataclass(slots=True, eq=False)
class Gap:
    """An open gap: counted from `since`, it has outlived all bins before `bin`."""

    session: str
    cell: Cell
    since: float
    bin: int = 0
    is_open: bool = True


@dataclass(slots=True, eq=False)
class Quiet:
    """A session, and while no request of it runs, the gap since its last turn and since its last signal."""

    session: str
    tenant: str
    tokens: int = 0  # of its latest prompt
    longest: float = 0.0  # of its gaps so far, older ones faded
    turn_at: float = 0.0  # when its last turn ended
    running: int = 0  # requests of it that are being served
    turn: Gap | None = None
    signal: Gap | None = None

    @property
    def latest(self) -> Gap | None:
        """What says most about its return."""
        return self.signal or self.turn


@dataclass
class Sessions:
    """See the module's promises. Events may come late or twice: time never runs backwards here."""

    max_sessions: int = 100_000
    gaps: GapModel = field(default_factory=GapModel)
    known: OrderedDict[str, Quiet] = field(default_factory=OrderedDict)
    kept_shares: Shares = field(default_factory=lambda: Shares(start=0.9))
    now: float = 0.0
    _crossings: list[tuple[float, int, Gap]] = field(default_factory=list)
    _order: "count[int]" = field(default_factory=count)

    # -- events ----------------------------------------------------------------------------------------
    def requested(self, session: str, tenant: str, now: float, kept: float | None = None) -> None:
        """A request of the session has come: its open gap has ended.

        `kept`: the share of its previous prompt that this one begins with, where known.
        """
        now = self._advance(now)
        quiet = self._know(session, tenant)
        if quiet.turn is not None:
            quiet.longest = max(quiet.longest * _FORGET, now - quiet.turn_at)
            if kept is not None:
                self.kept_shares.learn(_kept_levels(quiet, now), min(max(kept, 0.0), 1.0))
        for gap in _gaps(quiet):
            self._catch_up(gap, now)
            self.gaps.ended(gap.cell, now - gap.since)
        self._close(quiet)
        quiet.running += 1

    def turn_ended(self, session: str, tenant: str, now: float, kind: str = "", tokens: int = 0) -> None:
        """Its answer is complete. `kind`: what it ended with, such as "tool_use"; `tokens` of its prompt.

        The gap to its next request is counted from here, unless another of its requests still runs.
        """
        now = self._advance(now)
        quiet = self._know(session, tenant)
        self._close(quiet)
        quiet.running = max(quiet.running - 1, 0)
        longest, size = int(log(quiet.longest + 1)), tokens // _STEP
        grown = max(tokens - quiet.tokens, 0).bit_length()
        quiet.turn_at, quiet.tokens = now, tokens
        levels = (
            "turn",
            ("turn", kind),
            ("turn", kind, longest),
            ("turn", kind, longest, size),
            ("turn", kind, longest, size, grown),
            ("turn", kind, longest, size, grown, tenant),
        )
        if not quiet.running:
            quiet.turn = self._open(session, levels, now)

    def signalled(self, session: str, tenant: str, now: float, kind: str) -> None:
        """Something was observed in it: another gap is counted from now, if it is quiet.

        How much a signal says depends on how likely a return was without it: a signal of a session that is hardly
        ever back at this age is mostly a false one. So the new gap's cell is that of the kind and of those odds.
        """
        now = self._advance(now)
        quiet = self._know(session, tenant)
        if quiet.running:
            return
        if quiet.signal is not None:
            quiet.signal.is_open = False
        odds = None  # nothing is known of a session that had no turn yet
        if quiet.turn is not None:
            soon = quiet.turn.cell.within(now - quiet.turn_at, _SOON_S)
            odds = round(log2(max(soon, 1e-6) / max(1 - soon, 1e-6)))
        quiet.signal = self._open(
            session, (("signal", kind), ("signal", kind, odds), ("signal", kind, odds, tenant)), now
        )

    def ended(self, session: str, now: float) -> None:
        """The session is over; no request of it will come."""
        self._advance(now)
        quiet = self.known.pop(session, None)
        if quiet is not None:
            self._close(quiet)

    def resumed(self) -> None:
        """Another run goes on with what was learnt: its clock is another, and nobody is known to be quiet."""
        self.known.clear()
        self._crossings.clear()
        self.now = 0.0

    # -- outlook ---------------------------------------------------------------------------------------
    def index(self, session: str, now: float) -> float:
        """The rate, per second, at which holding the session's context pays; inf while a request runs; 0 unknown."""
        quiet = self.known.get(session)
        if quiet is None:
            return 0.0
        if quiet.running:
            return inf
        return max((gap.cell.index(max(now - gap.since, 0.0)) for gap in _gaps(quiet)), default=0.0)

    def unknown_index(self, age: float) -> float:
        """The same for a context of nobody in particular, last used `age` s ago."""
        return self.gaps.cell(("turn",)).index(max(age, 0.0))

    def is_current(self, session: str, last_used: float) -> bool:
        """Whether what was last used then belongs to the session's latest turn, and not to a branch it has left."""
        quiet = self.known.get(session)
        return quiet is not None and quiet.turn is not None and last_used >= quiet.turn_at

    def is_quiet(self, session: str) -> bool:
        """Whether it is known and no request of it runs."""
        quiet = self.known.get(session)
        return quiet is not None and quiet.turn is not None

    def idle(self, session: str, now: float) -> int:
        """How long it has been quiet, as a number on a short scale."""
        quiet = self.known.get(session)
        return bin_among(now - quiet.turn_at, _IDLE) if quiet else -1

    def kept(self, session: str, now: float) -> float:
        """The share of its context that its next request will probably begin with, if it comes about now."""
        quiet = self.known.get(session)
        return self.kept_shares.mean(_kept_levels(quiet, now)) if quiet else 0.0

    def outlook(self, session: str, now: float, work_s: float, hold_s: float | None = None) -> Outlook:
        """When its next request comes, as a job of `work_s` seconds needs to know it.

        It is held for `hold_s`, or for as long as holding it pays best.
        """
        quiet = self.known.get(session)
        gap = quiet.latest if quiet else None
        if gap is None:
            return Outlook(0.0, 0.0, 0.0, 0.0, 0.0)
        age, cell = max(now - gap.since, 0.0), gap.cell
        hold = cell.hold(age) if hold_s is None else hold_s
        return Outlook(
            within=cell.within(age, hold),
            before_ready=cell.within(age, min(work_s, hold)),
            residency=cell.residency(age, hold),
            hold_s=hold,
            index=self.index(session, now),
        )

    def outcomes(self, session: str) -> float:
        """How many gaps of this kind were seen to end."""
        quiet = self.known.get(session)
        gap = quiet.latest if quiet else None
        return gap.cell.gaps if gap else 0.0

    # -- within ----------------------------------------------------------------------------------------
    def _know(self, session: str, tenant: str) -> Quiet:
        quiet = self.known.get(session)
        if quiet is None:
            quiet = self.known[session] = Quiet(session, tenant)
            if len(self.known) > self.max_sessions:
                _, forgotten = self.known.popitem(last=False)
                self._close(forgotten)
        self.known.move_to_end(session)
        return quiet

    def _open(self, session: str, levels: Levels, now: float) -> Gap:
        gap = Gap(session, self.gaps.cell(levels), now)
        self._cross(gap)
        return gap

    def _close(self, quiet: Quiet) -> None:
        """Its gaps are not watched any more; they did not end."""
        for gap in _gaps(quiet):
            gap.is_open = False
        quiet.turn = quiet.signal = None

    def _cross(self, gap: Gap) -> None:
        """Be woken when the open gap has outlived its bin."""
        if gap.bin < BINS - 1:
            heapq.heappush(self._crossings, (gap.since + EDGES[gap.bin + 1], next(self._order), gap))
            if len(self._crossings) > 4 * len(self.known) + 64:  # most are of gaps that are closed
                self._crossings = [crossing for crossing in self._crossings if crossing[2].is_open]
                heapq.heapify(self._crossings)

    def _advance(self, now: float) -> float:
        """Count what open gaps have outlived until `now`; a clock that jumps back stands still here."""
        if not self.now < now < inf:  # also NaN
            return self.now
        self.now = now
        for _ in range(_CROSSED):  # after a long silence there are many: the next events count the others
            if not self._crossings or self._crossings[0][0] > now:
                break
            _, _, gap = heapq.heappop(self._crossings)
            if gap.is_open:
                self._outlive(gap)
                self._cross(gap)
        return now

    def _outlive(self, gap: Gap) -> None:
        self.gaps.outlived(gap.cell, gap.bin)
        gap.bin += 1

    def _catch_up(self, gap: Gap, now: float) -> None:
        """Count the bins that a gap which ends now has outlived and nobody has counted yet."""
        last = bin_of(now - gap.since)
        while gap.bin < last:
            self._outlive(gap)


def _gaps(quiet: Quiet) -> tuple[Gap, ...]:
    return tuple(gap for gap in (quiet.turn, quiet.signal) if gap is not None)


def _kept_levels(quiet: Quiet, now: float) -> Levels:
    idle = bin_among(now - quiet.turn_at, _IDLE)
    size = quiet.tokens // 20_000
    return ("kept", ("kept", idle), ("kept", idle, size), ("kept", idle, size, quiet.tenant))


def bin_among(value: float, edges: tuple[float, ...]) -> int:
    """Which stretch between `edges` it lies in."""
    return sum(value >= edge for edge in edges)
