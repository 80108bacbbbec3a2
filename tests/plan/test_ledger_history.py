"""Whatever happens, the sums of the books hold (law 6)."""

from collections import Counter
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_books import BLOCK, HOLD, assert_sums_hold, issue, request

from kvprefetch.cache.block import Block
from kvprefetch.cache.evict import Demand
from kvprefetch.cache.keys import BlockKey, block_keys
from kvprefetch.cache.misses import explain
from kvprefetch.cache.pool import BlockPool
from kvprefetch.cache.sequence import Owner, PagedSequence
from kvprefetch.errors import PoolError
from kvprefetch.outcomes import Outcome, Result, Use
from kvprefetch.plan.ledger import Ledger, Ticket

contexts = st.lists(st.sampled_from([0, 1]), max_size=4)  # one token of the alphabet stands for a block
steps = st.one_of(
    st.tuples(st.just("prefetch"), st.sampled_from(["s", "t"]), contexts, st.integers(0, 4)),
    st.tuples(st.just("issue"), st.sampled_from(["s", "t"])),
    st.tuples(st.just("start"), st.integers(0, 5), contexts, st.integers(0, 4)),
    st.tuples(st.just("resolve"), st.integers(0, 5), st.sampled_from(list(Outcome)), st.integers(0, 4)),
    st.tuples(st.just("request"), contexts, st.integers(0, 4)),
    st.tuples(st.just("evicted"), contexts),
    st.tuples(st.just("expire"), st.floats(0, 100)),
    st.tuples(st.just("end"), st.sampled_from(["s", "t"])),
)


def prefixes(context: Sequence[int]) -> list[BlockKey]:
    """Keys that, like real ones, name a block together with all before it."""
    return [bytes(context[:end]) for end in range(1, len(context) + 1)]


class History:
    """A ledger, the tickets it gave out, and what each was seen to have come to."""

    def __init__(self) -> None:
        self.ledger = Ledger()
        self.tickets: list[Ticket] = []
        self.started: set[int] = set()
        self.seen: dict[int, tuple[Result | None, Use | None]] = {}
        self.now = 0.0

    def ticket(self, which: int) -> Ticket | None:
        return self.tickets[which % len(self.tickets)] if self.tickets else None

    def issue(self, session: str) -> None:
        self.tickets.append(issue(self.ledger, self.now, session))

    def prefetch(self, session: str, context: list[int], found: int) -> None:
        self.issue(session)
        self.start(-1, context, found)
        self.resolve(-1, Outcome.ALREADY_WARM if found >= len(context) else Outcome.WARM, 0)

    def start(self, which: int, context: list[int], found: int) -> None:
        ticket = self.ticket(which)
        if ticket and ticket.result is None and ticket.number not in self.started:
            self.started.add(ticket.number)
            self.ledger.start(ticket, prefixes(context), min(found, len(context)))

    def resolve(self, which: int, outcome: Outcome, resident: int) -> None:
        ticket = self.ticket(which)
        if ticket:
            resident = min(resident, len(ticket.keys)) if outcome is Outcome.CLIPPED else len(ticket.keys)
            self.ledger.resolve(ticket, Result(outcome, resident * BLOCK), self.now, resident)

    def request(self, context: list[int], hits: int) -> None:
        request(self.ledger, prefixes(context), min(hits, len(context)))

    def evicted(self, context: list[int]) -> None:
        self.ledger.note_evicted(bytes(context))

    def expire(self, seconds: float) -> None:
        self.now += seconds
        self.ledger.expire_holds(self.now)

    def end(self, session: str) -> None:
        self.ledger.end_session(session)

    def check(self) -> None:
        assert_sums_hold(self.ledger)
        for ticket in self.tickets:
            result, use = self.seen.get(ticket.number, (None, None))
            assert result in (None, ticket.result), "an outcome is final"
            assert use in (None, ticket.use), "a use is final"
            assert ticket.use is None or (ticket.result is not None and ticket.result.outcome.is_resident)
            assert (ticket.used_tokens > 0) == (ticket.use is Use.USED)
            self.seen[ticket.number] = (ticket.result, ticket.use)
        tickets = [t for t in self.tickets if t.result is not None]
        assert self.ledger.outcomes == Counter(t.result.outcome for t in tickets if t.result)
        assert self.ledger.uses == Counter(t.use for t in tickets if t.use)


@settings(max_examples=120, deadline=None)
@given(st.lists(steps, max_size=30))
def test_after_any_history_the_sums_hold_and_every_prefetch_is_settled(story: list[tuple[str, ...]]) -> None:
    history = History()
    for verb, *details in story:
        getattr(history, verb)(*details)
        history.check()
    for at in range(len(history.tickets)):
        history.resolve(at, Outcome.CANCELLED, 0)
    history.expire(HOLD)
    history.check()
    stats = history.ledger.stats()
    assert (stats["pending"], stats["use_pending"]) == (0, 0)


texts = st.lists(st.sampled_from([0, 1]), min_size=1, max_size=4).map(lambda t: [token for token in t for _ in "four"])


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["preload", "ask"]), texts), max_size=15))
def test_every_token_computed_ahead_is_used_or_waits_or_went_to_waste(story: list[tuple[str, list[int]]]) -> None:
    """On a real pool: wasted is what lies there unused, and what was evicted unused."""
    pool, ledger, owner = BlockPool(6), Ledger(), Owner(b"root", "ann")
    evicted: list[bool] = []

    def note(block: Block, rule: str) -> None:
        evicted.append(block.speculative)
        ledger.note_evicted(block.key)

    pool.on_evict = note
    for now, (verb, tokens) in enumerate(story):
        ticket = issue(ledger, float(now), hold_s=3.0)
        keys = block_keys(owner.root, tokens, BLOCK)
        hits = len(pool.match(keys))
        lookup = explain(pool, keys, hits, BLOCK)
        sequence = PagedSequence(pool, owner, tokens, BLOCK)
        try:
            sequence.open(len(tokens), Demand("ann", verb == "preload", float(now)))
        except PoolError:
            ledger.resolve(ticket, Result(Outcome.REJECTED, 0), float(now))
            continue
        if verb == "ask":
            ledger.note_lookup(keys, lookup, BLOCK)
            ledger.tokens_used += BLOCK * pool.touch(sequence.blocks[: sequence.shared], float(now))
            sequence.complete(len(tokens))
            ledger.resolve(ticket, Result(Outcome.CANCELLED, 0), float(now))
        else:
            ledger.start(ticket, keys, hits)
            ledger.tokens_computed += BLOCK * len(sequence.complete(len(tokens), speculative_until=now + 3.0))
            outcome = Outcome.ALREADY_WARM if hits == len(keys) else Outcome.WARM
            ledger.resolve(ticket, Result(outcome, len(tokens)), float(now), len(keys))
        sequence.close()
        ledger.expire_holds(float(now))
        waiting = sum(block.speculative for block in pool.resident.values())
        assert ledger.stats()["tokens_wasted"] == BLOCK * (waiting + sum(evicted))
        assert_sums_hold(ledger)
