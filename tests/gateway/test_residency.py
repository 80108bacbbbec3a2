"""What an engine says of its cache, and what is made of it: stories, and a machine against a naive model."""

import itertools

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvprefetch.gateway.kv_events import take
from kvprefetch.gateway.residency import MAX_RANKS, Residency

BLOCK = 4
PROMPT = list(range(100, 118))  # four blocks and a half


class Engine:
    """Says what an engine would. Its hashes tell us nothing."""

    def __init__(self, rank: int = 0) -> None:
        self.seq, self.rank, self.names = itertools.count(), rank, itertools.count(1)
        self.hashes: dict[tuple, int] = {}

    def hash(self, *content) -> int:
        return self.hashes.setdefault(content, next(self.names) * 7_919 + self.rank)

    def chain(self, ids, salt="", adapter="") -> list[int]:
        ends = range(BLOCK, len(ids) + 1, BLOCK)
        return [self.hash(tuple(ids[:end]), salt, adapter) for end in ends]

    def stored(self, ids, salt="", adapter="", start=0, **changes) -> dict:
        hashes = self.chain(ids, salt, adapter)
        extras = [[each for each in (adapter, salt if at == 0 else "") if each] or None for at in range(len(hashes))]
        return {
            "type": "BlockStored",
            "block_hashes": hashes[start:],
            "parent_block_hash": hashes[start - 1] if start else None,
            "token_ids": list(ids[start * BLOCK : len(hashes) * BLOCK]),
            "block_size": BLOCK,
            "lora_id": None,
            "lora_name": adapter or None,
            "medium": "GPU",
            "extra_keys": extras[start:],
            "group_idx": 0,
            **changes,
        }

    def removed(self, *hashes, **changes) -> dict:
        return {"type": "BlockRemoved", "block_hashes": list(hashes), "medium": "GPU", **changes}

    def message(self, *events) -> list[bytes]:
        payload = msgspec.msgpack.encode([1.5, list(events), self.rank, "a field of later versions"])
        return [b"kv", next(self.seq).to_bytes(8, "big"), payload]


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def residency() -> Residency:
    return Residency()


def test_what_was_stored_is_cached_up_to_the_first_block_that_was_not(engine, residency):
    take(residency, engine.message(engine.stored(PROMPT[:12])))
    assert residency.cached(PROMPT) == 12
    assert residency.cached(PROMPT[:11]) == 8  # whole blocks alone
    assert residency.cached([*PROMPT[:5], 0, *PROMPT[6:]]) == 4
    assert residency.cached(PROMPT[4:]) == 0
    assert residency.cached([]) == 0
    assert residency.block_tokens == BLOCK


def test_a_chain_goes_on_in_a_later_message(engine, residency):
    take(residency, engine.message(engine.stored(PROMPT[:8])))
    take(residency, engine.message(engine.stored(PROMPT, start=2)))
    assert residency.cached(PROMPT) == 16


def test_removed_blocks_are_gone_and_can_come_back(engine, residency):
    chain = engine.chain(PROMPT)
    take(residency, engine.message(engine.stored(PROMPT), engine.removed(chain[2])))
    assert residency.cached(PROMPT) == 8
    take(residency, engine.message(engine.stored(PROMPT[:12], start=2)))
    assert residency.cached(PROMPT) == 16
    take(residency, engine.message(engine.removed(*chain, 12345)))
    assert residency.cached(PROMPT) == 0
    assert len(residency) == 0


def test_a_cleared_cache_holds_nothing(engine, residency):
    take(residency, engine.message(engine.stored(PROMPT), {"type": "AllBlocksCleared"}))
    assert residency.cached(PROMPT) == 0


def test_a_salt_is_a_cache_of_its_own(engine, residency):
    take(residency, engine.message(engine.stored(PROMPT, salt="a")))
    assert residency.cached(PROMPT, "a") == 16
    assert residency.cached(PROMPT, "b") == residency.cached(PROMPT) == 0


