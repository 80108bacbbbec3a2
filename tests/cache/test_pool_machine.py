"""A pool under everything that may happen to it, with the bytes of its pages modelled by the test."""

from collections import Counter
from dataclasses import dataclass, field
from itertools import chain

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tiny_pools import BLOCK, owner

from kvprefetch.cache.block import Block, State
from kvprefetch.cache.compact import Phase, ordering, packing, vacating
from kvprefetch.cache.evict import Demand
from kvprefetch.cache.keys import BlockKey, block_keys
from kvprefetch.cache.pool import BlockPool
from kvprefetch.cache.sequence import PagedSequence
from kvprefetch.errors import PoolFull, PoolTooSmall

PAGES = 10
TENANTS = ("ann", "bob")
HOLD = 5.0
Kv = tuple[str, tuple[int, ...]]  # what one token's KV is made of: the namespace and all tokens up to it

tenants = st.sampled_from(TENANTS)
words = st.lists(st.sampled_from([(0, 0, 0, 0), (0, 0, 0, 1)]), max_size=5).map(lambda found: [*chain(*found)])
tails = st.lists(st.just(0), max_size=BLOCK - 1)
prompts = st.tuples(words, tails).map(lambda parts: parts[0] + parts[1]).filter(bool)
small = st.integers(0, 7)


@dataclass
class Running:
    """An open sequence, and what the test knows of it."""

    sequence: PagedSequence
    demand: Demand
    capacity: int
    announced: int = field(init=False)

    def __post_init__(self) -> None:
        self.announced = min(len(self.sequence.keys), len(self.sequence.blocks))

    def kv(self, at: int) -> Kv:
        return self.sequence.owner.tenant, tuple(self.sequence.tokens[: at + 1])


