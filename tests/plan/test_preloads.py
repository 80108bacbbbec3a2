"""The preloads that wait or are in work: each ends once, and their number is bounded."""

from math import inf
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvprefetch.cache.evict import Demand
from kvprefetch.cache.pool import BlockPool
from kvprefetch.outcomes import Outcome, Result
from kvprefetch.plan.foresight import Foresight
from kvprefetch.plan.ledger import Ledger
from kvprefetch.plan.preload import Preload
from kvprefetch.plan.preloads import Preloads
from kvprefetch.settings import SpeculationSettings

BLOCK, PAGES = 4, 16


class Desk:
    """Preloads for a small pool, with all that they are told of."""

    def __init__(self, **said: Any) -> None:
        limits = SpeculationSettings(**said)
        self.pool, self.ledger = BlockPool(PAGES), Ledger()
        self.foresight: Foresight[Preload] = Foresight(self.pool, BLOCK, limits)
        self.preloads = Preloads(self.ledger, self.foresight, limits, BLOCK)
        self.told: list[tuple[Preload, Result]] = []
        self.changes = 0
        self.preloads.changed = self.change

    def change(self) -> None:
        self.changes += 1

    def add(
        self,
        name: str = "abc",
        now: float = 0.0,
        session: str = "s",
        *,
        turn: bool = False,
        hold_s: float = 60.0,
        probability: float = 1.0,
        tenant: str = "ann",
    ) -> Preload:
        """A context of a block for each letter."""
        because = "turn_finished" if turn else "hint"
        ticket = self.ledger.issue(
            now,
            tenant=tenant,
            session=session,
            probability=probability,
            expected_in_s=0.0,
            hold_s=hold_s,
            because=because,
        )
        keys = [name[: end + 1].encode() for end in range(len(name))]
        job = Preload(ticket, name, lambda result: self.told.append((job, result)), is_next_turn=turn)
        job.keys, job.size = keys, len(keys) * BLOCK
        self.ledger.start(ticket, keys, len(self.pool.match(keys)))
        self.preloads.add(job, now)
        if job in self.preloads.jobs:
            self.foresight.offer(job, now)
        return job

    def compute(self, job: Preload, now: float = 0.0) -> None:
        """Have all of it in the pool."""
        found = self.pool.match(job.keys)
        self.pool.hold(found)
        blocks, parent = list(found), found[-1] if found else None
        for block, key in zip(
            self.pool.reserve(len(job.keys) - len(found), Demand("ann", True, now), or_fewer=True),
            job.keys[len(found) :],
            strict=False,
        ):
            parent = self.pool.publish(block, key, parent, speculative_until=now + job.ticket.hold_s)
            blocks.append(parent)
        self.pool.release(reversed(blocks))
        job.has_computed = job.has_computed or len(blocks) > len(found)

    def outcome(self, job: Preload) -> Outcome | None:
        return job.ticket.result.outcome if job.ticket.result else None


def test_a_preload_ends_once_and_whoever_waits_is_told_once() -> None:
    desk = Desk()
    job = desk.add()
    desk.preloads.end(job, Result(Outcome.CANCELLED, 0), 1.0)
    desk.preloads.end(job, Result(Outcome.WARM, 12), 2.0)
    assert desk.told == [(job, Result(Outcome.CANCELLED, 0))]
    assert desk.ledger.outcomes.total() == 1
    assert not desk.foresight.jobs
    assert not desk.foresight.planner.knows(job.name)


def test_a_session_has_one_next_turn() -> None:
    desk = Desk()
    old, other, hint = desk.add(turn=True), desk.add(session="t", turn=True), desk.add("xyz")
    new = desk.add("abcd", turn=True)
    assert desk.preloads.jobs == [other, hint, new]
    assert old.ticket.result == Result(Outcome.CANCELLED, 0, "a newer turn took its place")


def test_where_too_many_wait_a_new_one_is_rejected() -> None:
    desk = Desk(max_pending=2)
    jobs = [desk.add(name) for name in ("abc", "def", "ghi")]
    assert [desk.outcome(job) for job in jobs] == [None, None, Outcome.REJECTED]
    assert "2 preloads wait already" in desk.told[0][1].reason


