"""What is believed of an engine's cache, against what a plain least-recently-used cache would hold."""

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvprefetch.cache.evict import Demand
from kvprefetch.gateway.replica import BLOCK_BYTES, BLOCK_UNITS, Replica, prompt_keys, prompt_root

SECRET = b"secret"
MOST = 64  # blocks that are remembered: few, so that proofs are quick


def _keys(prompt: str) -> list[bytes]:
    """A block for each letter."""
    return prompt_keys(b"root", [letter.encode() * BLOCK_BYTES for letter in prompt])


def _replica(blocks: int | None) -> Replica:
    return Replica(None if blocks is None else blocks * BLOCK_UNITS, most=MOST)


def _live(now: float = 0.0, tenant: str = "ann") -> Demand:
    return Demand(tenant, speculative=False, now=now)


def _ahead(now: float = 0.0, tenant: str = "ann") -> Demand:
    return Demand(tenant, speculative=True, now=now)


def _serve(replica: Replica, prompt: str, now: float = 0.0) -> None:
    """A request came, and the engine has its prompt."""
    replica.store(_keys(prompt), _live(now), "s")
    replica.use(_keys(prompt), now, "s")


def _has(replica: Replica, prompt: str) -> int:
    return len(replica.match(_keys(prompt)))


# -- keys ------------------------------------------------------------------------------------------------
def test_prompts_that_begin_alike_have_the_same_first_keys() -> None:
    one, other = _keys("abcd"), _keys("abxd")
    assert one[:2] == other[:2]
    assert not set(one[2:]) & set(other[2:])


def test_only_whole_blocks_have_keys() -> None:
    whole = prompt_keys(b"root", [b"x" * BLOCK_BYTES])
    assert prompt_keys(b"root", [b"x" * (2 * BLOCK_BYTES - 1)]) == whole
    assert not prompt_keys(b"root", [b"x" * (BLOCK_BYTES - 1)])


@given(st.lists(st.binary(max_size=1200), max_size=5), st.lists(st.binary(max_size=1200), max_size=3))
def test_keys_depend_on_the_bytes_and_not_on_how_they_are_parted(parts: list[bytes], more: list[bytes]) -> None:
    keys = prompt_keys(b"root", parts)
    assert keys == prompt_keys(b"root", [b"".join(parts)])
    assert prompt_keys(b"root", [*parts, *more])[: len(keys)] == keys


@given(st.lists(st.tuples(*[st.text(max_size=4)] * 3), min_size=2, max_size=2, unique=True))
def test_tenants_models_and_salts_share_no_keys(two: list[tuple[str, str, str]]) -> None:
    one, other = (prompt_root(SECRET, *names) for names in two)
    assert one != other
    assert not set(prompt_keys(one, [b"x" * 2048])) & set(prompt_keys(other, [b"x" * 2048]))


# -- what it holds ---------------------------------------------------------------------------------------
def test_the_least_recently_used_goes_first_and_from_its_end() -> None:
    replica = _replica(6)
    _serve(replica, "abc", 1)
    _serve(replica, "xyz", 2)
    _serve(replica, "abc", 3)
    _serve(replica, "k", 4)
    assert (_has(replica, "abc"), _has(replica, "xyz"), _has(replica, "k")) == (3, 2, 1)


def test_a_prompt_that_is_longer_than_the_whole_cache_fills_it() -> None:
    replica = _replica(3)
    _serve(replica, "ab", 1)
    _serve(replica, "vwxyz", 2)
    assert (_has(replica, "vwxyz"), _has(replica, "ab")) == (3, 0)
    assert len(replica.resident) == 3
    replica.check()


def test_a_smaller_cache_is_taken_for_full_at_once() -> None:
    replica = _replica(None)
    _serve(replica, "abcdef", 1)
    replica.set_capacity(4 * BLOCK_UNITS)
    assert _has(replica, "abcdef") == 4
    assert replica.free_pages == 0
    replica.check()


def test_an_engine_of_unknown_size_takes_what_comes() -> None:
    replica = _replica(None)
    for number in range(20):
        replica.store(prompt_keys(b"%d" % number, [b"x" * 3 * BLOCK_BYTES]), _live(number), "s")
    assert len(replica.resident) == 60
    assert replica.free_pages == 4


def test_speculation_is_charged_and_is_used_once() -> None:
    replica = _replica(8)
    _serve(replica, "ab", 1)
    fresh = replica.store(_keys("abcd"), _ahead(2), "s", "hint", until=9.0)
    assert [block.speculative for block in fresh] == [True, True]
    assert replica.charges()["ann"] == {"used": 2, "speculative": 2}
    assert replica.use(_keys("abcde"), 3, "s") == fresh
    assert replica.use(_keys("abcde"), 4, "s") == []
    assert replica.charges()["ann"] == {"used": 4}


