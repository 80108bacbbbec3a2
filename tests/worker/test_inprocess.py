"""`kvprefetch.local` as its users see it: threads, streams, outcomes, bad input."""

import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
from workers import cold_answer, local, text

import kvprefetch
from kvprefetch.engines.engine import TransformersEngine
from kvprefetch.engines.forward import run_rows
from kvprefetch.errors import Closed, InvalidRequest, PoolTooSmall, UnknownModel, WorkerFailed
from kvprefetch.inprocess import Local
from kvprefetch.outcomes import Outcome, Use
from kvprefetch.settings import EngineSettings, Settings
from kvprefetch.worker.request import FinishReason

Open = Callable[..., TransformersEngine]
HANDBOOK = [{"role": "system", "content": "Please read the handbook first. " * 20}]
QUESTION = {"role": "user", "content": "What does the policy say?"}
LONG = 1_600  # tokens: many steps of speculation, even on a fast machine


def settled(kv: Local) -> dict[str, object]:
    """The stats once no preload is pending."""
    deadline = time.monotonic() + 60
    while kv.stats()["prefetch"]["pending"]:
        assert time.monotonic() < deadline, "preloads do not settle"
        time.sleep(0.005)
    return kv.stats()  # type: ignore[no-any-return]


def test_a_hint_a_pause_and_the_question_finds_its_context(open_tiny: Open) -> None:
    engine = open_tiny()
    with local(engine) as kv:
        context = kv.context(HANDBOOK)
        hint = kv.prefetch(context, session="u-7", probability=0.8, expected_in_s=5.0, hold_s=300.0)
        warm = hint.wait(timeout_s=60)
        done = kv.generate([*HANDBOOK, QUESTION], session="u-7", max_tokens=8, ignore_eos=True).result()
        assert warm.outcome is Outcome.WARM
        assert done.reused_tokens == warm.tokens > 0
        assert (hint.use, hint.used_tokens) == (Use.USED, warm.tokens)
        prompt = kv.worker.renderer.prompt(kv.context([*HANDBOOK, QUESTION]))
    assert done.tokens == cold_answer(engine, prompt, 8)


def test_a_signal_preloads_the_contexts_it_names(open_tiny: Open) -> None:
    with local(open_tiny()) as kv:
        kv.signal("document_opened", session="u-7", contexts=[kv.context(HANDBOOK)], attributes={"page": 3})
        stats = settled(kv)
        assert stats["prefetch"]["outcomes"]["WARM"] == 1  # type: ignore[index]
        assert stats["signals"] == {"document_opened": 1}


def test_the_next_turn_is_warm_from_the_pause_on(open_tiny: Open) -> None:
    with local(open_tiny()) as kv:
        first = kv.generate([*HANDBOOK, QUESTION], session="u-7", max_tokens=40, ignore_eos=True).result()
        settled(kv)
        history = [*HANDBOOK, QUESTION, {"role": "assistant", "content": first.text}]
        second = kv.generate([*history, {"role": "user", "content": "And shoes?"}], session="u-7", max_tokens=2)
        second.result()
        context = kv.worker.renderer.prefix(kv.context(history))
        assert second.reused_tokens == len(context) // 16 * 16
        assert second.reused_tokens > first.prompt_tokens


def test_live_goes_first_and_speculation_goes_on_afterwards(open_tiny: Open) -> None:
    engine = open_tiny(pages=256)
    with local(engine) as kv:
        hint = kv.prefetch(kv.context(token_ids=text(1, LONG)))
        answers = [kv.generate(token_ids=text(n, 20), max_tokens=3, ignore_eos=True).result() for n in range(2, 6)]
        assert hint.wait(60).outcome is Outcome.WARM
        lost = kv.stats()["prefetch"]["tokens_abandoned"]
    assert lost <= 4 * engine.chunk_tokens  # at most one chunk for each arrival
    assert [a.tokens for a in answers] == [cold_answer(engine, text(n, 20), 3) for n in range(2, 6)]


def test_many_threads_get_the_answers_they_would_get_alone(open_tiny: Open) -> None:
    engine = open_tiny(pages=48)
    prompts = [text(number % 5, 30 + 7 * number) for number in range(12)]
    answers: dict[int, list[int]] = {}
    with local(engine) as kv:

        def ask(number: int) -> None:
            kv.prefetch(kv.context(token_ids=text(50 + number, 200)))
            answers[number] = kv.generate(token_ids=prompts[number], max_tokens=6, ignore_eos=True).result().tokens

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert answers == {number: cold_answer(engine, prompt, 6) for number, prompt in enumerate(prompts)}


