"""One contract, every tier: see `kvprefetch.tiers.contract`, and `conformance_tiers` for who must keep it."""

import threading
from collections.abc import Sequence
from hashlib import sha256

import hypothesis.strategies as st
import pytest
import torch
from conformance_tiers import BLOCK, Open, Place, buffers, bytes_of, chain, content, incoming, loaded
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from kvprefetch.cache.keys import BlockKey
from kvprefetch.tiers.checksum import checksum
from kvprefetch.tiers.contract import Incoming


def test_what_was_stored_is_found_and_loaded_as_it_was(opened: Open) -> None:
    tier = opened().tier
    blocks = incoming("abc", BLOCK)
    assert tier.find(chain("abc")) == 0
    assert tier.store(blocks) == 3
    assert tier.find(chain("abc")) == 3
    assert loaded(tier, chain("abc")) == bytes_of(blocks)
    assert loaded(tier, chain("abc")) == bytes_of(blocks), "twice"


def test_nothing_asked_nothing_given(opened: Open) -> None:
    tier = opened().tier
    assert (tier.find([]), tier.load([], []), tier.store([]), tier.discard([])) == (0, 0, 0, 0)


def test_only_leading_blocks_count(opened: Open) -> None:
    tier = opened().tier
    blocks = incoming("abcd", BLOCK)
    tier.store(blocks[:2])
    tier.store(blocks[3:])
    assert tier.find(chain("abcd")) == 2
    assert loaded(tier, chain("abcd")) == bytes_of(blocks[:2])
    assert tier.find(chain("abcd")[3:]) == 1, "each block is found under its key alone"
    assert loaded(tier, chain("abcd")[3:]) == bytes_of(blocks[3:])
    tier.store(blocks[2:3])
    assert loaded(tier, chain("abcd")) == bytes_of(blocks)


def test_keys_in_an_order_that_nobody_stored_are_answered_one_by_one(opened: Open) -> None:
    tier = opened().tier
    blocks = incoming("abc", BLOCK)
    tier.store(blocks)
    a, b, c = chain("abc")
    unknown = chain("z")[0]
    for keys, found in (([c, b, a], 3), ([unknown, b, c], 0), ([a, unknown, c], 1), ([b, c], 2), ([a, c], 2)):
        assert tier.find(keys) == found
        assert len(loaded(tier, keys)) == found
    assert loaded(tier, [c, a]) == bytes_of([blocks[2], blocks[0]])


def test_a_load_fills_no_more_buffers_than_it_is_given(opened: Open) -> None:
    tier = opened().tier
    blocks = incoming("abc", BLOCK)
    tier.store(blocks)
    into = buffers(2)
    assert tier.load(chain("abc"), into) == 2
    assert [bytes(view) for view in into] == bytes_of(blocks[:2])
    assert tier.load(chain("abc")[:1], into) == 1


def test_sequences_that_part_share_what_is_before(opened: Open) -> None:
    tier = opened().tier
    first, second = incoming("abc", BLOCK), incoming("abx", BLOCK)
    tier.store(first)
    assert tier.store(second) == 3
    assert loaded(tier, chain("abc")) == bytes_of(first)
    assert loaded(tier, chain("abx")) == bytes_of([*first[:2], second[2]]), "who was first under a key stays"
    assert tier.usage().blocks == 4


def test_a_block_in_another_engines_layout_under_its_key_goes_round(opened: Open) -> None:
    """vLLM's: bfloat16 `[layers, kv_heads, block, 2 · head_dim]`, and keys that hash CBOR."""
    layers, heads, tokens, dim = 3, 2, 16, 32
    tensors = [torch.randn(layers, heads, tokens, 2 * dim).to(torch.bfloat16) for _ in range(3)]
    size = tensors[0].nbytes
    tier = opened(4, size).tier
    before = none = sha256(b"NONE_HASH").digest()
    blocks = []
    for at, tensor in enumerate(tensors):
        key = vllm_key(before, range(at * tokens, (at + 1) * tokens))
        data = memoryview(tensor.view(torch.uint8).numpy()).cast("B")
        blocks.append(Incoming(key, before, "ann", data, checksum(data)))
        before = key
    assert blocks[0].parent == none, "their sequences begin behind a key that nobody stores"
    assert tier.store(blocks) == 3
    into = [torch.empty_like(tensor) for tensor in tensors]
    views = [memoryview(tensor.view(torch.uint8).numpy()).cast("B") for tensor in into]
    assert tier.load([block.key for block in blocks], views) == 3
    assert all(torch.equal(a, b) for a, b in zip(into, tensors, strict=True))