def test_what_is_worth_nothing_makes_room_for_what_is_new() -> None:
    desk = Desk(max_pending=2)
    worthless, wanted = desk.add("abc", probability=0.0), desk.add("def", probability=0.9)
    chosen = desk.preloads.next(0.0)
    assert chosen is not None
    assert chosen[0] is wanted
    new = desk.add("ghi")
    assert [desk.outcome(job) for job in (worthless, wanted, new)] == [Outcome.REJECTED, None, None]
    assert "valued at V=" in desk.told[0][1].reason


def test_who_hints_most_makes_room_even_where_another_waits_for_what_is_worth_nothing_yet() -> None:
    desk = Desk(max_pending=4)
    anns = [desk.add("abc", probability=0.0), desk.add("abd", session="t", probability=0.0)]
    flood = [desk.add(f"x{number}", session=f"u{number}", tenant="bob") for number in range(2)]
    assert desk.preloads.next(0.0) is not None
    flood += [desk.add(f"x{number}", session=f"u{number}", tenant="bob") for number in range(2, 8)]
    assert [desk.outcome(job) for job in anns] == [None, None]
    assert sum(desk.outcome(job) is None for job in flood) == 2
    assert desk.outcome(desk.add("abe", session="v")) is None, "in place of what is worth nothing of her own"
    assert desk.outcome(anns[0]) is Outcome.REJECTED


def test_no_more_are_open_than_may_be() -> None:
    """Those that are on hold count as well."""
    desk = Desk(max_open=2)
    first = desk.add("abc")
    desk.compute(first)
    assert desk.preloads.next(0.0) is None
    assert [desk.outcome(job) for job in (first, desk.add("def"), desk.add("ghi"))] == [
        Outcome.WARM,
        None,
        Outcome.REJECTED,
    ]
    desk.ledger.expire_holds(1000.0)
    assert desk.outcome(desk.add("jkl")) is None


def test_where_speculation_is_off_all_are_rejected() -> None:
    desk = Desk(enabled=False)
    assert desk.outcome(desk.add()) is Outcome.REJECTED
    assert desk.told[0][1].reason == "speculation is switched off"


def test_a_preload_whose_time_has_passed_is_expired() -> None:
    desk = Desk()
    short, long = desk.add("abc", hold_s=5.0), desk.add("def", hold_s=50.0)
    desk.preloads.expire(5.0)
    assert desk.outcome(short) is None
    desk.preloads.expire(5.1)
    assert (desk.outcome(short), desk.outcome(long)) == (Outcome.EXPIRED, None)
    assert desk.preloads.next_expiry == 50.0
    desk.preloads.expire(51.0)
    assert desk.outcome(long) is Outcome.EXPIRED
    assert desk.told[0][1].reason.startswith("its time has passed")


def test_a_preload_that_expires_says_what_is_there_of_it() -> None:
    desk = Desk()
    part = desk.add("ab")
    desk.compute(part)
    job = desk.add("abcd", hold_s=5.0)
    desk.preloads.expire(6.0)
    assert job.ticket.result is not None
    assert job.ticket.result.tokens == 2 * BLOCK


def test_what_is_there_already_is_done_when_the_planner_sees_it() -> None:
    desk = Desk()
    computed = desk.add("abc")
    desk.compute(computed)
    found = desk.add("abc", session="t")
    assert desk.preloads.next(0.0) is None
    assert (desk.outcome(computed), desk.outcome(found)) == (Outcome.WARM, Outcome.ALREADY_WARM)


def test_a_kind_of_preload_is_withdrawn() -> None:
    desk = Desk()
    mine, other = desk.add("abc"), desk.add("def", session="t")
    desk.preloads.withdraw(lambda job: job.ticket.session == "s", "the session ended", 1.0)
    assert mine.ticket.result == Result(Outcome.CANCELLED, 0, "the session ended")
    assert desk.preloads.jobs == [other]


def test_whoever_plans_is_told_of_each_change() -> None:
    desk = Desk()
    job = desk.add()
    assert desk.changes == 1
    desk.preloads.end(job, Result(Outcome.CANCELLED, 0), 1.0)
    desk.preloads.end(job, Result(Outcome.CANCELLED, 0), 1.0)
    assert desk.changes == 2


def test_whoever_is_told_of_an_end_may_ask_again_at_once() -> None:
    desk = Desk(max_pending=3)
    jobs = [desk.add(name, hold_s=5.0) for name in ("abc", "def", "ghi")]

    def ask_again(result: Result) -> None:
        desk.add("again", 6.0, hold_s=5.0)

    for job in jobs:
        job.resolved = ask_again
    desk.preloads.expire(6.0)
    assert all(desk.outcome(job) is Outcome.EXPIRED for job in jobs)
    assert len(desk.preloads.jobs) == 3