def test_text_streams_and_a_stop_string_ends_it(open_tiny: Open) -> None:
    with local(open_tiny()) as kv:
        whole = kv.generate([QUESTION], max_tokens=40, ignore_eos=True).result().text
        stop = whole[12:15]
        stopped = kv.generate([QUESTION], max_tokens=40, ignore_eos=True, stop=stop)
        pieces = list(stopped)
        assert "".join(pieces) == stopped.text == whole[: whole.index(stop)]
        assert stopped.finish_reason is FinishReason.STOP


def test_a_generation_can_be_cancelled(open_tiny: Open) -> None:
    with local(open_tiny(pages=128)) as kv:
        stream = kv.generate([QUESTION], max_tokens=1_500, ignore_eos=True)
        next(iter(stream))
        stream.cancel()
        stream.cancel()
        assert stream.result().finish_reason is FinishReason.CANCELLED
        assert 0 < len(stream.tokens) < 1_500


def test_cancelling_a_hint_twice_is_cancelling_it_once(open_tiny: Open) -> None:
    with local(open_tiny(pages=256)) as kv:
        other = kv.prefetch(kv.context(token_ids=text(1, LONG)), probability=0.9)
        hint = kv.prefetch(kv.context(token_ids=text(2, LONG)), probability=0.1)
        hint.cancel()
        hint.cancel()
        assert hint.wait(60).outcome is Outcome.CANCELLED
        assert other.wait(60).outcome is Outcome.WARM
        assert kv.stats()["prefetch"]["outcomes"]["CANCELLED"] == 1


def test_a_wait_can_time_out_and_the_hint_lives_on(open_tiny: Open) -> None:
    with local(open_tiny(pages=256)) as kv:
        hint = kv.prefetch(kv.context(token_ids=text(1, LONG)))
        with pytest.raises(TimeoutError):
            hint.wait(0.0)
        assert hint.wait(60).outcome is Outcome.WARM


def test_closing_ends_everything_and_nothing_is_taken_after(open_tiny: Open) -> None:
    kv = Local(open_tiny(pages=256), Settings())
    stream = kv.generate(token_ids=text(1, 1_000), max_tokens=900, ignore_eos=True)
    hint = kv.prefetch(kv.context(token_ids=text(2, LONG)))
    kv.close()
    kv.close()
    with pytest.raises(Closed):
        stream.result()
    assert hint.wait(0).outcome is Outcome.CANCELLED
    with pytest.raises(Closed):
        kv.prefetch(kv.context(token_ids=[1, 2]))
    with pytest.raises(Closed):
        kv.signal("typing", session="u")
    with pytest.raises(Closed):
        kv.generate(token_ids=[1, 2])
    hint.cancel()
    kv.check()
    assert kv.stats()["pool"]["in_flight"] == 0


@pytest.mark.parametrize(
    ("prompt", "said"),
    [([], "empty"), ([3] * 2_048, "2048"), ([512], "511"), ([-1], "token ids"), ([2**40], "token ids")],
)
def test_a_bad_prompt_is_refused_with_a_reason(open_tiny: Open, prompt: list[int], said: str) -> None:
    with local(open_tiny()) as kv, pytest.raises(InvalidRequest, match=said):
        kv.generate(token_ids=prompt)


def test_what_cannot_fit_is_said_before_anything_starts(open_tiny: Open) -> None:
    with local(open_tiny(pages=4)) as kv:
        with pytest.raises(PoolTooSmall, match="the pool has 4"):
            kv.generate(token_ids=text(1, 100))
        clipped = kv.prefetch(kv.context(token_ids=text(1, 100))).wait(60)
        assert (clipped.outcome, clipped.tokens) == (Outcome.CLIPPED, 64)


def test_a_context_that_cannot_be_rendered_fails_with_its_reason(open_tiny: Open) -> None:
    with local(open_tiny()) as kv:
        result = kv.prefetch(kv.context(token_ids=[9_999] * 40)).wait(60)
        assert result.outcome is Outcome.FAILED
        assert "token ids" in result.reason