class PoolMachine(RuleBasedStateMachine):
    """Sequences of two tenants on ten pages."""

    @initialize(memory=st.sampled_from([0, 3, 100]))
    def start(self, memory: int) -> None:
        self.pool = BlockPool(PAGES, evicted_memory=memory)
        self.pool.on_evict = self.judge_eviction
        self.most_remembered = memory
        self.gone: set[BlockKey] = set()  # every key that was ever evicted
        self.now = 0.0
        self.running: list[Running] = []
        self.doubtful: list[Block] = []
        self.memory: dict[tuple[int, int], Kv | None] = {}  # (page, slot) → the KV that lies there
        self.names: dict[BlockKey, Kv] = {}  # what each key stands for: all tokens up to its block's end
        self.demand: Demand | None = None  # who is being served at this moment

    def judge_eviction(self, block: Block, rule: str) -> None:
        held = {id(b) for r in self.running for b in r.sequence.blocks}
        assert id(block) not in held, "a held block was evicted"
        if self.demand and self.demand.speculative:
            assert block.tenant == self.demand.tenant, "somebody else pays for a preload"
        self.gone.add(block.key)

    def pick(self, at: int) -> Running:
        return self.running[at % len(self.running)]

    # -- sequences -------------------------------------------------------------------------------------
    @rule(tenant=tenants, tokens=prompts, room=small)
    def open_live(self, tenant: str, tokens: list[int], room: int) -> None:
        self.open(PagedSequence(self.pool, owner(tenant), tokens, BLOCK), len(tokens) + room, speculative=False)

    @rule(tenant=tenants, tokens=prompts, part=st.integers(1, 5))
    def open_preload(self, tenant: str, tokens: list[int], part: int) -> None:
        """Full blocks alone, a piece at a time, behind what is there."""
        sequence = PagedSequence(self.pool, owner(tenant), tokens[: len(tokens) // BLOCK * BLOCK], BLOCK)
        found = len(self.pool.match(sequence.keys))
        if found < len(sequence.keys):
            self.open(sequence, min(found + part, len(sequence.keys)) * BLOCK, speculative=True)

    @precondition(lambda self: self.running)
    @rule(which=small)
    def open_twin(self, which: int) -> None:
        """Another live request for what is in work already."""
        other = self.pick(which).sequence
        self.open(PagedSequence(self.pool, other.owner, other.tokens, BLOCK), len(other.tokens), speculative=False)

    @rule(tenant=tenants, tokens=prompts)
    def serve(self, tenant: str, tokens: list[int]) -> None:
        """A whole request at once, so that the pool fills."""
        running = self.open(PagedSequence(self.pool, owner(tenant), tokens, BLOCK), len(tokens), speculative=False)
        if running:
            self.compute(running, len(tokens))
            self.end(running)

    @rule(tenant=tenants, tokens=prompts)
    def preload(self, tenant: str, tokens: list[int]) -> None:
        """A whole preload at once."""
        whole = tokens[: len(tokens) // BLOCK * BLOCK]
        running = self.open(PagedSequence(self.pool, owner(tenant), whole, BLOCK), len(whole), speculative=True)
        if running:
            self.compute(running, len(whole))
            self.end(running)

    def open(self, sequence: PagedSequence, capacity: int, *, speculative: bool) -> Running | None:
        wanted = -(-capacity // BLOCK)
        found = self.pool.match(sequence.keys[:wanted])
        before = self.snapshot()
        self.demand = Demand(sequence.owner.tenant, speculative, self.now)
        running = None
        try:
            assert sequence.open(capacity, self.demand) == len(found) * BLOCK
        except PoolTooSmall:
            assert wanted > self.pool.pages - len(self.doubtful)
            assert self.snapshot() == before
        except PoolFull:
            assert wanted <= self.pool.pages - len(self.doubtful)
            assert self.snapshot() == before
        else:
            assert sequence.blocks[: len(found)] == found
            assert len(sequence.blocks) == wanted
            assert sequence.computed == max(0, min(len(found) * BLOCK, len(sequence.tokens) - 1))
            running = Running(sequence, self.demand, capacity)
            self.running.append(running)
        self.demand = None
        return running

    def snapshot(self) -> object:
        blocks = [(id(b), b.page, b.state, b.refs, b.last_used, b.speculative) for b in self.pool.blocks()]
        return blocks, sorted(self.pool.free), dict(self.pool.announced), dict(self.pool.evicted)

    @precondition(lambda self: self.running)
    @rule(which=small)
    def adopt(self, which: int) -> None:
        sequence = self.pick(which).sequence
        before = sequence.computed
        assert sequence.adopt() == sequence.computed - before >= 0
        assert sequence.computed <= max(before, len(sequence.tokens) - 1)

    @precondition(lambda self: self.running)
    @rule(which=small, tokens=st.sampled_from([1, 3, 7, 22]))
    def run_forward(self, which: int, tokens: int) -> None:
        running = self.pick(which)
        self.compute(running, min(running.sequence.computed + tokens, running.capacity))

    def compute(self, running: Running, end: int) -> None:
        """Write KV behind what is computed, but never into shared pages, and say so."""
        sequence = running.sequence
        end = min(end, len(sequence.tokens))
        for at in range(max(sequence.computed, sequence.written), end):
            block = sequence.blocks[at // BLOCK]
            assert block.state is State.IN_FLIGHT, "somebody may be reading this page"
            self.memory[block.page, at % BLOCK] = running.kv(at)
        for at in range(end // BLOCK):
            name = running.kv(at * BLOCK + BLOCK - 1)
            (*_, key) = block_keys(sequence.owner.root, name[1], BLOCK)
            self.names[key] = name
        used = [block for block in self.pool.resident.values() if not block.speculative]
        until = self.now + HOLD if running.demand.speculative else None
        published = sequence.complete(end, speculative_until=until)
        assert all(block.speculative == running.demand.speculative for block in published)
        assert not any(block.speculative for block in used)

    @precondition(lambda self: self.running)
    @rule(which=small, token=st.integers(0, 1))
    def sample(self, which: int, token: int) -> None:
        running = self.pick(which)
        sequence = running.sequence
        is_ready = sequence.computed == len(sequence.tokens) <= running.capacity
        if is_ready and not running.demand.speculative:
            sequence.append(token)

    @precondition(lambda self: self.running)
    @rule(which=small)
    def close(self, which: int) -> None:
        self.end(self.pick(which))

    def end(self, running: Running) -> None:
        self.running.remove(running)
        assert running.sequence.close() == []
        assert running.sequence.close() == []

    @precondition(lambda self: self.running)
    @rule(which=small)
    def close_in_doubt(self, which: int) -> None:
        running = self.pick(which)
        unpublished = running.sequence.blocks[running.sequence.shared :]
        self.running.remove(running)
        assert running.sequence.close(quarantine=True) == unpublished
        self.doubtful += unpublished

    @precondition(lambda self: self.doubtful)
    @rule()
    def write_stray(self) -> None:
        """The forward in doubt was still running."""
        for block in self.doubtful:
            self.memory.update({(block.page, slot): None for slot in range(BLOCK)})

    @precondition(lambda self: self.doubtful)
    @rule(which=small)
    def readmit(self, which: int) -> None:
        self.pool.readmit(self.doubtful.pop(which % len(self.doubtful)))

    # -- the pool --------------------------------------------------------------------------------------
    @precondition(lambda self: self.pool.leaves)
    @rule(which=small)
    def evict_a_leaf(self, which: int) -> None:
        leaves = sorted(self.pool.leaves)
        self.pool.evict(self.pool.leaves[leaves[which % len(leaves)]], "test")

    @rule()
    def clear(self) -> None:
        self.pool.clear()
        assert all(block.refs for block in self.pool.resident.values())

    @rule(tenant=tenants, tokens=prompts)
    def extend_hold(self, tenant: str, tokens: list[int]) -> None:
        found = self.pool.match(block_keys(owner(tenant).root, tokens, BLOCK))
        self.pool.extend_hold(found, self.now + HOLD, tenant)
        assert all(block.hold_until >= self.now + HOLD for block in found if block.speculative)

    @rule(tenant=tenants, tokens=prompts)
    def touch(self, tenant: str, tokens: list[int]) -> None:
        found = self.pool.match(block_keys(owner(tenant).root, tokens, BLOCK))
        unused = sum(block.speculative for block in found)
        assert self.pool.touch(found, self.now) == unused
        assert not any(block.speculative for block in found)

    @rule(order=st.booleans())
    def compact(self, order: bool) -> None:
        """Pages move, phase by phase, under whoever is running."""
        pinned = [b.page for b in self.pool.blocks() if b.refs or b.state is State.QUARANTINED]
        if order:
            sequences = [[block.page for block in run] for run in self.pool.sequences()]
            known = set(chain(*sequences))
            phases = ordering([*sequences, *([p] for p in pinned if p not in known)], pinned, self.pool.pages)
        else:
            phases = packing([b.page for b in self.pool.blocks()], pinned)
        self.move(phases)

    def move(self, phases: list[Phase]) -> None:
        for phase in phases:
            for source, target in phase:
                self.memory.update({(target, slot): self.memory[source, slot] for slot in range(BLOCK)})
            self.pool.relocate(phase)
            self.pool.check()
            for source, _ in phase:
                self.memory.update({(source, slot): None for slot in range(BLOCK)})

    @rule(pages=st.integers(1, PAGES))
    def resize(self, pages: int) -> None:
        before = self.snapshot()
        try:
            self.pool.make_room(self.pool.pages - pages, Demand("", False, self.now))
        except PoolFull:
            assert self.snapshot() == before
            return
        pinned = [b.page for b in self.pool.blocks() if b.refs or b.state is State.QUARANTINED]
        self.move(vacating([b.page for b in self.pool.blocks()], pinned, pages))
        highest = max((b.page for b in self.pool.blocks()), default=-1)
        self.pool.resize(max(pages, highest + 1))

    @rule(seconds=st.sampled_from([0.5, 3.0, 10.0]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    # -- what holds after every step -------------------------------------------------------------------
    @invariant()
    def every_page_is_accounted_for(self) -> None:
        self.pool.check()
        assert set(self.pool.quarantined) == {block.page for block in self.doubtful}

    @invariant()
    def a_held_prefix_stays_resident(self) -> None:
        for running in self.running:
            sequence = running.sequence
            assert self.pool.match(sequence.keys[: sequence.shared]) == sequence.blocks[: sequence.shared]

    @invariant()
    def computed_tokens_lie_in_the_sequences_pages(self) -> None:
        for running in self.running:
            pages = running.sequence.pages
            for at in range(running.sequence.computed):
                assert self.memory[pages[at // BLOCK], at % BLOCK] == running.kv(at)

    @invariant()
    def what_is_found_is_the_prompts(self) -> None:
        """Each resident block holds the KV that its key names: of these tokens, behind these, in this namespace."""
        for key, block in self.pool.resident.items():
            tenant, tokens = self.names[key]
            kvs = [(tenant, tokens[:end]) for end in range(len(tokens) - BLOCK + 1, len(tokens) + 1)]
            assert [self.memory[block.page, slot] for slot in range(BLOCK)] == kvs

    @invariant()
    def private_pages_are_private(self) -> None:
        pages = Counter(page for r in self.running for page in r.sequence.pages[r.sequence.shared :])
        assert all(users == 1 for users in pages.values())
        assert set(pages) == set(self.pool.in_flight)

    @invariant()
    def announced_is_what_is_in_work(self) -> None:
        in_work = Counter(key for r in self.running for key in r.sequence.keys[r.sequence.shared : r.announced])
        assert self.pool.announced == in_work
        assert len(self.pool.announced) == len(in_work)

    @invariant()
    def evictions_are_remembered_or_known_to_be_forgotten(self) -> None:
        missing = self.gone - set(self.pool.resident)
        assert set(self.pool.evicted) <= missing
        assert len(self.pool.evicted) <= self.most_remembered
        assert self.pool.forgot_evictions or set(self.pool.evicted) == missing


PoolMachine.TestCase.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)
TestPoolMachine = PoolMachine.TestCase