def vllm_key(parent: bytes, tokens: Sequence[int]) -> BlockKey:
    """SHA-256 of the CBOR of (parent, tokens, None)."""
    numbers = b"".join(bytes([n]) if n < 24 else bytes([0x18, n]) for n in tokens)
    return sha256(b"\x83\x58\x20" + parent + bytes([0x80 | len(tokens)]) + numbers + b"\xf6").digest()


def test_a_block_of_another_size_is_a_mistake_of_the_caller(opened: Open) -> None:
    tier = opened().tier
    (short,) = incoming("a", BLOCK - 8)
    with pytest.raises(ValueError, match=f"blocks have {BLOCK} bytes"):
        tier.store([short])
    tier.check()
    (right,) = incoming("a", BLOCK)
    assert tier.store([right]) == 1
    with pytest.raises(ValueError, match=f"blocks have {BLOCK} bytes"):
        tier.load(chain("a"), buffers(1, BLOCK + 8))


# -- integrity -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_damaged_block_is_never_given_and_is_dropped(opened: Open, at: int) -> None:
    place = opened()
    tier, blocks = place.tier, incoming("abc", BLOCK)
    tier.store(blocks)
    place.flip(chain("abc")[at])
    assert loaded(tier, chain("abc")) == bytes_of(blocks[:at])
    assert tier.usage().counters["corrupt"] == 1
    assert tier.find(chain("abc")) == at
    assert loaded(tier, chain("abc")) == bytes_of(blocks[:at])
    assert tier.usage().counters["corrupt"] == 1, "it is gone, not found bad again"
    tier.check()
    again = incoming("abc", BLOCK)
    assert tier.store(again) == 3, "computed again, and the whole is found again"
    assert loaded(tier, chain("abc")) == bytes_of([*blocks[:at], again[at], *blocks[at + 1 :]])


def test_a_block_that_did_not_have_its_checksum_is_never_given(opened: Open) -> None:
    tier = opened().tier
    (block,) = incoming("a", BLOCK)
    tier.store([Incoming(block.key, b"", "ann", block.data, block.checksum ^ 1)])
    assert loaded(tier, chain("a")) == []
    tier.check()


# -- room ------------------------------------------------------------------------------------------------
def bounded(opened: Open, slots: int = 4) -> Place:
    place = opened(slots)
    if not place.is_bounded:
        pytest.skip("its server bounds it")
    if not place.has_lines:
        pytest.skip("it goes by age alone")
    return place


def test_what_was_used_last_stays(opened: Open) -> None:
    place = bounded(opened)
    tier = place.tier
    old, used = incoming("ab", BLOCK), incoming("xy", BLOCK)
    for blocks in (old, used, None, incoming("pq", BLOCK)):
        place.clock.now += 1
        if blocks is None:
            loaded(tier, chain("xy"))
        else:
            assert tier.store(blocks) == 2
    assert (tier.find(chain("ab")), tier.find(chain("xy")), tier.find(chain("pq"))) == (0, 2, 2)
    assert tier.usage().counters["evicted"] == 2
    assert tier.usage().blocks == 4


def test_the_end_of_a_sequence_goes_before_its_beginning(opened: Open) -> None:
    place = bounded(opened)
    place.tier.store(incoming("abcd", BLOCK))
    place.clock.now += 1
    place.tier.store(incoming("x", BLOCK))
    assert place.tier.find(chain("abcd")) == 3


def test_a_sequence_longer_than_the_place_is_stored_as_far_as_it_fits(opened: Open) -> None:
    place = bounded(opened)
    blocks = incoming("abcdefg", BLOCK)
    assert place.tier.store(blocks) == 4
    assert loaded(place.tier, chain("abcdefg")) == bytes_of(blocks[:4])
    assert place.tier.usage().counters["refused"] == 3