@pytest.mark.parametrize(
    "odd", [{"probability": 1.5}, {"probability": float("nan")}, {"hold_s": -1}, {"expected_in_s": float("inf")}]
)
def test_odd_numbers_in_a_hint_are_refused(open_tiny: Open, odd: dict[str, float]) -> None:
    with local(open_tiny()) as kv, pytest.raises(InvalidRequest):
        kv.prefetch(kv.context(token_ids=[1, 2, 3]), **odd)


def test_a_named_context_is_found_by_its_name_alone(open_tiny: Open) -> None:
    with local(open_tiny()) as kv:
        handbook = kv.context(HANDBOOK, name="handbook")
        assert kv.context(name="handbook") == handbook
        with pytest.raises(InvalidRequest, match="elsewhere"):
            kv.context(name="elsewhere")
        with pytest.raises(InvalidRequest, match="adapter"):
            kv.context(HANDBOOK, adapter="lora")
        with pytest.raises(InvalidRequest, match="other-model"):
            kv.context(HANDBOOK, model="other-model")


def test_with_speculation_off_hints_are_rejected_and_answers_come(open_tiny: Open) -> None:
    with local(open_tiny(), enabled=False) as kv:
        assert kv.prefetch(kv.context(HANDBOOK)).wait(60).outcome is Outcome.REJECTED
        assert kv.generate([QUESTION], session="u", max_tokens=2, ignore_eos=True).result().tokens
        assert kv.stats()["prefetch"]["issued"] == 1


def test_a_session_that_ends_takes_its_preloads_with_it(open_tiny: Open) -> None:
    with local(open_tiny(pages=256)) as kv:
        done = kv.prefetch(kv.context(token_ids=text(1, 64)), session="u", probability=1.0)
        done.wait(60)
        busy = kv.prefetch(kv.context(token_ids=text(2, LONG)), session="v", probability=0.9)
        waiting = kv.prefetch(kv.context(token_ids=text(3, LONG)), session="u", probability=0.1)
        kv.signal("session_ended", session="u")
        assert waiting.wait(60).outcome is Outcome.CANCELLED
        assert busy.wait(60).outcome is Outcome.WARM
        assert done.use is Use.UNUSED


def test_an_old_signal_is_counted_and_not_acted_upon(open_tiny: Open) -> None:
    with local(open_tiny()) as kv:
        kv.signal("document_opened", session="u", contexts=[kv.context(HANDBOOK)], at=time.time() - 10_000)
        assert kv.stats()["signals"] == {"stale": 1}
        assert kv.stats()["prefetch"]["issued"] == 0


