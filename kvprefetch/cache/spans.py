"""A pool in runs of blocks: what `BlockPool` decides block by block, decided a whole run at a time.

A **span** is a run of blocks that follow each other in a sequence and share their fate: same holders, same last use,
same tenant. Agent sessions reuse a thousand blocks per request in a handful of spans, so replaying a trace costs
the spans, not the blocks. `tests/cache/test_spans.py` proves that both pools keep the same blocks, step by step.

Promises
- A block is named by a whole number; a **path** lists a sequence's blocks as runs `(first, count)` of consecutive
  names. Equal names have equal blocks before them (the name is a hash of the prefix, as in the traces that use it), and
  no two neighbouring runs of a path could be one.
- `hold`, `insert` and `release` go by path: spans may be split and merged meanwhile.
- A holder of a block holds all blocks before it. Eviction cuts unheld tails, lowest rank first.
- Owns every `Span` it returns. Nothing blocks; no clock: `now` is an argument. `check()` proves the accounting.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import count as count_from_zero
from typing import ClassVar

from kvprefetch.cache.evict import Demand, Rank
from kvprefetch.errors import AccountingError, PoolFull

Run = tuple[int, int]
Path = Sequence[Run]


@dataclass(slots=True, eq=False)
class Span:
    """A run of `count` blocks, the first named `first`, `depth` blocks into its sequence."""

    first: int
    count: int
    depth: int
    parent: "Span | None"
    tenant: str
    session: str
    last_used: float
    refs: int = 0
    speculative: bool = False  # no live request has used it yet
    hold_until: float = 0.0
    children: dict[int, "Span"] = field(default_factory=dict)

    payers: ClassVar[None] = None  # nobody shares a span's charge

    @property
    def is_leaf(self) -> bool:
        """Whether its end may be cut off: unheld, and nothing behind it."""
        return not self.refs and not self.children and self.count > 0

    @property
    def fanout(self) -> int:
        """Spans that follow it."""
        return len(self.children)


SpanPolicy = Callable[[Span, Demand], Rank | None]


class SpanPool:
    """Spans in `capacity` blocks. See the module's promises."""

    def __init__(self, capacity: int, policy: SpanPolicy, merges: bool = True) -> None:
        self.capacity = capacity
        self.policy = policy
        self.merges = merges  # join runs again where nothing tells them apart
        self.used = 0  # resident blocks
        self.reserved = 0  # blocks promised to holders, not resident yet
        self.evictions = 0
        self.root = Span(-1, 0, 0, None, "", "", 0.0, refs=1)
        self.leaves: dict[Span, None] = {}  # unheld spans without children, in the order they became that
        self.on_evict: Callable[[Span, int], None] = lambda span, count: None
        self.on_first_use: Callable[[Span], None] = lambda span: None

    # -- looking ---------------------------------------------------------------------------------------
    @property
    def free(self) -> int:
        """Blocks that are neither resident nor promised."""
        return self.capacity - self.used - self.reserved

    def match(self, path: Path) -> int:
        """How many leading blocks of `path` are resident. Counts as no use."""
        return sum(count for _, count in self._walk(path))

    def spans(self) -> Iterator[Span]:
        """Every resident span."""
        pending = list(self.root.children.values())
        while pending:
            span = pending.pop()
            yield span
            pending.extend(span.children.values())

    def path_spans(self, path: Path, count: int) -> list[Span]:
        """The resident spans of the first `count` blocks, split so that they end there."""
        found, left = [], count
        for span, matched in self._walk(path):
            if left <= 0:
                break
            take = min(matched, left)
            if take < span.count:
                self._split(span, take)
            found.append(span)
            left -= take
        return found

    # -- taking and giving back ------------------------------------------------------------------------
    def reserve(self, count: int, demand: Demand) -> None:
        """Promise `count` blocks, evicting as needed; or PoolFull, having changed nothing."""
        self.make_room(count, demand)
        self.reserved += count

    def make_room(self, count: int, demand: Demand) -> None:
        """Evict until `count` blocks are free; or PoolFull, having changed nothing."""
        missing = count - self.free
        if missing <= 0:
            return
        victims = self._choose(missing, demand)
        if victims is None:
            raise PoolFull(f"{count} blocks wanted, {self.free} free, too few may be evicted")
        for span, cut in victims:
            self.cut(span, cut)

    def unreserve(self, count: int, tenant: str) -> None:
        """Give a promise to `tenant` back."""
        self.reserved -= count

    def hold(self, path: Path, count: int) -> None:
        """Add one reference to each of the first `count` blocks, which are resident."""
        for span in self.path_spans(path, count):
            span.refs += 1
            self.leaves.pop(span, None)

    def release(self, path: Path, count: int) -> None:
        """Drop one reference of each of the first `count` blocks."""
        for span in self.path_spans(path, count):
            span.refs -= 1
            self._note_leaf(span)

    def insert(
        self,
        path: Path,
        upto: int,
        tenant: str,
        session: str,
        now: float,
        speculative_until: float | None = None,
    ) -> int:
        """Make the blocks of `path` up to `upto` resident; returns how many are new.

        The caller has made room. New blocks have no references; with `speculative_until` they are speculation on
        hold until that time.
        """
        have = self.path_spans(path, upto)
        span = have[-1] if have else self.root
        at = done = span.depth + span.count
        for first, count in _tail(path, at, upto):
            child = Span(first, count, at, span, tenant, session, now)
            child.speculative, child.hold_until = speculative_until is not None, speculative_until or 0.0
            span.children[first] = child
            self.leaves.pop(span, None)
            span, at = child, at + count
        if at > done:
            self._note_leaf(span)
        self.used += at - done
        return at - done

    def touch(self, path: Path, count: int, tenant: str, session: str, now: float) -> None:
        """A live request of `session` uses the first `count` blocks: they are its own from now on."""
        spans = self.path_spans(path, count)
        for span in spans:
            if span.speculative:
                self.on_first_use(span)
                span.speculative = False
            span.last_used = max(span.last_used, now)
            span.session, span.tenant = session, tenant
        for upper, lower in zip(reversed(spans[:-1]), reversed(spans[1:]), strict=True):
            self._merge(upper, lower)

    def extend_hold(self, path: Path, count: int, until: float) -> None:
        """Unused speculative blocks among these keep their place at least until then."""
        for span in self.path_spans(path, count):
            span.hold_until = max(span.hold_until, until)

    def cut(self, span: Span, count: int) -> None:
        """Evict the last `count` blocks of an unheld span without children."""
        if span.refs or span.children:
            raise ValueError("only an unheld leaf can be cut")
        self.on_evict(span, count)
        self.used -= count
        self.evictions += count
        span.count -= count
        if span.count == 0:
            parent = span.parent
            assert parent is not None
            del parent.children[span.first]
            self.leaves.pop(span, None)
            self._note_leaf(parent)

    def check(self) -> None:
        """Raise AccountingError for what does not add up. O(spans)."""
        total, leaves = 0, set()
        for span in self.spans():
            total += span.count
            above = span.parent
            if span.count < 1 or above is None or above.children.get(span.first) is not span:
                raise AccountingError(f"span {span.first} hangs loose")
            if span.refs < 0 or sum(child.refs for child in span.children.values()) > span.refs:
                raise AccountingError(f"span {span.first}: its references do not match those below it")
            if above is not self.root and span.depth != above.depth + above.count:
                raise AccountingError(f"span {span.first} is at the wrong depth")
            if not span.refs and not span.children:
                leaves.add(span)
        if total != self.used or self.used + self.reserved > self.capacity or self.reserved < 0:
            raise AccountingError(f"{total} blocks resident, {self.used} counted, {self.reserved} promised")
        if leaves != set(self.leaves):
            raise AccountingError("the list of leaves is wrong")

    # -- within ----------------------------------------------------------------------------------------
    def _walk(self, path: Path) -> Iterator[tuple[Span, int]]:
        """The spans along `path`, each with how many of its blocks match."""
        span = self.root
        for run_first, run_count in path:
            first, left = run_first, run_count
            while left:
                child = span.children.get(first)
                if child is None:
                    return
                matched = min(child.count, left)
                yield child, matched
                if matched < child.count:
                    return
                span, first, left = child, first + matched, left - matched

    def _choose(self, missing: int, demand: Demand) -> list[tuple[Span, int]] | None:
        """Whom to cut and by how much, children before parents; None if too few may go."""
        heap: list[tuple[int, float, int, Span]] = []
        tie = count_from_zero()
        for leaf in self.leaves:
            rank = self.policy(leaf, demand)
            if rank is not None:
                heap.append((rank.group, rank.age, next(tie), leaf))
        heapify(heap)
        victims: list[tuple[Span, int]] = []
        remaining: dict[Span, int] = {}
        while missing > 0:
            if not heap:
                return None
            *_, span = heappop(heap)
            take = min(span.count, missing)
            victims.append((span, take))
            missing -= take
            parent = span.parent
            if take < span.count or parent is None or parent is self.root:
                continue
            left = remaining.get(parent, len(parent.children)) - 1
            remaining[parent] = left
            if left == 0 and not parent.refs:
                rank = self.policy(parent, demand)
                if rank is not None:
                    heappush(heap, (rank.group, rank.age, next(tie), parent))
        return victims

    def _split(self, span: Span, at: int) -> None:
        """`span` keeps its first `at` blocks; the others become its only child."""
        lower = Span(span.first + at, span.count - at, span.depth + at, span, span.tenant, span.session, span.last_used)
        lower.refs, lower.speculative, lower.hold_until = span.refs, span.speculative, span.hold_until
        lower.children = span.children
        for child in lower.children.values():
            child.parent = lower
        span.children, span.count = {lower.first: lower}, at
        self.leaves.pop(span, None)
        self._note_leaf(lower)

    def _merge(self, upper: Span, lower: Span) -> None:
        """One span again, where nothing tells them apart."""
        if not self.merges or upper.first + upper.count != lower.first or len(upper.children) != 1:
            return
        if (upper.refs, upper.last_used, upper.speculative) != (lower.refs, lower.last_used, lower.speculative):
            return
        upper.count += lower.count
        upper.hold_until = max(upper.hold_until, lower.hold_until)
        upper.children = lower.children
        for child in upper.children.values():
            child.parent = upper
        lower.count, lower.children = 0, {}
        self.leaves.pop(lower, None)
        self._note_leaf(upper)

    def _note_leaf(self, span: Span) -> None:
        if not span.refs and not span.children and span is not self.root:
            self.leaves[span] = None


def _tail(path: Path, start: int, end: int) -> Iterator[Run]:
    """The runs of `path` from block `start` to block `end`."""
    at = 0
    for first, count in path:
        low, high = max(start, at), min(end, at + count)
        if low < high:
            yield first + low - at, high - low
        at += count
