"""The worker's loop asks the planner: what is worth it is done, what proved wrong is not, and it is remembered."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from workers import OWNER, Bench, local, text

from kvprefetch.cache.keys import block_keys
from kvprefetch.contexts import Context
from kvprefetch.engines.engine import TransformersEngine
from kvprefetch.inprocess import Local
from kvprefetch.outcomes import Outcome, Result, Use
from kvprefetch.plan.foresight import turn_kind
from kvprefetch.plan.library import Library

Open = Callable[..., TransformersEngine]
RULES = [{"role": "system", "content": "Obey the rules of the house. " * 12}]
MENU = [{"role": "system", "content": "Tonight there is soup, and fish. " * 12}]


def ask(bench: Bench, session: str, prompt: list[int]) -> int:
    """Tokens that its request found resident."""
    request = bench.ask(prompt, 1)
    request.session = session
    bench.serve()
    return request.stream.reused_tokens


def settle(kv: Local) -> None:
    """Wait until no preload is pending."""
    deadline = time.monotonic() + 30
    while kv.stats()["prefetch"]["pending"]:
        assert time.monotonic() < deadline, "preloads do not settle"
        time.sleep(0.005)


def test_a_hint_that_nobody_believes_is_never_worked_on_and_says_so(open_tiny: Open) -> None:
    bench = Bench(open_tiny())
    bench.hint(text(1, 128), probability=0.0, hold_s=10)
    bench.speculate_all()
    assert not bench.results
    bench.now = 11
    bench.speculate_all()
    assert bench.results[0].outcome is Outcome.EXPIRED
    assert "V=" in bench.results[0].reason
    assert bench.ledger.tokens_computed == 0


def test_hints_that_are_always_wrong_lose_their_budget_whatever_they_claim(open_tiny: Open) -> None:
    bench = Bench(open_tiny(), budget_tokens=4_000, per_useful=1.5)
    for number in range(60):
        bench.hint(text(number, 128), probability=1.0, hold_s=5)
        bench.speculate_all()
        bench.now += 6
    assert 128 * 3 <= bench.ledger.tokens_computed <= 4_000
    assert bench.results[-1].outcome is Outcome.EXPIRED


@pytest.mark.parametrize("after_steps", [1, 2])
def test_withdrawing_a_hint_hides_its_claim_only_before_work_was_done(open_tiny: Open, after_steps: int) -> None:
    bench = Bench(open_tiny())
    job = bench.hint(text(1, 256), probability=1.0, hold_s=5)
    for _ in range(after_steps):  # the first renders it
        bench.speculate()
    bench.preloads.end(job, Result(Outcome.CANCELLED, 0, "withdrawn"), bench.now)
    bench.foresight.trials.advance(100.0)
    assert (bench.foresight.trials.ratio("hint") < 1) is (after_steps == 2)


def test_hints_that_come_true_keep_theirs(open_tiny: Open) -> None:
    bench = Bench(open_tiny(pages=32), budget_tokens=2_000, per_useful=1.5)
    for number in range(60):
        job = bench.hint(text(number, 128), probability=1.0, hold_s=5)
        bench.speculate_all()
        assert ask(bench, "s", text(number, 128) + text(99, 5)) == 128
        assert job.ticket.use is Use.USED
        bench.now += 6


def test_the_newest_of_equal_hints_goes_first(open_tiny: Open) -> None:
    bench = Bench(open_tiny())
    for number in (1, 2, 3):
        bench.hint(text(number, 64))
    for _ in range(4):  # three are rendered, one is worked on
        bench.speculate()
    assert len(bench.pool.resident) == 4
    assert ask(bench, "", text(3, 64) + text(9, 5)) == 64


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ('Let me see. <tool_call>{"name": "look_up", "arguments": {}}</tool_call>', "tool look_up"),
        ('{"type": "function", "name" : "pay"}', "tool pay"),
        ("I might look_up or pay.", "stop"),
        ('{"name": "unheard_of"}', "stop"),
    ],
)
def test_a_turn_that_calls_a_tool_is_told_from_one_that_waits_for_its_user(answer: str, kind: str) -> None:
    tools = [{"type": "function", "function": {"name": "look_up"}}, {"name": "pay"}, {"function": None}]
    assert turn_kind("stop", answer, tools) == kind


def test_a_branch_that_its_session_has_left_is_wanted_less_than_any_other(open_tiny: Open) -> None:
    bench = Bench(open_tiny(pages=64))
    for session, start in (("ann", 1), ("bob", 2), ("bob", 3), ("", 4)):
        bench.now += 1
        ask(bench, session, text(start, 96))

    def index(start: int) -> float:
        block = bench.pool.resident[block_keys(OWNER.root, text(start, 96), 16)[-1]]
        return bench.foresight.index(block, bench.now)

    assert 0 < index(2) < 1e-6 < min(index(1), index(3), index(4))


def test_who_comes_back_every_time_is_kept_before_who_never_does(open_tiny: Open) -> None:
    bench = Bench(open_tiny(pages=40))
    for turn in range(40):  # regulars return after 60 s, strangers never
        bench.now += 60
        ask(bench, "regular", text(1, 64) + text(7, turn % 3 + 1))
        for stranger in range(2):
            bench.now += 1
            ask(bench, f"stranger {turn} {stranger}", text(1_000 + 2 * turn + stranger, 250))
    assert bench.pool.evictions > 100
    assert ask(bench, "regular", text(1, 64) + text(9, 5)) == 64


def test_a_context_that_always_follows_another_is_made_ready_before_it_is_opened(open_tiny: Open) -> None:
    with local(open_tiny(pages=256)) as kv:
        rules, menu = (kv.context(m, name=n) for m, n in ((RULES, "rules"), (MENU, "menu")))
        question = {"role": "user", "content": "What must I know?"}
        for day in range(8):
            session = f"guest {day}"
            for context, messages in ((rules, RULES), (menu, MENU)):
                kv.signal("opened", session=session, contexts=[context])
                settle(kv)
                kv.generate([*messages, question], session=session, max_tokens=2, ignore_eos=True).result()
            kv.signal("session_ended", session=session)
        kv.clear()
        kv.generate([*RULES, question], session="a new guest", max_tokens=2, ignore_eos=True).result()
        settle(kv)
        done = kv.generate([*MENU, question], session="a new guest", max_tokens=2, ignore_eos=True).result()
        prefix = kv.worker.renderer.prefix(menu)
        assert done.reused_tokens >= len(prefix) // 16 * 16 > 0


def test_the_document_opened_last_goes_first_though_it_is_the_longest(open_tiny: Open) -> None:
    bench = Bench(open_tiny())
    jobs = [bench.hint(text(number, tokens), is_signalled=True) for number, tokens in ((1, 64), (2, 128), (3, 256))]
    for _ in jobs:
        bench.speculate()
    for job in reversed(jobs):
        bench.speculate()
        assert bench.pool.match(job.keys), "the newest first"
        while len(bench.pool.match(job.keys)) < len(job.keys):
            bench.speculate()


def test_what_is_worth_nothing_makes_room_for_what_is_new(open_tiny: Open) -> None:
    bench = Bench(open_tiny())
    for number in range(8):
        bench.hint(text(number, 32), probability=0.0, hold_s=1e6)
    bench.speculate_all()
    good = bench.hint(text(9, 32), probability=1.0)
    assert [result.outcome for result in bench.results] == [Outcome.REJECTED]
    bench.speculate_all()
    assert good.ticket.result is not None
    assert good.ticket.result.outcome is Outcome.WARM


def test_a_hint_that_sleeps_expires_when_its_time_has_passed_and_not_later(open_tiny: Open) -> None:
    bench = Bench(open_tiny())
    bench.hint(text(1, 32), probability=0.0, expected_in_s=2, hold_s=5)
    bench.speculate_all()
    bench.now = 6.5
    bench.speculate_all()
    assert bench.foresight.planner.wakes_at > 7.5
    assert bench.speculator.wakes_at(bench.now) <= 7.001


def test_a_request_that_is_cut_off_leaves_its_session_quiet(open_tiny: Open) -> None:
    bench = Bench(open_tiny())
    request = bench.ask(text(1, 200), 4)
    request.session = "ann"
    bench.live.step(bench.clock, lambda: False)
    assert not bench.foresight.sessions.is_quiet("ann")
    request.cancelled = True
    bench.serve()
    assert bench.foresight.sessions.is_quiet("ann")


def test_the_first_token_is_out_before_the_predictor_hears_of_its_request(
    open_tiny: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(open_tiny())
    request = bench.ask(text(1, 40), 1)
    heard: list[int] = []
    monkeypatch.setattr(bench.foresight, "requested", lambda *said: heard.append(len(request.stream.tokens)))
    bench.serve()
    assert heard == [1]


def test_a_session_is_quiet_once_the_last_of_its_requests_has_ended(open_tiny: Open) -> None:
    bench = Bench(open_tiny())
    for tokens, answer in ((32, 2), (48, 20)):
        bench.ask(text(tokens, tokens), answer).session = "ann"
    while len(bench.live.active) != 1:
        bench.live.step(bench.clock, lambda: False)
    assert not bench.foresight.sessions.is_quiet("ann")
    bench.serve()
    assert bench.foresight.sessions.is_quiet("ann")


def test_a_context_of_many_names_is_forgotten_by_all_of_them(open_tiny: Open) -> None:
    bench, library = Bench(open_tiny()), Library(max_contexts=3)
    for number in range(50):
        which = number % 3 if number < 30 else number  # three by ever new names, then others
        job = bench.hint(text(which, 32))
        job.context = Context(token_ids=tuple(text(which, 32)), name=f"name {number // 2}")
        job.keys = block_keys(OWNER.root, text(which, 32), 16)
        library.add(job)
        for session in ("ann", "bob"):
            library.used(session, "t", job.keys, float(number))
            library.next(session, "t", float(number))
        assert set(library._keys.values()) <= library._contexts.keys()
        assert len(library._keys) <= len(library._contexts) <= 3


def test_what_was_learnt_is_there_after_a_restart(open_tiny: Open, tmp_path: Path) -> None:
    state = tmp_path / "learnt"
    with local(open_tiny(), state_file=str(state)) as kv:
        for _ in range(3):
            kv.generate([*RULES], session="ann", max_tokens=1, ignore_eos=True).result()
        learnt = kv.worker.foresight.sessions.gaps
    assert state.stat().st_mode & 0o077 == 0
    with local(open_tiny(), state_file=str(state)) as kv:
        again = kv.worker.foresight.sessions.gaps
        assert {name: cell.gaps for name, cell in again.cells.items()} == {n: c.gaps for n, c in learnt.cells.items()}
        assert again.cells


@pytest.mark.parametrize("broken", [b"", b"nonsense", b"kvprefetch-state 999 00000000 0\n"])
def test_a_broken_state_begins_anew_and_says_so(
    open_tiny: Open, tmp_path: Path, broken: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    state = tmp_path / "learnt"
    state.write_bytes(broken)
    with local(open_tiny(), state_file=str(state)) as kv:
        assert kv.generate(token_ids=text(1, 20), max_tokens=1, ignore_eos=True).result().tokens
    assert "learning begins anew" in caplog.text
    assert state.read_bytes().startswith(b"kvprefetch-state ")
