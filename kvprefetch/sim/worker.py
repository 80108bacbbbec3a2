"""One replayed worker: admission, demand loads, prefill in slices, pins, and speculation on what is left.

A request finds what is resident, loads what the host has, computes the rest, and keeps its blocks pinned until it
ends. Loads share one link, demand before speculation; prefill shares one GPU, in turns.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Protocol

from kvprefetch.cache.evict import Demand
from kvprefetch.cache.spans import Path, Span, SpanPolicy, SpanPool
from kvprefetch.errors import PoolFull
from kvprefetch.sim.clock import VirtualClock
from kvprefetch.sim.lru_pool import LruPool
from kvprefetch.sim.machine import Machine
from kvprefetch.sim.trace import Request


@dataclass(slots=True, eq=False)
class Live:
    """A request in the worker."""

    request: Request
    blocks: int
    held: int = 0
    computed: int = 0  # tokens
    gpu_blocks: int = 0  # found resident
    host_blocks: int = 0  # loaded
    admitted_at: float = 0.0
    ttft_s: float = 0.0
    ends_at: float = 0.0


class Line(Protocol):
    """Requests that wait for their turn: who is to be served next comes out first."""

    def append(self, live: Live, /) -> None:
        """It waits for its turn, or for its next one."""

    def popleft(self) -> Live:
        """Whose turn it is; IndexError: nobody's."""

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Preload:
    """Bring the first `blocks` of `path` to the GPU and keep them until `hold_until` unless used."""

    session: str
    tenant: str
    path: Path
    blocks: int
    hold_until: float
    worth: float = inf  # its index: it displaces only what has a lower one


class Strategy(Protocol):
    """What tells one policy from another. All calls are made on the virtual clock."""

    gpu_policy: SpanPolicy
    has_host: bool
    merges: bool  # see `SpanPool.merges`

    def attach(self, worker: "SimWorker") -> None:
        """Called once, before anything happens."""

    def arrived(self, live: Live) -> None:
        """A request was admitted; `gpu_blocks` and `host_blocks` say what it found."""

    def ended(self, live: Live) -> None:
        """It has ended, and its blocks are not pinned any more."""

    def signalled(self, request: Request) -> None:
        """A signal: this session may continue. `request` is its latest one so far."""

    def next_preload(self) -> Preload | None:
        """What the idle link should bring next. Asked again after each chunk."""

    def failed(self, preload: Preload) -> None:
        """There was no room for it that it may take."""

    def moved(self, preload: Preload, blocks: int) -> None:
        """So many blocks of it are on their way."""

    def loaded(self, tokens: int, seconds: float) -> None:
        """The link took so long for so many."""

    def computed(self, start: int, end: int, seconds: float) -> None:
        """The GPU took so long for the KV of these positions."""

    def used(self, span: Span) -> None:
        """A request used these preloaded blocks for the first time."""


@dataclass
class Moves:
    """Speculative transfers, in blocks."""

    moved: int = 0
    useful: int = 0
    started: int = 0  # preloads for which anything was moved
    late: int = 0  # of them, those whose request came before they were done


Record = Callable[[Live], None]


