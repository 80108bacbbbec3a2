"""The book of hints: every hint one outcome, every resident one a use, whatever becomes of the workers."""

import pytest
from crew import Crew, report
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvprefetch.errors import InvalidRequest, LimitExceeded, UnknownContext, UnknownModel
from kvprefetch.outcomes import Outcome, Use
from kvprefetch.service.hint import Hint
from kvprefetch.service.hints import COMES_BACK_S, PATIENCE_S, HintBook
from kvprefetch.v1.hints_pb2 import Context
from kvprefetch.v1.workers_pb2 import PLACE_DEVICE, Preload


@pytest.fixture
def crew() -> Crew:
    return Crew()


@pytest.fixture
def book(crew: Crew) -> HintBook:
    return HintBook(crew, max_hints=4, max_bytes=1_000, first_number=100)


def wanted(model: str = "m", session: str = "s", size: int = 2, in_s: float = 0.0) -> Preload:
    return Preload(context=Context(model=model, messages=b"[" * size), session=session, expected_in_s=in_s)


def issue(book: HintBook, tenant: str = "ann", now: float = 0.0, hold_s: float | None = 10.0, **more: object) -> Hint:
    return book.issue(tenant, wanted(**more), now, hold_s)  # type: ignore[arg-type]


def test_a_hint_goes_to_its_sessions_worker_and_ends_with_an_outcome_and_a_use(book: HintBook, crew: Crew) -> None:
    crew.join(book, b"w")
    hint = issue(book, in_s=3.0)
    (message,) = crew.told(b"w", "preload")
    sent = message.preload
    assert (sent.hint, sent.tenant, sent.session, sent.place) == (100, "ann", "s", PLACE_DEVICE)
    assert (sent.expected_in_s, sent.hold_s, sent.context.messages) == (3.0, 10.0, b"[[")
    assert hint.worker_name == "w"
    book.reported(b"w", report(100, "WARM", tokens=64), 1.0)
    assert (hint.outcome, hint.tokens, hint.use) == (Outcome.WARM, 64, None)
    assert hint.resolved.is_set()
    assert not hint.ended.is_set()
    book.reported(b"w", report(100, use="USED", tokens=48), 2.0)
    assert (hint.use, hint.used_tokens) == (Use.USED, 48)
    assert hint.ended.is_set()
    stats = book.tenants["ann"].stats()
    assert (stats["issued"], stats["pending"], stats["use_pending"]) == (1, 0, 0)
    assert (stats["outcomes"]["WARM"], stats["uses"]["USED"], stats["used_tokens"]) == (1, 1, 48)


def test_a_hint_waits_for_a_worker_and_is_told_how_much_later_it_is(book: HintBook, crew: Crew) -> None:
    hint = issue(book, in_s=5.0)
    assert hint.worker is None
    crew.join(book, b"w", now=2.0)
    (message,) = crew.told(b"w", "preload")
    assert message.preload.expected_in_s == 3.0
    assert hint.worker == b"w"


def test_a_hint_that_names_no_model_takes_the_first_one(book: HintBook, crew: Crew) -> None:
    hint = issue(book, model="")
    crew.join(book, b"w", "only")
    assert (hint.model, hint.worker) == ("only", b"w")


def test_a_hint_expires_while_no_worker_comes(book: HintBook) -> None:
    hint = issue(book, in_s=5.0, hold_s=10.0)
    book.expire(14.9)
    assert hint.outcome is None
    book.expire(15.0)
    assert hint.outcome is Outcome.EXPIRED
    assert "no worker of m" in hint.reason


def test_an_unknown_model_is_refused_once_workers_are_known(book: HintBook, crew: Crew) -> None:
    crew.join(book, b"w")
    with pytest.raises(UnknownModel, match="no worker serves 'other'; there is 'm'"):
        issue(book, model="other")
    crew.join(book, b"v", "n")
    with pytest.raises(InvalidRequest, match="say which model: 'm', 'n'"):
        issue(book, model="")
    assert "ann" not in book.tenants


def test_a_model_whose_worker_is_away_is_waited_for(book: HintBook, crew: Crew) -> None:
    crew.join(book, b"w")
    crew.leave(book, b"w")
    assert issue(book).worker is None