def test_an_adapter_is_a_cache_of_its_own(engine, residency):
    take(residency, engine.message(engine.stored(PROMPT, adapter="poems")))
    assert residency.cached(PROMPT, adapter="poems") == 16
    assert residency.cached(PROMPT, salt="poems") == residency.cached(PROMPT) == 0
    take(residency, engine.message(engine.stored(PROMPT, salt="a", adapter="poems")))
    assert residency.cached(PROMPT, "a", "poems") == 16


def test_images_with_the_same_tokens_are_not_the_text(engine, residency):
    stored = engine.stored(PROMPT)
    stored["extra_keys"][1] = [["image-1", 2]]
    take(residency, engine.message(stored))
    assert residency.cached(PROMPT) == 4


@pytest.mark.parametrize("changes", [{"medium": "CPU"}, {"medium": "STORAGE"}, {"locality": "REMOTE"}])
def test_only_what_is_in_the_device_counts(engine, residency, changes):
    take(residency, engine.message(engine.stored(PROMPT, **changes)))
    assert residency.cached(PROMPT) == 0
    take(residency, engine.message(engine.stored(PROMPT), engine.removed(*engine.chain(PROMPT), **changes)))
    assert residency.cached(PROMPT) == 16


def test_nothing_is_said_before_the_first_message(residency):
    assert residency.cached(PROMPT) is None
    assert not residency.is_complete


def test_after_a_gap_only_what_is_stored_anew_counts(engine, residency):
    take(residency, engine.message(engine.stored(PROMPT)))
    assert residency.is_complete
    engine.message(engine.removed(*engine.chain(PROMPT)))  # never arrives
    other = [1, 2, 3, 4]
    take(residency, engine.message(engine.stored(other)))
    assert (residency.cached(PROMPT), residency.cached(other)) == (0, 4)
    assert not residency.is_complete
    take(residency, engine.message(engine.stored([*PROMPT, 0, 0], start=4)))  # its parent is unknown
    assert residency.cached(PROMPT) == residency.cached([*PROMPT[16:], 0, 0]) == 0
    take(residency, engine.message({"type": "AllBlocksCleared"}, engine.stored(PROMPT)))
    assert residency.is_complete
    assert residency.cached(PROMPT) == 16


def test_who_comes_late_knows_that_it_does_not_know_all(engine, residency):
    engine.message(engine.stored(PROMPT))
    take(residency, engine.message(engine.stored([1, 2, 3, 4])))
    assert residency.cached([1, 2, 3, 4]) == 4
    assert not residency.is_complete


def test_an_engine_that_starts_anew_has_an_empty_cache(engine, residency):
    for _ in range(2):
        take(residency, engine.message(engine.stored(PROMPT)))
    anew = Engine()
    take(residency, anew.message(anew.stored([1, 2, 3, 4])))
    assert residency.cached(PROMPT) == 0
    assert residency.is_complete


def test_each_rank_has_a_cache_of_its_own(residency):
    first, second = Engine(0), Engine(1)
    take(residency, first.message(first.stored(PROMPT)))
    assert residency.cached(PROMPT) == 16
    take(residency, second.message(second.stored(PROMPT[:8])))
    assert residency.cached(PROMPT) == 8  # wherever it is sent
    assert residency.cached(PROMPT, rank=0) == 16
    assert residency.cached(PROMPT, rank=7) is None


def test_a_model_with_more_than_one_kind_of_cache_is_not_told_on(engine, residency):
    take(residency, engine.message(engine.stored(PROMPT), engine.stored(PROMPT, group_idx=1)))
    assert residency.cached(PROMPT) is None


@pytest.mark.parametrize(
    "message",
    [
        [b"kv", b"0"],
        [b"kv", bytes(8), b"\xc1"],
        [b"kv", bytes(8), msgspec.msgpack.encode({"ts": 1})],
        [b"kv", bytes(8), msgspec.msgpack.encode([1.0, [{"type": "SomethingElse"}], 0])],
        [b"kv", bytes(8), msgspec.msgpack.encode([1.0, [{"type": "BlockRemoved", "block_hashes": ["text"]}], 0])],
        [b"kv", bytes(8), msgspec.msgpack.encode([1.0, [Engine().stored([2**63] * 4)], 0])],
    ],
)
def test_a_message_that_cannot_be_read_may_have_said_anything(engine, residency, message):
    take(residency, engine.message(engine.stored(PROMPT)))
    take(residency, message)
    assert residency.cached(PROMPT) is None
    take(residency, engine.message(engine.stored(PROMPT)))
    assert residency.cached(PROMPT) == 16