@pytest.mark.parametrize("pending", [0, 1])
def test_bounds_of_nothing_hold(pending: int) -> None:
    desk = Desk(max_pending=pending)
    for name in ("abc", "def", "ghi"):
        desk.add(name)
    assert len(desk.preloads.jobs) == pending


which = st.integers(0, 20)


class AnyOrder(RuleBasedStateMachine):
    """Preloads come, are worked on, expire and are withdrawn, in any order."""

    @initialize(pending=st.sampled_from([1, 3, 8]), most=st.sampled_from([2, 6, 40]))
    def start(self, pending: int, most: int) -> None:
        self.desk, self.now = Desk(max_pending=pending, max_open=most), 0.0
        self.pending, self.most = pending, most
        self.ever: list[Preload] = []

    @rule(
        name=st.text("ab", min_size=1, max_size=5),
        session=st.sampled_from(["s", "t", ""]),
        turn=st.booleans(),
        hold_s=st.floats(0, 30),
        probability=st.floats(0, 1),
    )
    def add(self, name: str, session: str, turn: bool, hold_s: float, probability: float) -> None:
        before = set(map(id, self.desk.preloads.jobs))
        job = self.desk.add(name, self.now, session, turn=turn, hold_s=hold_s, probability=probability)
        self.ever.append(job)
        if job not in self.desk.preloads.jobs:
            assert self.desk.outcome(job) is Outcome.REJECTED
            assert turn or {id(kept) for kept in self.desk.preloads.jobs} <= before

    @precondition(lambda self: self.desk.preloads.jobs)
    @rule(at=which)
    def compute(self, at: int) -> None:
        jobs = self.desk.preloads.jobs
        self.desk.compute(jobs[at % len(jobs)], self.now)

    @precondition(lambda self: self.ever)
    @rule(at=which, outcome=st.sampled_from([Outcome.FAILED, Outcome.CANCELLED, Outcome.CLIPPED]))
    def end(self, at: int, outcome: Outcome) -> None:
        job = self.ever[at % len(self.ever)]
        tokens = self.desk.preloads.resident_tokens(job) if outcome.is_resident else 0
        self.desk.preloads.end(job, Result(outcome, tokens), self.now)

    @rule()
    def next(self) -> None:
        chosen = self.desk.preloads.next(self.now)
        assert chosen is None or chosen[0] in self.desk.preloads.jobs

    @rule(seconds=st.sampled_from([0.0, 1.0, 20.0]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.desk.ledger.expire_holds(self.now)
        self.desk.preloads.expire(self.now)
        assert all(job.ticket.expires_at >= self.now for job in self.desk.preloads.jobs)

    @rule()
    def evict_all(self) -> None:
        self.desk.pool.on_evict = lambda block, rule: self.desk.ledger.note_evicted(block.key)
        self.desk.pool.clear()

    @invariant()
    def each_ends_once_and_bounds_hold(self) -> None:
        waiting = [job for job in self.ever if job.ticket.result is None]
        assert sorted(map(id, waiting)) == sorted(map(id, self.desk.preloads.jobs))
        assert {id(job) for job in self.desk.foresight.jobs.values()} <= set(map(id, waiting))
        assert sorted(id(job) for job, _ in self.desk.told) == sorted(id(j) for j in self.ever if j.ticket.result)
        assert len(waiting) <= self.pending
        assert self.desk.ledger.open <= self.most
        stats = self.desk.ledger.stats()
        assert sum(stats["outcomes"].values()) + stats["pending"] == stats["issued"] == len(self.ever)
        turns = [job.ticket.session for job in waiting if job.is_next_turn]
        assert len(turns) == len(set(turns))
        assert self.desk.preloads.next_expiry <= min((job.ticket.expires_at for job in waiting), default=inf)
        self.desk.pool.check()

    def teardown(self) -> None:
        self.desk.preloads.expire(self.now + 1000.0)
        self.desk.ledger.expire_holds(self.now + 2000.0)
        for job in self.ever:
            assert job.ticket.result is not None
            assert (job.ticket.use is not None) == job.ticket.result.outcome.is_resident
        assert self.desk.ledger.open == 0


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