def test_another_worker_gets_what_a_vanished_one_had_not_done(book: HintBook, crew: Crew) -> None:
    crew.join(book, b"w")
    crew.join(book, b"v")
    hint = issue(book)
    crew.leave(book, b"w")
    assert hint.worker == b"v"
    book.reported(b"w", report(hint.number, "FAILED"), 1.0)  # it comes back with what nobody waits for
    assert hint.outcome is None
    assert book.counts["stray_reports"] == 1
    crew.leave(book, b"v")
    assert hint.outcome is Outcome.FAILED
    assert "vanished" in hint.reason


def test_a_worker_that_comes_back_in_time_goes_on_with_what_it_had_made_warm(book: HintBook, crew: Crew) -> None:
    crew.join(book, b"w")
    hint = issue(book, hold_s=100.0)
    book.reported(b"w", report(hint.number, "WARM"), 1.0)
    crew.leave(book, b"w", now=2.0)
    crew.join(book, b"w", now=2.0 + COMES_BACK_S - 1)
    book.expire(2.0 + COMES_BACK_S + 1)
    assert hint.use is None
    book.reported(b"w", report(hint.number, use="USED"), 20.0)
    assert hint.use is Use.USED


def test_what_a_worker_that_stays_away_had_made_warm_is_gone(book: HintBook, crew: Crew) -> None:
    crew.join(book, b"w")
    hint = issue(book, hold_s=100.0)
    book.reported(b"w", report(hint.number, "CLIPPED"), 1.0)
    crew.leave(book, b"w", now=2.0)
    book.expire(2.0 + COMES_BACK_S)
    assert (hint.use, hint.reason) == (Use.EVICTED, "the worker vanished")


def test_a_worker_that_says_nothing_is_not_waited_for_for_ever(book: HintBook, crew: Crew) -> None:
    crew.join(book, b"w")
    silent, held = issue(book), issue(book)
    book.reported(b"w", report(held.number, "WARM"), 5.0)
    book.expire(10.0 + PATIENCE_S)
    assert silent.outcome is Outcome.EXPIRED
    assert len(crew.told(b"w", "withdraw")) == 1
    book.expire(15.0 + PATIENCE_S)
    assert held.use is Use.UNUSED


def test_a_worker_that_does_not_read_gets_its_hint_later(book: HintBook, crew: Crew) -> None:
    crew.join(book, b"w")
    crew.full.add(b"w")
    hint = issue(book)
    assert hint.worker is None
    crew.full.clear()
    book.expire(1.0)
    assert hint.worker == b"w"


def test_cancelling_asks_the_worker_whose_word_counts(book: HintBook, crew: Crew) -> None:
    waiting = issue(book)
    book.cancel(waiting, "withdrawn by the caller", 0.0)
    assert (waiting.outcome, waiting.reason) == (Outcome.CANCELLED, "withdrawn by the caller")
    crew.join(book, b"w")
    placed = issue(book)
    book.cancel(placed, "withdrawn by the caller", 0.0)
    assert placed.outcome is None
    assert crew.told(b"w", "withdraw")[0].withdraw.hint == placed.number
    book.reported(b"w", report(placed.number, "WARM"), 1.0)  # it had been done
    assert placed.outcome is Outcome.WARM
    book.cancel(placed, "too late", 1.0)
    assert placed.outcome is Outcome.WARM
    withdrawn = issue(book)
    book.cancel(withdrawn, "withdrawn by the caller", 0.0)
    crew.leave(book, b"w")
    assert withdrawn.outcome is Outcome.CANCELLED


def test_a_hint_is_known_to_its_own_tenant_alone_and_for_a_while_after_its_end(book: HintBook) -> None:
    hint = issue(book)
    with pytest.raises(UnknownContext, match="no hint 100"):
        book.find("bob", hint.number)
    book.cancel(hint, "", 0.0)
    assert book.find("ann", hint.number) is hint
    assert not hint.preload.context.messages  # what may be megabytes is forgotten
    for _ in range(book.max_hints):
        book.cancel(issue(book), "", 0.0)
    with pytest.raises(UnknownContext):
        book.find("ann", hint.number)


