"""Which session a request belongs to."""

from collections import defaultdict

import hypothesis.strategies as st
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvprefetch.gateway.contract import Asked, Dialect, Draft
from kvprefetch.gateway.conversations import Conversation, Conversations

ROOMY = (1000, 10**6)


def _asked(*turns: str, opening: str = "be kind", dialect: Dialect = Dialect.CHAT) -> Asked:
    return Asked(dialect, {}, "model", opening.encode(), tuple(turn.encode() for turn in turns))


def _answer(talks: Conversations, talk: Conversation, asked: Asked, answer: str) -> None:
    """The request was answered, and a draft of the next one is kept."""
    draft = Draft(asked.dialect, {}, (asked.opening, *asked.turns, answer.encode()))
    talks.remember(talk, asked, answer.encode(), draft, ())


def _served(talks: Conversations, *turns: str, answer: str = "a", tenant: str = "ann", named: str = "") -> Conversation:
    """A request comes and is answered."""
    talk = talks.of(tenant, _asked(*turns), named)
    _answer(talks, talk, _asked(*turns), answer)
    return talk


def test_a_session_that_has_a_name_is_that_session() -> None:
    talks = Conversations(*ROOMY)
    first = _served(talks, "hello", named="chat 1")
    assert _served(talks, "something else", named="chat 1") is first
    assert _served(talks, "hello", named="chat 2") is not first


def test_a_request_that_begins_with_the_latest_one_and_its_answer_goes_on_with_it() -> None:
    talks = Conversations(*ROOMY)
    first = _served(talks, "hello", answer="hi")
    other = _served(talks, "good day", answer="hi")
    assert _served(talks, "hello", "hi", "how are you?") is first
    assert _served(talks, "hello", "hi", "how are you?", "a", "and now?") is first
    assert other is not first


def test_a_client_that_writes_the_answer_differently_goes_on_with_its_session() -> None:
    talks = Conversations(*ROOMY)
    first = _served(talks, "hello", answer=" hi\n")
    assert _served(talks, "hello", "hi", "how are you?") is first


def test_a_cut_off_answer_does_not_end_the_session() -> None:
    talks = Conversations(*ROOMY)
    first = _served(talks, "hello", answer="")
    assert _served(talks, "hello", "what I saw of it", "go on") is first


def test_a_client_that_tries_again_is_in_the_same_session() -> None:
    talks = Conversations(*ROOMY)
    first = _served(talks, "hello")
    assert _served(talks, "hello") is first


def test_two_clients_that_ask_the_same_at_the_same_time_are_two_sessions() -> None:
    talks = Conversations(*ROOMY)
    first = talks.of("ann", _asked("hello"), "")
    first.running += 1
    assert talks.of("ann", _asked("hello"), "") is not first
    _answer(talks, first, _asked("hello"), "hi")
    assert talks.of("ann", _asked("hello"), "") is not first


def test_a_request_that_begins_like_another_but_takes_another_turn_is_a_new_session() -> None:
    talks = Conversations(*ROOMY)
    first = _served(talks, "hello", "hi", "how are you?")
    assert _served(talks, "hello", "hi", "what is up?") is not first


def test_another_opening_or_dialect_is_another_session() -> None:
    talks = Conversations(*ROOMY)
    first = _served(talks, "hello", answer="hi")
    turns = ("hello", "hi", "more")
    assert talks.of("ann", _asked(*turns, opening="be rude"), "") is not first
    assert talks.of("ann", _asked(*turns, dialect=Dialect.MESSAGES), "") is not first


def test_requests_without_turns_are_sessions_of_their_own() -> None:
    talks = Conversations(*ROOMY)
    first = _served(talks)
    assert _served(talks) is not first
    assert not first._tails


def test_another_tenants_request_is_never_of_the_same_session() -> None:
    talks = Conversations(*ROOMY)
    first = _served(talks, "hello", answer="hi", tenant="ann")
    bob = _served(talks, "hello", "hi", "more", tenant="bob")
    assert bob is not first
    assert (bob.tenant, first.tenant) == ("bob", "ann")
    assert _served(talks, "hello", named="x", tenant="ann") is not _served(talks, "hello", named="x", tenant="bob")


def test_a_session_that_has_ended_is_forgotten() -> None:
    talks = Conversations(*ROOMY)
    first = _served(talks, "hello", answer="hi")
    talks.end(first.session)
    assert talks.find(first.session) is None
    assert first.draft is None
    assert talks.bytes == 0
    assert not talks._by_tail
    assert _served(talks, "hello", "hi", "more") is not first


