"""The books of speculation (law 6): every prefetch one outcome, every resident one a use.

Pure: told what happened, with the time; asks nothing. Tokens are counted per block: a block computed
speculatively is *used* once a live request has matched it, so `computed = used + wasted` at any moment.
"""

import heapq
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from kvprefetch.cache.keys import BlockKey
from kvprefetch.cache.misses import Lookup
from kvprefetch.outcomes import MissReason, Outcome, Result, Use


@dataclass(eq=False)
class Ticket:
    """One prefetch. `result` is set once, then `use` once if blocks were left resident."""

    number: int
    tenant: str
    session: str
    probability: float
    issued_at: float
    expected_at: float
    hold_s: float
    because: str
    result: Result | None = None
    use: Use | None = None
    used_tokens: int = 0
    keys: Sequence[BlockKey] = ()
    found: int = 0  # blocks that were resident before any work was done for it
    outlives_pool: bool = False  # it is enough that its blocks lie in another tier, from which they are loaded
    overtaken: bool = False  # a request for the whole context came before it was done
    unspent: set[BlockKey] = field(default_factory=set)  # its resident keys nobody used yet
    settled: Callable[["Ticket"], None] | None = None  # called once it has its use

    @property
    def expires_at(self) -> float:
        """When nobody can be expected to want it any more."""
        return self.expected_at + self.hold_s