def test_speculation_displaces_nothing_that_was_used_later() -> None:
    """It is as the engine does: a preload is one more request."""
    replica = _replica(4)
    _serve(replica, "ab", 1)
    replica.store(_keys("wxyz"), _ahead(2, "bob"), "t", until=99.0)
    assert (_has(replica, "ab"), _has(replica, "wxyz")) == (0, 4)


# -- what the engine says --------------------------------------------------------------------------------
def _doubted(replica: Replica) -> None:
    """The engine has contradicted what was believed of it, twice."""
    for prompt in ("one", "two"):
        _serve(replica, prompt, 0)
        replica.correct(_keys(prompt), 0)


def test_one_contradiction_is_no_reason_to_believe_nothing_any_more() -> None:
    replica = _replica(None)
    _serve(replica, "old", 1)
    _serve(replica, "abcd", 2)
    limit = replica.limit
    for _ in range(9):
        assert replica.correct(_keys("abcd"), 1) == 3
        assert (_has(replica, "abcd"), _has(replica, "old"), replica.limit) == (1, 3, limit)
        _serve(replica, "abcd", 2)
        replica.agreed()


def test_what_the_engine_has_lost_is_forgotten_and_with_it_what_is_older() -> None:
    replica = _replica(None)
    _doubted(replica)
    _serve(replica, "old", 1)
    _serve(replica, "abcd", 2)
    _serve(replica, "new", 3)
    assert replica.correct(_keys("abcd"), 1) == 3
    assert (_has(replica, "abcd"), _has(replica, "old"), _has(replica, "new")) == (1, 0, 3)
    replica.check()


def test_what_the_engine_says_that_it_has_is_not_forgotten_with_what_is_older() -> None:
    replica = _replica(None)
    _serve(replica, "ab", 1)
    replica.store(_keys("abcd"), _ahead(5), "s", until=99.0)
    assert replica.correct(_keys("abcd"), 2) == 2
    assert _has(replica, "abcd") == 2


def test_an_engine_that_has_all_corrects_nothing() -> None:
    replica = _replica(None)
    _serve(replica, "abc", 1)
    limit = replica.limit
    assert replica.correct(_keys("abc"), 3) == 0
    assert replica.correct(_keys("xyz"), 0) == 0
    assert replica.limit == limit


def test_how_much_an_engine_holds_is_learnt_from_what_it_lost() -> None:
    replica = _replica(None)
    _doubted(replica)
    for number, prompt in enumerate(("aaaa", "bbbb", "cccc")):
        _serve(replica, prompt, number)
    replica.correct(_keys("aaaa"), 0)
    assert replica.limit == 8
    _serve(replica, "aaaa", 4)
    assert len(replica.resident) <= 8


def test_a_known_capacity_is_not_learnt() -> None:
    replica = _replica(12)
    for number, prompt in enumerate(("aaaa", "bbbb", "cccc")):
        _serve(replica, prompt, number)
    replica.correct(_keys("aaaa"), 0)
    replica.confirm(_keys("dddd"), 4, _live(4), "s")
    assert replica.limit == 12


def test_an_engine_that_has_more_than_was_thought_holds_more() -> None:
    replica = _replica(None)
    _doubted(replica)
    _serve(replica, "aaaa", 1)
    _serve(replica, "bbbb", 2)
    replica.correct(_keys("aaaa"), 0)
    before = replica.limit
    replica.confirm(_keys("aaaa"), 3, _live(3), "s")
    assert replica.limit > before
    assert (_has(replica, "aaaa"), _has(replica, "bbbb")) == (3, 4)


def test_what_the_engine_is_found_to_have_is_no_speculation() -> None:
    replica = _replica(None)
    replica.confirm(_keys("abc"), 2, _live(1), "s")
    assert replica.use(_keys("abc"), 2, "s") == []


@pytest.mark.parametrize("tokens", [0, 1, 10**12])
def test_odd_capacities_are_within_limits(tokens: int) -> None:
    replica = Replica(tokens)
    _serve(replica, "abc")
    assert 1 <= replica.limit <= replica.pages
    assert 1 <= len(replica.resident) <= replica.limit


# -- whatever comes --------------------------------------------------------------------------------------
prompts = st.text("ab", max_size=6).map(lambda rest: "p" + rest)
small = st.integers(0, 7)
LIMIT = 7  # less than eight blocks: nothing is evicted in advance