def test_a_tenants_open_hints_are_limited_by_number_and_by_bytes(book: HintBook) -> None:
    hints = [issue(book) for _ in range(4)]
    with pytest.raises(LimitExceeded, match=r"4 hints .*service\.max_hints"):
        issue(book)
    issue(book, tenant="bob")  # another tenant's allowance
    book.cancel(hints[0], "", 0.0)
    with pytest.raises(LimitExceeded, match="bytes"):
        issue(book, size=990)
    issue(book)


def test_closing_gives_everything_an_end(book: HintBook, crew: Crew) -> None:
    crew.join(book, b"w")
    open_one, warm = issue(book), issue(book)
    book.reported(b"w", report(warm.number, "WARM"), 1.0)
    book.close("the service was ended", 2.0)
    assert (open_one.outcome, open_one.reason) == (Outcome.FAILED, "the service was ended")
    assert warm.use is Use.UNUSED
    assert open_one.ended.is_set()
    assert warm.ended.is_set()


class AnyStory(RuleBasedStateMachine):
    """Workers come, go, report what they like; callers ask and cancel; time passes."""

    def __init__(self) -> None:
        super().__init__()
        self.crew, self.now = Crew(), 0.0
        self.book = HintBook(self.crew, max_hints=6, max_bytes=10_000, first_number=1)
        self.hints: list[Hint] = []
        self.seen: dict[int, tuple[Outcome | None, Use | None]] = {}

    @rule(worker=st.sampled_from([b"a", b"b", b"c"]), model=st.sampled_from("mn"))
    def come_or_go(self, worker: bytes, model: str) -> None:
        if worker in self.crew.there:
            self.crew.leave(self.book, worker, self.now)
        else:
            self.crew.join(self.book, worker, model, self.now)

    @rule(tenant=st.sampled_from(["ann", "bob"]), model=st.sampled_from(["m", "n"]), hold=st.sampled_from([0.0, 9.0]))
    def ask(self, tenant: str, model: str, hold: float) -> None:
        try:
            self.hints.append(self.book.issue(tenant, wanted(model), self.now, hold))
        except (LimitExceeded, UnknownModel):
            assert len(self.hints) >= 6 or self.crew.known

    @rule(
        data=st.data(), worker=st.sampled_from([b"a", b"b", b"c"]), outcome=st.sampled_from(["", *Outcome.__members__])
    )
    def say(self, data: st.DataObject, worker: bytes, outcome: str) -> None:
        if self.hints:
            hint = data.draw(st.sampled_from(self.hints))
            use = data.draw(st.sampled_from(["", *Use.__members__]))
            self.book.reported(worker, report(hint.number, outcome, use), self.now)

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if self.hints:
            self.book.cancel(data.draw(st.sampled_from(self.hints)), "", self.now)

    @rule(seconds=st.sampled_from([1.0, 5.0, 30.0, 4_000.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.book.expire(self.now)

    @invariant()
    def the_sums_hold_and_nothing_is_said_twice(self) -> None:
        for hint in self.hints:
            outcome, use = self.seen.get(hint.number, (None, None))
            assert outcome in (None, hint.outcome)
            assert use in (None, hint.use)
            assert hint.use is None or (hint.outcome is not None and hint.outcome.is_resident)
            self.seen[hint.number] = hint.outcome, hint.use
        for name, tenant in self.book.tenants.items():
            mine = [hint for hint in self.hints if hint.tenant == name]
            stats = tenant.stats()
            assert stats["issued"] == len(mine) == sum(stats["outcomes"].values()) + stats["pending"]
            assert (
                stats["pending"] + stats["use_pending"] == len(tenant.open) == sum(not h.ended.is_set() for h in mine)
            )
            assert tenant.open_bytes == sum(hint.size for hint in tenant.open.values())
            assert len(tenant.ended) <= 6

    def teardown(self) -> None:
        self.crew.there.clear()
        self.book.expire(self.now + 20_000.0)
        self.book.expire(self.now + 40_000.0)
        assert all(hint.ended.is_set() for hint in self.hints)


TestAnyStory = AnyStory.TestCase
TestAnyStory.settings = hypothesis_settings(max_examples=60, stateful_step_count=30, deadline=None)