@dataclass
class Ledger:
    """See the module's promises."""

    outcomes: Counter[Outcome] = field(default_factory=Counter)
    uses: Counter[Use] = field(default_factory=Counter)
    issued: int = 0
    tokens_computed: int = 0
    tokens_used: int = 0
    tokens_abandoned: int = 0
    seconds: float = 0.0
    lookups: int = 0
    looked_up: Counter[str] = field(default_factory=Counter)  # blocks: "total", "hits", "loaded", by miss reason
    evicted_by: Counter[str] = field(default_factory=Counter)  # missed blocks, by the rule that evicted them
    open_by: Counter[str] = field(default_factory=Counter)  # open prefetches by tenant
    _closed: int = 0  # of the issued: those with nothing to come
    _numbers: Any = field(default_factory=count)
    _waiting: dict[BlockKey, list[Ticket]] = field(default_factory=dict)  # by the context's last key
    _resident: dict[BlockKey, list[Ticket]] = field(default_factory=dict)  # by every unspent key
    _holds: list[tuple[float, int, Ticket]] = field(default_factory=list)  # heap by end of hold

    def issue(
        self,
        now: float,
        *,
        tenant: str,
        session: str,
        probability: float,
        expected_in_s: float,
        hold_s: float,
        because: str,
    ) -> Ticket:
        """Open a ticket for a new prefetch."""
        self.issued += 1
        self.open_by[tenant] += 1
        return Ticket(next(self._numbers), tenant, session, probability, now, now + expected_in_s, hold_s, because)

    def start(self, ticket: Ticket, keys: Sequence[BlockKey], found: int) -> None:
        """Its context is rendered to `keys`, of which the first `found` are resident already."""
        ticket.keys, ticket.found = keys, found
        if keys:
            self._waiting.setdefault(keys[-1], []).append(ticket)

    def resolve(self, ticket: Ticket, result: Result, now: float, resident: int = 0) -> None:
        """Its outcome; the first `resident` keys are in the pool. A second outcome is ignored."""
        if ticket.result is not None:
            return
        ticket.result = result
        self.outcomes[result.outcome] += 1
        if ticket.keys:
            _drop(self._waiting, ticket.keys[-1], ticket)
        if not result.outcome.is_resident:
            self._close(ticket)
            return
        if ticket.overtaken:
            self._use(ticket, Use.LATE)
            return
        # where nothing was added, only a request for all of it is taken for a use
        first = min(ticket.found, resident - 1) if result.outcome is not Outcome.ALREADY_WARM else resident - 1
        ticket.unspent = set(ticket.keys[max(first, 0) : resident])
        if not ticket.unspent:  # less than a block: there is nothing that could be used
            self._use(ticket, Use.UNUSED)
            return
        for key in ticket.unspent:
            self._resident.setdefault(key, []).append(ticket)
        heapq.heappush(self._holds, (now + ticket.hold_s, ticket.number, ticket))
        self._forget_the_used()

    def note_lookup(self, keys: Sequence[BlockKey], lookup: Lookup, block_tokens: int) -> None:
        """A live request for `keys` was served; `lookup` says what it found."""
        self.lookups += 1
        self.looked_up.update({"total": lookup.blocks, "hits": lookup.hits, "loaded": lookup.loaded})
        self.looked_up.update({reason.value: blocks for reason, blocks in lookup.misses.items()})
        self.evicted_by.update(lookup.rules)
        self.note_use(keys, lookup, block_tokens)

    def note_use(self, keys: Sequence[BlockKey], lookup: Lookup, block_tokens: int) -> None:
        """Prefetches for these `keys` have come true as far as `lookup` found them: those borrowed from others, say."""
        for key in keys:
            for ticket in self._waiting.get(key, ()):
                ticket.overtaken = True
        deepest: dict[Ticket, int] = {}
        for depth, key in enumerate(keys[: lookup.hits + lookup.loaded], start=1):
            for ticket in self._resident.get(key, ()):
                if depth <= lookup.hits or ticket.outlives_pool:
                    deepest[ticket] = depth
        for ticket, depth in deepest.items():
            ticket.used_tokens = depth * block_tokens
            self._use(ticket, Use.USED)

    def note_not_loaded(self, blocks: int, reason: MissReason) -> None:
        """So many blocks of a look-up that were to be loaded have to be computed after all."""
        self.looked_up["loaded"] -= blocks
        self.looked_up[reason.value] += blocks

    def note_evicted(self, key: BlockKey) -> None:
        """A resident block is gone; a ticket whose last unused block it was, is EVICTED."""
        for ticket in [t for t in self._resident.get(key, ()) if not t.outlives_pool]:
            _drop(self._resident, key, ticket)
            ticket.unspent.discard(key)
            if not ticket.unspent:
                self._use(ticket, Use.EVICTED)

    def expire_holds(self, now: float) -> None:
        """Resident tickets whose hold has run out are UNUSED."""
        while self._holds and self._holds[0][0] <= now:
            _, _, ticket = heapq.heappop(self._holds)
            self._use(ticket, Use.UNUSED)

    def end_session(self, session: str) -> None:
        """The session is over: its unused tickets are UNUSED."""
        for _, _, ticket in self._holds:
            if ticket.session == session:
                self._use(ticket, Use.UNUSED)

    @property
    def open(self) -> int:
        """Prefetches that wait for their outcome or their use."""
        return self.issued - self._closed

    def stats(self) -> dict[str, Any]:
        """Counts since the start; `outcomes` and `uses` sum to `issued` with what is still open."""
        resident = sum(n for outcome, n in self.outcomes.items() if outcome.is_resident)
        return {
            "issued": self.issued,
            "pending": self.issued - self.outcomes.total(),
            "outcomes": {outcome.name: self.outcomes[outcome] for outcome in Outcome},
            "uses": {use.name: self.uses[use] for use in Use},
            "use_pending": resident - self.uses.total(),
            "tokens_computed": self.tokens_computed,
            "tokens_used": self.tokens_used,
            "tokens_wasted": self.tokens_computed - self.tokens_used,
            "tokens_abandoned": self.tokens_abandoned,
            "seconds": self.seconds,
        }

    def lookup_stats(self) -> dict[str, Any]:
        """Look-ups in blocks: `hits`, `loaded` and the misses by reason sum to `blocks`."""
        reasons = {k: v for k, v in self.looked_up.items() if k not in ("total", "hits", "loaded") and v}
        return {
            "count": self.lookups,
            "blocks": self.looked_up["total"],
            "hits": self.looked_up["hits"],
            "loaded": self.looked_up["loaded"],
            "misses": reasons,
            "evicted_by": dict(self.evicted_by),
        }

    def _use(self, ticket: Ticket, use: Use) -> None:
        if ticket.use is not None:
            return
        ticket.use = use
        self.uses[use] += 1
        self._close(ticket)
        for key in ticket.unspent:
            _drop(self._resident, key, ticket)
        ticket.unspent = set()
        if ticket.settled is not None:
            ticket.settled(ticket)

    def _close(self, ticket: Ticket) -> None:
        """Nothing is to come of it any more."""
        self._closed += 1
        self.open_by[ticket.tenant] -= 1
        if not self.open_by[ticket.tenant]:
            del self.open_by[ticket.tenant]

    def _forget_the_used(self) -> None:
        """Long holds of tickets that were used meanwhile must not pile up."""
        if len(self._holds) > 2 * self.open + 64:
            self._holds = [entry for entry in self._holds if entry[2].use is None]
            heapq.heapify(self._holds)


def _drop(table: dict[BlockKey, list[Ticket]], key: BlockKey, ticket: Ticket) -> None:
    """Remove `ticket` from the list under `key`, and the list when it is empty."""
    rest = [other for other in table.get(key, ()) if other is not ticket]
    if rest:
        table[key] = rest
    else:
        table.pop(key, None)