class NaiveLru:
    """Blocks by when they were used last; of those used at once, the last of a prompt goes first."""

    def __init__(self) -> None:
        self.held: dict[str, float] = {}

    def match(self, prompt: str) -> str:
        while prompt and prompt not in self.held:
            prompt = prompt[:-1]
        return prompt

    def request(self, prompt: str, now: float) -> None:
        prompt = prompt[:LIMIT]
        for end in range(len(prompt)):
            self.held[prompt[: end + 1]] = now
        while len(self.held) > LIMIT:
            del self.held[min(self.held, key=lambda block: (self.held[block], -len(block)))]


class AsTheEngine(RuleBasedStateMachine):
    """The same traffic for both, and no corrections: they hold the same."""

    @initialize()
    def start(self) -> None:
        self.replica, self.naive, self.now = _replica(LIMIT), NaiveLru(), 0.0

    @rule(prompt=prompts)
    def serve(self, prompt: str) -> None:
        self.now += 1
        self.naive.request(prompt, self.now)
        _serve(self.replica, prompt, self.now)

    @rule(prompt=prompts)
    def warm(self, prompt: str) -> None:
        self.now += 1
        found = len(self.naive.match(prompt[:LIMIT]))
        self.naive.request(prompt, self.now)
        fresh = self.replica.store(_keys(prompt), _ahead(self.now), "s", until=self.now + 9)
        assert len(fresh) == len(prompt[:LIMIT]) - found
        assert all(block.speculative for block in fresh)

    @rule(prompt=prompts)
    def look(self, prompt: str) -> None:
        assert _has(self.replica, prompt) == len(self.naive.match(prompt))

    @invariant()
    def they_hold_the_same(self) -> None:
        assert set(self.replica.resident) == {_keys(prompt)[-1] for prompt in self.naive.held}
        self.replica.check()


TestAsTheEngine = AsTheEngine.TestCase
TestAsTheEngine.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


class Told(RuleBasedStateMachine):
    """An engine that says anything at all: what it said of a prompt is believed, and the bounds hold."""

    @initialize(blocks=st.sampled_from([None, 1, 3, 7, 40]))
    def start(self, blocks: int | None) -> None:
        self.replica, self.now = _replica(blocks), 0.0
        self.known = None if blocks is None else self.replica.limit

    @rule(prompt=prompts)
    def serve(self, prompt: str) -> None:
        self.now += 1
        _serve(self.replica, prompt, self.now)
        assert _has(self.replica, prompt) == min(len(prompt), self.replica.limit)

    @rule(prompt=prompts)
    def warm(self, prompt: str) -> None:
        self.now += 1
        self.replica.store(_keys(prompt), _ahead(self.now), "s", until=self.now + 9)
        used = self.replica.use(_keys(prompt), self.now, "s")
        assert not any(block.speculative for block in used)
        assert self.replica.use(_keys(prompt), self.now, "s") == []

    @rule(prompt=prompts, until=small)
    def warm_only(self, prompt: str, until: int) -> None:
        self.now += 1
        self.replica.store(_keys(prompt), _ahead(self.now), "s", until=self.now + until)

    @rule(prompt=prompts, cached=small)
    def correct(self, prompt: str, cached: int) -> None:
        had, limit = _has(self.replica, prompt), self.replica.limit
        lost = self.replica.correct(_keys(prompt), cached)
        assert lost == max(had - cached, 0)
        assert _has(self.replica, prompt) == min(had, cached)
        assert self.replica.limit == limit or lost

    @rule(prompt=prompts, cached=small)
    def confirm(self, prompt: str, cached: int) -> None:
        self.now += 1
        limit = self.replica.limit
        self.replica.confirm(_keys(prompt), cached, _live(self.now), "s")
        assert self.replica.limit >= limit
        assert _has(self.replica, prompt) >= min(cached, len(prompt), self.replica.limit)

    @precondition(lambda self: self.now)
    @rule(blocks=st.sampled_from([None, 2, 5]))
    def restart(self, blocks: int | None) -> None:
        self.replica.clear()
        self.replica.set_capacity(None if blocks is None else blocks * BLOCK_UNITS)
        self.known = None if blocks is None else self.replica.limit
        assert not self.replica.resident

    @invariant()
    def bounds_hold(self) -> None:
        assert len(self.replica.resident) <= self.replica.limit <= self.replica.pages
        assert self.known in (None, self.replica.limit)
        assert not any(block.refs for block in self.replica.resident.values())
        self.replica.check()


TestTold = Told.TestCase
TestTold.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