@pytest.mark.parametrize("changes", [{"block_size": 5}, {"block_size": 0}, {"extra_keys": [None]}, {"token_ids": [1]}])
def test_events_that_do_not_add_up_are_not_counted(engine, residency, changes):
    take(residency, engine.message(engine.stored([1, 2, 3, 4]), engine.stored(PROMPT, **changes)))
    assert residency.cached([1, 2, 3, 4]) == 4
    assert residency.cached(PROMPT) == 0
    assert not residency.is_complete


def test_what_is_known_is_bounded(engine):
    residency = Residency(max_blocks=10)
    for number in range(20):
        take(residency, engine.message(engine.stored([number] * 8)))
    assert len(residency) == 10
    assert not residency.is_complete
    assert residency.cached([19] * 8) == 8
    for rank in range(2 * MAX_RANKS):
        other = Engine(rank)
        take(residency, other.message(other.stored([rank] * 4)))
    assert len(residency) <= 10 + MAX_RANKS


class Against(RuleBasedStateMachine):
    """An engine with a cache of blocks, heard with losses, against the plain set of what it has stored."""

    prompts = st.lists(st.integers(0, 2), min_size=BLOCK, max_size=4 * BLOCK)
    salts = st.sampled_from(["", "a", "b"])

    def __init__(self) -> None:
        super().__init__()
        self.engine, self.residency = Engine(), Residency()
        self.held: set[tuple[tuple[int, ...], str]] = set()  # in the engine, by what they stand for
        self.lost = self.heard = False

    def say(self, *events) -> None:
        take(self.residency, self.engine.message(*events))
        self.heard = True

    @rule(ids=prompts, salt=salts)
    def serve(self, ids, salt) -> None:
        ends = range(BLOCK, len(ids) + 1, BLOCK)
        found = next((at for at, end in enumerate(ends) if (tuple(ids[:end]), salt) not in self.held), len(ends))
        if found < len(ends):
            self.held.update((tuple(ids[:end]), salt) for end in ends)
            self.say(self.engine.stored(ids, salt, start=found))

    @rule(ids=prompts, salt=salts, is_heard=st.booleans())
    def evict(self, ids, salt, is_heard) -> None:
        content = (tuple(ids[: len(ids) // BLOCK * BLOCK]), salt)
        if content not in self.held:
            return
        self.held.remove(content)
        event = self.engine.removed(self.engine.hash(*content, ""))
        if is_heard:
            self.say(event)
        else:
            self.engine.message(event)
            self.say()  # the next step's, from which the loss is seen
            self.lost = True

    @rule()
    def clear(self) -> None:
        self.held.clear()
        self.lost = False
        self.say({"type": "AllBlocksCleared"})

    @rule()
    def restart(self) -> None:
        self.engine, self.lost = Engine(), False
        self.held.clear()
        self.say()

    @rule(ids=prompts, salt=salts)
    def look_up(self, ids, salt) -> None:
        ends = range(BLOCK, len(ids) + 1, BLOCK)
        truth = sum(1 for _ in itertools.takewhile(lambda end: (tuple(ids[:end]), salt) in self.held, ends)) * BLOCK
        said = self.residency.cached(ids, salt)
        if not self.heard:
            assert said is None
        elif self.lost:
            assert said <= truth
        else:
            assert said == truth

    @invariant()
    def it_knows_whether_it_knows_all(self) -> None:
        assert self.residency.is_complete == (self.heard and not self.lost)
        assert len(self.residency) <= len(self.held)


TestAgainstANaiveModel = Against.TestCase
TestAgainstANaiveModel.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