def test_speculation_goes_first_once_its_time_is_up(opened: Open) -> None:
    place = bounded(opened)
    tier = place.tier
    tier.store(incoming("ab", BLOCK))
    place.clock.now += 1
    tier.store(incoming("xy", BLOCK, until=place.clock.now + 60))
    place.clock.now += 61
    tier.store(incoming("p", BLOCK))
    assert (tier.find(chain("ab")), tier.find(chain("xy")), tier.find(chain("p"))) == (2, 1, 1)


def test_speculation_that_was_used_is_like_any_other_block(opened: Open) -> None:
    place = bounded(opened)
    tier = place.tier
    tier.store(incoming("xy", BLOCK, until=place.clock.now + 60))
    place.clock.now += 61
    tier.store(incoming("ab", BLOCK))
    place.clock.now += 1
    loaded(tier, chain("xy"))
    place.clock.now += 1
    tier.store(incoming("pq", BLOCK))
    assert (tier.find(chain("xy")), tier.find(chain("ab"))) == (2, 0)


def test_speculation_displaces_nothing_of_another_tenant(opened: Open) -> None:
    place = bounded(opened)
    tier = place.tier
    tier.store(incoming("abcd", BLOCK, "bob"))
    assert tier.store(incoming("x", BLOCK, "ann", until=place.clock.now + 60)) == 0
    assert tier.find(chain("abcd")) == 4
    assert tier.store(incoming("x", BLOCK, "ann")) == 1, "who asks now may"


# -- forgetting, and figures -----------------------------------------------------------------------------
def test_what_is_discarded_is_gone_and_may_come_back(opened: Open) -> None:
    tier = opened().tier
    blocks = incoming("abc", BLOCK)
    tier.store(blocks)
    assert tier.discard(chain("abc")[1:]) == 2
    assert tier.discard(chain("abc")[1:]) == 0
    assert tier.find(chain("abc")) == 1
    tier.check()
    again = incoming("abc", BLOCK)
    assert tier.store(again) == 3
    assert loaded(tier, chain("abc")) == bytes_of([blocks[0], *again[1:]])


def test_a_block_in_the_middle_can_be_discarded_alone(opened: Open) -> None:
    tier = opened().tier
    tier.store(incoming("abc", BLOCK))
    assert tier.discard(chain("abc")[1:2]) == 1
    assert tier.find(chain("abc")) == 1
    assert tier.find(chain("abc")[2:]) == 1
    tier.check()


def test_bytes_are_charged_to_who_stored_them(opened: Open) -> None:
    tier = opened().tier
    tier.store(incoming("ab", BLOCK, "ann"))
    tier.store(incoming("abxy", BLOCK, "bob"))
    usage = tier.usage()
    assert usage.by_tenant == {"ann": 2 * BLOCK, "bob": 2 * BLOCK}
    assert (usage.blocks, usage.bytes) == (4, 4 * BLOCK)
    assert usage.counters["stored"] == 4
    loaded(tier, chain("abxy"))
    assert tier.usage().counters["loaded"] == 4
    tier.discard(chain("ab"))
    assert sum(tier.usage().by_tenant.values()) == tier.usage().bytes == 2 * BLOCK


def test_a_place_that_outlasts_its_tier_gives_back_what_it_held(opened: Open) -> None:
    place = opened()
    if place.reopen is None:
        pytest.skip("it is memory of this process")
    blocks = incoming("abc", BLOCK)
    place.tier.store(blocks)
    place.tier.discard(chain("abc")[2:])
    place.tier.close()
    tier = place.reopen()
    assert loaded(tier, chain("abc")) == bytes_of(blocks[:2])
    assert tier.usage().by_tenant == {"ann": 2 * BLOCK}
    tier.check()


# -- threads ---------------------------------------------------------------------------------------------
def test_loads_beside_a_store_that_evicts_give_whole_blocks_or_none(opened: Open) -> None:
    place = bounded(opened, 6)
    if not place.is_threaded:
        pytest.skip("one thread at a time")
    tier, stop = place.tier, threading.Event()
    sequences = [incoming("abc", BLOCK, root=bytes([n])) for n in range(4)]
    broken: list[object] = []

    def read() -> None:
        while not stop.is_set():
            for blocks in sequences:
                found = loaded(tier, [block.key for block in blocks])
                if found != bytes_of(blocks[: len(found)]):
                    broken.append(found)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for _ in range(40):
        for blocks in sequences:
            place.clock.now += 1
            tier.store(blocks)
    stop.set()
    for reader in readers:
        reader.join()
    assert not broken
    tier.check()
    assert tier.usage().counters.get("corrupt", 0) == 0
    assert tier.usage().counters["evicted"] > 0