class SimWorker:
    """See the module's promises."""

    def __init__(self, machine: Machine, clock: VirtualClock, strategy: Strategy, record: Record) -> None:
        self.machine, self.clock, self.strategy, self.record = machine, clock, strategy, record
        self.gpu = self._gpu_pool(machine.gpu_tokens // machine.block_tokens)
        host_tokens = machine.host_tokens if strategy.has_host else 0
        self.host = self._host_pool(host_tokens // machine.block_tokens)
        self.gpu.on_first_use = self._note_use
        self.moves = Moves()
        self.unfinished: dict[str, Preload] = {}  # by session
        self.waiting: deque[Live] = deque()
        self.prefilling: Line = deque()
        self.loading: Line = deque()
        self.apart: frozenset[str] = frozenset()  # tenants who bring engines of their own: only memory is shared
        self.gpu_busy = self.link_busy = False
        self.gpu_seconds = 0.0
        self.active = 0
        strategy.attach(self)

    def _gpu_pool(self, capacity: int) -> SpanPool:
        return SpanPool(capacity, self.strategy.gpu_policy, self.strategy.merges)

    def _host_pool(self, capacity: int) -> SpanPool:
        return LruPool(capacity, self.strategy.merges)

    # -- live requests ---------------------------------------------------------------------------------
    def arrive(self, request: Request) -> None:
        """A request has come."""
        self.active += 1
        self._arrived(Live(request, min(request.blocks, self.gpu.capacity)))
        self._admit()

    def _arrived(self, live: Live) -> None:
        self.waiting.append(live)

    def _admit(self) -> None:
        while self.waiting:
            live = self.waiting[0]
            if not self._open(live):
                return
            self.waiting.popleft()
            self._begin(live)

    def _begin(self, live: Live) -> None:
        """It was let in."""
        self.moves.late += self.unfinished.pop(live.request.session, None) is not None
        self.strategy.arrived(live)
        if live.host_blocks:
            self.loading.append(live)
            self.serve_link()
        else:
            self._prefill(live)

    def _is_full(self) -> bool:
        return bool(self.waiting)

    def _demand(self, live: Live) -> Demand:
        return Demand(live.request.tenant, speculative=False, now=self.clock.now)

    def _open(self, live: Live) -> bool:
        path = live.request.path
        found = min(self.gpu.match(path), live.blocks)
        self.gpu.hold(path, found)
        try:
            self.gpu.reserve(live.blocks - found, self._demand(live))
        except PoolFull:
            self.gpu.release(path, found)
            return False
        live.held = live.gpu_blocks = found
        live.admitted_at = self.clock.now
        live.host_blocks = max(min(self.host.match(path), live.blocks) - found, 0)
        return True

    def _publish(self, live: Live, upto: int) -> None:
        """Blocks up to `upto` are resident, and held by the request."""
        request = live.request
        self.gpu.unreserve(upto - live.held, request.tenant)
        self.gpu.insert(request.path, upto, request.tenant, request.session, self.clock.now)
        self.gpu.release(request.path, live.held)
        self.gpu.hold(request.path, upto)
        live.held = upto

    def _prefill(self, live: Live) -> None:
        live.computed = min(live.held * self.machine.block_tokens, live.request.tokens - 1)
        if live.request.tenant in self.apart:
            seconds = self.machine.prefill_s(live.computed, live.request.tokens)
            self.clock.after(seconds, lambda: self._first_token(live))
            return
        self.prefilling.append(live)
        self._serve_gpu()

    def _serve_gpu(self) -> None:
        if self.gpu_busy or not self.prefilling:
            return
        live = self.prefilling.popleft()
        end, piece = live.request.tokens, self.machine.slice_s
        if piece is not None:
            end = min(end, self.machine.prefill_end(live.computed, piece))
        seconds = self.machine.prefill_s(live.computed, end)
        self.gpu_seconds += seconds
        self.gpu_busy = True
        self.strategy.computed(live.computed, end, seconds)

        def done() -> None:
            self.gpu_busy = False
            live.computed = end
            if end < live.request.tokens:
                self.prefilling.append(live)
            else:
                self._first_token(live)
            self._serve_gpu()

        self.clock.after(seconds, done)

    def _first_token(self, live: Live) -> None:
        request, now = live.request, self.clock.now
        self._publish(live, live.blocks)
        self.gpu.touch(request.path, live.blocks, request.tenant, request.session, now)
        self._keep_on_host(live)
        live.ttft_s = now - request.at
        known = request.busy_s
        live.ends_at = now + request.out * self.machine.decode_s if known is None else max(now, request.at + known)
        self.record(live)
        self.clock.at(live.ends_at, lambda: self._end(live))

    def _end(self, live: Live) -> None:
        request, now = live.request, self.clock.now
        self.gpu.touch(request.path, live.held, request.tenant, request.session, now)
        self.gpu.release(request.path, live.held)
        self.active -= 1
        self.strategy.ended(live)
        self._admit()
        self.serve_link()

    def _keep_on_host(self, live: Live) -> None:
        """What is computed is written through; the host forgets what was used longest ago."""
        request, now = live.request, self.clock.now
        upto = min(live.blocks, self.host.capacity)
        known = min(self.host.match(request.path), upto)
        self.host.hold(request.path, known)
        try:
            self.host.make_room(upto - known, Demand(request.tenant, speculative=False, now=now))
            self.host.insert(request.path, upto, request.tenant, request.session, now)
        except PoolFull:
            upto = known
        self.host.release(request.path, known)
        self.host.touch(request.path, upto, request.tenant, request.session, now)

    # -- the link --------------------------------------------------------------------------------------
    def serve_link(self) -> None:
        """Demand loads first; then what the strategy wants, unless requests wait for memory."""
        if self.link_busy:
            return
        if self.loading:
            self._load(self.loading.popleft())
            return
        if self._is_full():
            return
        while (preload := self.strategy.next_preload()) is not None:
            if self._preload(preload):
                return
            self.strategy.failed(preload)

    def _load(self, live: Live) -> None:
        path = live.request.path
        here = min(self.gpu.match(path), live.blocks)  # a preload may have brought some meanwhile
        if here > live.held:
            self._publish(live, min(here, live.gpu_blocks + live.host_blocks))
        missing = live.gpu_blocks + live.host_blocks - live.held

        def done() -> None:
            self.link_busy = False
            self._publish(live, live.gpu_blocks + live.host_blocks)
            self._prefill(live)
            self.serve_link()

        self._occupy_link(missing, done)

    def _preload(self, preload: Preload) -> bool:
        path, now = preload.path, self.clock.now
        here = min(self.gpu.match(path), preload.blocks)
        there = min(self.host.match(path), preload.blocks)
        count = min(there - here, self.machine.chunk_blocks)
        if count <= 0:
            return False
        self.gpu.hold(path, here)
        try:
            self.gpu.reserve(count, Demand(preload.tenant, speculative=True, now=now, worth=preload.worth))
        except PoolFull:
            self.gpu.release(path, here)
            return False

        def done() -> None:
            self.link_busy = False
            self.gpu.unreserve(count, preload.tenant)
            session, tenant = preload.session, preload.tenant
            fresh = self.gpu.insert(path, here + count, tenant, session, self.clock.now, preload.hold_until)
            self.gpu.extend_hold(path, here + count, preload.hold_until)
            self.gpu.release(path, here)
            self.moves.moved += fresh
            self.serve_link()

        self.moves.started += self.unfinished.get(preload.session) is None
        self.unfinished[preload.session] = preload
        if here + count >= there:
            del self.unfinished[preload.session]
        self.strategy.moved(preload, count)
        self._occupy_link(count, done)
        return True

    def _occupy_link(self, blocks: int, done: Callable[[], None]) -> None:
        seconds = self.machine.load_s(blocks)
        self.link_busy = True
        if blocks:
            self.strategy.loaded(blocks * self.machine.block_tokens, seconds)
        self.clock.after(seconds, done)

    def _note_use(self, span: Span) -> None:
        self.moves.useful += span.count
        self.strategy.used(span)