def test_an_answer_that_comes_after_the_end_is_not_remembered() -> None:
    talks = Conversations(*ROOMY)
    first = talks.of("ann", _asked("hello"), "")
    talks.end(first.session)
    _answer(talks, first, _asked("hello"), "hi")
    assert first.draft is None
    assert not talks._by_tail


def test_sessions_used_last_are_kept() -> None:
    talks = Conversations(2, 10**6)
    first, second = _served(talks, "one", named="1"), _served(talks, "two", named="2")
    assert _served(talks, "one", named="1") is first
    third = _served(talks, "three", named="3")
    assert list(talks.known.values()) == [first, third]
    assert second.draft is None


def test_a_draft_that_is_larger_than_all_may_be_together_is_not_kept() -> None:
    talks = Conversations(10, 100)
    small = _served(talks, "hello", answer="hi")
    large = _served(talks, "x" * 200)
    assert large.draft is None
    assert talks.find(large.session) is large
    assert talks.bytes <= 100
    assert small.draft is not None  # nobody else pays for it


def test_a_callers_name_is_not_taken_for_a_session_that_nobody_has_named() -> None:
    talks = Conversations(*ROOMY)
    named = _served(talks, "hello", named="~1")
    inferred = _served(talks, "good day")
    assert inferred is not named
    assert talks.find(named.session) is named


tenants = st.sampled_from(["ann", "bob", ""])
words = st.sampled_from(["u", "v", "a", "bb"])
conversations = st.lists(words, max_size=5)
names = st.sampled_from(["", "", "", "mine", "~1", "~2", "~3"])


@given(st.lists(st.tuples(tenants, conversations, names, words), max_size=30))
def test_no_session_is_ever_of_two_tenants(requests: list[tuple[str, list[str], str, str]]) -> None:
    talks = Conversations(4, 60)
    of: dict[int, set[str]] = defaultdict(set)
    kept = []
    for tenant, turns, named, answer in requests:
        talk = _served(talks, *turns, answer=answer, tenant=tenant, named=named)
        kept.append(talk)
        of[id(talk)].add(tenant)
        assert talk.tenant == tenant
    assert all(len(seen) == 1 for seen in of.values())


class Interleaved(RuleBasedStateMachine):
    """Requests come, run, are answered, sessions end, in any order; nothing is kept but what is known."""

    def __init__(self) -> None:
        super().__init__()
        self.talks = Conversations(4, 60)
        self.running: list[tuple[Conversation, Asked]] = []

    @rule(tenant=tenants, turns=conversations, named=names)
    def ask(self, tenant: str, turns: list[str], named: str) -> None:
        asked = _asked(*turns)
        talk = self.talks.of(tenant, asked, named)
        assert self.talks.find(talk.session) is talk
        assert talk.tenant == tenant
        talk.running += 1
        self.running.append((talk, asked))

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 9), answer=st.sampled_from(["", "a", "bb", "x" * 40, "x" * 90]))
    def answer(self, which: int, answer: str) -> None:
        talk, asked = self.running.pop(which % len(self.running))
        talk.running -= 1
        _answer(self.talks, talk, asked, answer)

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 9))
    def fail(self, which: int) -> None:
        talk, _ = self.running.pop(which % len(self.running))
        talk.running -= 1

    @precondition(lambda self: self.talks.known)
    @rule(which=st.integers(0, 9))
    def end(self, which: int) -> None:
        session = list(self.talks.known)[which % len(self.talks.known)]
        self.talks.end(session)
        assert self.talks.find(session) is None

    @invariant()
    def bounds_hold(self) -> None:
        assert len(self.talks.known) <= 4
        drafts = [talk.draft for talk in self.talks.known.values() if talk.draft is not None]
        assert self.talks.bytes == 2 * sum(len(part) for draft in drafts for part in draft.canonical) <= 60

    @invariant()
    def what_is_forgotten_leaves_nothing(self) -> None:
        known = set(map(id, self.talks.known.values()))
        assert {id(talk) for talk in self.talks._by_tail.values()} <= known
        assert len(self.talks._by_tail) <= 2 * len(known)
        assert all(talk.session == session for session, talk in self.talks.known.items())


TestInterleaved = Interleaved.TestCase
TestInterleaved.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