# -- against a model -------------------------------------------------------------------------------------
class TierMachine(RuleBasedStateMachine):
    """A tier against a dict. `opened` is set in a subclass."""

    opened: Open
    words = st.text("ab", min_size=1, max_size=4)

    @initialize(slots=st.sampled_from([2, 5, 64]))
    def start(self, slots: int) -> None:
        self.place, self.slots = self.opened(slots, 64), slots
        self.model: dict[BlockKey, bytes] = {}  # what is there, unless it was evicted
        self.damaged: set[BlockKey] = set()
        self.is_exact = slots == 64 or not self.place.is_bounded  # nothing is ever evicted

    def held(self, keys: Sequence[BlockKey]) -> int:
        """How many leading keys the model has."""
        return next((at for at, key in enumerate(keys) if key not in self.model), len(keys))

    def prune(self) -> None:
        """Forget in the model what the tier has evicted."""
        for key in list(self.model):
            if not self.place.tier.find([key]):
                assert not self.is_exact, "it lost a block"
                del self.model[key]
                self.damaged.discard(key)

    @rule(words=words, tenant=st.sampled_from(["ann", "bob"]), skip=st.integers(0, 2), hold=st.sampled_from([None, 3]))
    def store(self, words: str, tenant: str, skip: int, hold: float | None) -> None:
        until = None if hold is None else self.place.clock.now + hold
        blocks = incoming(words, 64, tenant, until=until)[skip:]
        self.prune()
        stored = self.place.tier.store(blocks)
        assert stored <= len(blocks)
        assert stored == len(blocks) or not self.is_exact
        for block in blocks[:stored]:
            self.model.setdefault(block.key, bytes(block.data))
        assert self.place.tier.find([block.key for block in blocks[:stored]]) == stored

    @rule(words=words, skip=st.integers(0, 1))
    def load(self, words: str, skip: int) -> None:
        keys = chain(words)[skip:]
        self.prune()
        found = loaded(self.place.tier, keys)
        wanted = self.held(keys)
        bad = next((at for at, key in enumerate(keys[:wanted]) if key in self.damaged), None)
        if bad is not None:
            wanted = bad
            self.damaged.discard(keys[bad])
            del self.model[keys[bad]]
        assert found == [self.model[key] for key in keys[:wanted]]

    @rule(words=words)
    def find(self, words: str) -> None:
        self.prune()
        assert self.place.tier.find(chain(words)) == self.held(chain(words))

    @rule(words=words)
    def discard(self, words: str) -> None:
        self.prune()
        keys = chain(words)[-2:]
        assert self.place.tier.discard(keys) == sum(key in self.model for key in keys)
        for key in keys:
            self.model.pop(key, None)
            self.damaged.discard(key)

    @rule(words=words)
    def damage(self, words: str) -> None:
        self.prune()
        key = chain(words)[-1]
        if key in self.model and key not in self.damaged:
            self.place.flip(key)
            self.damaged.add(key)

    @rule(seconds=st.sampled_from([1.0, 10.0]))
    def pass_time(self, seconds: float) -> None:
        self.place.clock.now += seconds

    @rule()
    def reopen(self) -> None:
        if self.place.reopen is not None:
            self.prune()
            self.place.tier.close()
            self.place.reopen()
            self.prune()

    @invariant()
    def it_adds_up(self) -> None:
        self.place.tier.check()
        usage = self.place.tier.usage()
        assert usage.blocks <= self.slots or not self.place.is_bounded
        assert sum(usage.by_tenant.values()) == usage.bytes == usage.blocks * 64

    def teardown(self) -> None:
        self.place.tier.close()
        self.place.is_closed = True


def test_it_is_like_a_dict_that_may_forget(opened: Open) -> None:
    class Machine(TierMachine):
        pass

    Machine.opened = staticmethod(opened)  # type: ignore[assignment]
    few = settings(
        max_examples=60, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck), database=None
    )
    run_state_machine_as_test(Machine, settings=few)


def test_contents_differ() -> None:
    assert content(BLOCK) != content(BLOCK)