def test_a_broken_forward_fails_its_request_and_the_next_is_served(
    open_tiny: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_tiny()
    failures = iter([True])

    def flaky(*arguments: object) -> object:
        if next(failures, False):
            raise RuntimeError("out of memory")
        return run_rows(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("kvprefetch.engines.engine.run_rows", flaky)
    with local(engine) as kv:
        with pytest.raises(WorkerFailed, match="out of memory"):
            kv.generate(token_ids=text(1, 40)).result()
        again = kv.generate(token_ids=text(1, 40), max_tokens=4, ignore_eos=True).result()
        assert kv.stats()["pool"]["quarantined"] == 0
    monkeypatch.undo()
    assert again.tokens == cold_answer(engine, text(1, 40))


def test_a_model_that_is_not_there_is_named(tmp_path: object) -> None:
    settings = replace(Settings(), engine=EngineSettings(device="cpu"))
    with pytest.raises(UnknownModel, match="nowhere"):
        kvprefetch.local(f"{tmp_path}/nowhere", settings=settings)


def test_a_long_text_is_rendered_beside_live_requests_not_before_them(
    open_tiny: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    with local(open_tiny()) as kv:
        may_end, render = threading.Event(), kv.worker.renderer.prefix

        def slow(context: kvprefetch.Context) -> list[int]:
            assert may_end.wait(60)
            return render(context)

        monkeypatch.setattr(kv.worker.renderer, "prefix", slow)
        hint = kv.prefetch(kv.context(HANDBOOK))
        other = kv.prefetch(kv.context(token_ids=text(1, 64)))
        assert other.wait(60).outcome is Outcome.WARM, "what needs no rendering is not kept waiting either"
        assert kv.generate([QUESTION], max_tokens=2, ignore_eos=True).result().tokens
        may_end.set()
        assert hint.wait(60).outcome is Outcome.WARM


def test_a_hint_withdrawn_while_it_is_rendered_stays_withdrawn(
    open_tiny: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    with local(open_tiny()) as kv:
        begun, may_end, render = threading.Event(), threading.Event(), kv.worker.renderer.prefix

        def slow(context: kvprefetch.Context) -> list[int]:
            begun.set()
            assert may_end.wait(60)
            return render(context)

        monkeypatch.setattr(kv.worker.renderer, "prefix", slow)
        hint = kv.prefetch(kv.context(HANDBOOK))
        assert begun.wait(60)
        hint.cancel()
        assert hint.wait(60).outcome is Outcome.CANCELLED
        may_end.set()
        monkeypatch.undo()
        assert kv.prefetch(kv.context(HANDBOOK)).wait(60).outcome is Outcome.WARM


def assert_set(event: threading.Event) -> None:
    """Wait until somebody says go."""
    assert event.wait(60)


def test_a_broken_loop_keeps_nobody_waiting(open_tiny: Open) -> None:
    kv = Local(open_tiny(pages=256), Settings())
    stream = kv.generate(token_ids=text(1, 500), max_tokens=1_500, ignore_eos=True)
    hint = kv.prefetch(kv.context(token_ids=text(2, 64)))

    go = threading.Event()

    def break_down() -> None:
        raise ValueError("a defect")

    kv.worker.post(lambda: assert_set(go))
    kv.worker.post(break_down)
    late = kv.prefetch(kv.context(token_ids=text(3, 64)))  # read in one round with what breaks
    go.set()
    with pytest.raises(WorkerFailed, match="a defect"):
        stream.result()
    assert hint.wait(60).outcome is Outcome.CANCELLED
    assert late.wait(60).outcome is Outcome.CANCELLED
    with pytest.raises(Closed):
        kv.generate(token_ids=[1, 2])
    kv.check()
    kv.close()


def test_only_the_names_used_last_are_remembered(open_tiny: Open) -> None:
    with local(open_tiny(), max_named=2) as kv:
        for name in ("one", "two"):
            kv.context(HANDBOOK, name=name)
        kv.context(name="one")
        kv.context(HANDBOOK, name="three")
        assert kv.context(name="one").messages
        with pytest.raises(InvalidRequest, match="two"):
            kv.context(name="two")


def test_signal_kinds_without_end_are_counted_together(open_tiny: Open) -> None:
    with local(open_tiny()) as kv:
        for number in range(100):
            kv.signal(f"kind {number}", session="u")
        counts = kv.stats()["signals"]
        assert counts["other"] == 36
        assert sum(counts.values()) == 100


def test_too_many_open_preloads_are_rejected_until_some_are_used(open_tiny: Open) -> None:
    with local(open_tiny(), max_open=2) as kv:
        outcomes = [kv.prefetch(kv.context(token_ids=text(n, 32))).wait(60).outcome for n in (1, 2, 3)]
        assert outcomes == [Outcome.WARM, Outcome.WARM, Outcome.REJECTED]
        kv.generate(token_ids=text(1, 40), max_tokens=1, ignore_eos=True).result()
        assert kv.prefetch(kv.context(token_ids=text(3, 32))).wait(60).outcome is Outcome.WARM


def test_a_hint_expires_on_time_while_live_requests_keep_the_worker_busy(open_tiny: Open) -> None:
    with local(open_tiny(pages=128)) as kv:
        busy = kv.generate(token_ids=text(1, 20), max_tokens=1_500, ignore_eos=True)
        next(iter(busy))
        hint = kv.prefetch(kv.context(token_ids=text(2, 64)), hold_s=0.05)
        assert hint.wait(60).outcome is Outcome.EXPIRED
        assert busy.finish_reason is None
        busy.cancel()


def test_a_template_that_breaks_fails_its_hint_and_no_more(open_tiny: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    with local(open_tiny()) as kv:

        def breaks(context: kvprefetch.Context) -> list[int]:
            raise ZeroDivisionError("in a template")

        monkeypatch.setattr(kv.worker.renderer, "prefix", breaks)
        result = kv.prefetch(kv.context(HANDBOOK)).wait(60)
        assert (result.outcome, result.reason) == (Outcome.FAILED, "in a template")
        monkeypatch.undo()
        assert kv.prefetch(kv.context(HANDBOOK)).wait(60).outcome is Outcome.WARM
