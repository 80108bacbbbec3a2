"""Recorded steps, on a CPU: a replay runs the recorded work again on the same buffers, padding and all."""

import logging
from collections.abc import Callable
from dataclasses import replace

import pytest
import reference_varlen
import torch
from runs import bytes_of, pages, poison, prompt, run
from zoo import ZOO, tiny_model

from kvprefetch.engines.attention import Backend, sdpa_gathered
from kvprefetch.engines.backends import Varlen
from kvprefetch.engines.batch import Row
from kvprefetch.engines.engine import TransformersEngine, open_engine
from kvprefetch.engines.load import prepare
from kvprefetch.engines.recorded import RecordedStep, Work, record_steps
from kvprefetch.settings import EngineSettings, PoolSettings, Settings
from kvprefetch.tiers.device import DevicePool

TOKENS, LONGEST = 24, 256


@pytest.fixture(params=reference_varlen.NAMES)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Varlen:
    """Each kernel's adapter, over its reference."""
    return reference_varlen.stand_in(request.param, monkeypatch)


def again(work: Work) -> tuple[torch.Tensor, Callable[[], None]]:
    """What a CUDA graph does, without one: the same work on the same buffers."""
    output = work()

    def replay() -> None:
        output.copy_(work())

    return output, replay


def opened(family: str, backend: Backend = sdpa_gathered, block: int = 16) -> TransformersEngine:
    """A tiny model of that family whose short rows run by a recording."""
    settings = Settings(
        pool=PoolSettings(size="2MiB", block_tokens=block), engine=EngineSettings(device="cpu", chunk_tokens=block)
    )
    engine = replace(open_engine(prepare(tiny_model(ZOO[family]()), None, family), settings), backend=backend)
    engine = replace(engine, pool=DevicePool(engine.shape, engine.pool.pages, engine.pool.device, has_spare=True))
    step = RecordedStep(engine.loaded, engine.pool, backend, TOKENS, LONGEST, again)
    return replace(engine, steps=(step,))


def assert_replayed_as_run(engine: TransformersEngine, past: int, new: int, written: int = 0) -> None:
    """The same row, recorded and plain: the same logits, the same KV, and nothing else touched."""
    plain, tokens = replace(engine, steps=()), prompt(past + new)
    found = []
    for one in (engine, plain):
        poison(engine)
        where = pages(engine, past + new, first=2)
        if past:
            run(plain, tokens, [0, past], where)
        before = bytes_of(engine.pool.tensor[:-1])
        row = Row(tokens[past:], past, where, written)
        assert engine.steps[0].fits(row)
        logits = one.forward([row])[0]
        found.append((logits, engine.pool.tensor[:-1].clone(), bytes_of(engine.pool.tensor[:-1]) != before))
    (recorded, kv, changed), (expected, plain_kv, plainly_changed) = found
    assert (recorded - expected).abs().max() <= 1e-4
    assert int(recorded.argmax()) == int(expected.argmax())
    torch.testing.assert_close(kv, plain_kv, atol=1e-4, rtol=1e-4, equal_nan=True)
    assert not (changed.view(-1, 4).any(-1) & ~plainly_changed.view(-1, 4).any(-1)).any(), "another slot was written"


ROWS = [(0, 1), (0, 24), (1, 1), (15, 1), (16, 24), (37, 5), (100, 23), (232, 24)]


@pytest.mark.parametrize(("past", "new"), ROWS)
@pytest.mark.parametrize("family", ["llama", "mistral, windows", "gemma2, soft caps", "qwen3"])
def test_a_replay_is_the_plain_forward(family: str, past: int, new: int) -> None:
    assert_replayed_as_run(opened(family), past, new)


@pytest.mark.parametrize(("past", "new"), ROWS)
@pytest.mark.parametrize("block", [16, 256])
def test_a_replay_through_a_varlen_kernel_is_the_plain_forward(kernel: Varlen, block: int, past: int, new: int) -> None:
    assert_replayed_as_run(opened("mistral, windows", kernel, block), past, new)


def test_a_fully_cached_prompts_last_token_writes_into_no_shared_page() -> None:
    engine = opened("llama")
    poison(engine)
    tokens, where = prompt(32), pages(engine, 32)
    expected = run(replace(engine, steps=()), tokens, [0, 32], where)
    before = bytes_of(engine.pool.tensor[:-1])
    found = engine.forward([Row(tokens[31:], 31, where, written=32)])[0]
    assert (found - expected).abs().max() <= 1e-4
    assert torch.equal(bytes_of(engine.pool.tensor[:-1]), before)


def test_one_recording_serves_rows_of_changing_lengths() -> None:
    engine = opened("llama")
    for past, new in [(200, 24), (3, 2), (64, 7), (0, 24), (31, 1)]:
        assert_replayed_as_run(engine, past, new)


def test_rows_that_do_not_fit_run_as_any_other() -> None:
    step = opened("llama").steps[0]
    assert step.fits(Row([1] * TOKENS, LONGEST - TOKENS, []))
    assert not step.fits(Row([1] * (TOKENS + 1), 0, []))
    assert not step.fits(Row([1], LONGEST, []))
    assert not step.fits(Row([1], 0, [], wants_logits=False))


def test_the_cheapest_recordings_come_first() -> None:
    engine = opened("llama")
    made = record_steps(engine.loaded, engine.pool, sdpa_gathered, 10_000, False, again)
    assert [(s.tokens, s.kv_tokens) for s in made[:3]] == [(1, 2_500), (1, 5_000), (1, 10_000)]
    assert len(made) == 9
    assert len(record_steps(engine.loaded, engine.pool, sdpa_gathered, 10_000, True, again)) == 3


def test_what_cannot_be_recorded_is_done_without(caplog: pytest.LogCaptureFixture) -> None:
    engine = opened("llama")

    def impossible(work: Work) -> tuple[torch.Tensor, Callable[[], None]]:
        raise RuntimeError("operation not permitted when stream is capturing")

    assert record_steps(engine.loaded, engine.pool, sdpa_gathered, 256, True, impossible) == ()
    assert "could not be recorded" in caplog.text


def test_a_recording_that_differs_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    """As one would that kept an address of memory which was given back."""
    engine = opened("llama")

    def stale(work: Work) -> tuple[torch.Tensor, Callable[[], None]]:
        return work(), lambda: None

    with caplog.at_level(logging.WARNING):
        assert record_steps(engine.loaded, engine.pool, sdpa_gathered, 256, True, stale) == ()
    assert "unused" in caplog.text
