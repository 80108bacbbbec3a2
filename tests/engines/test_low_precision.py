"""In bf16 the shape of a forward changes its rounding; on the same grid of chunks nothing may change (law 1)."""

import copy
from dataclasses import replace

import pytest
import torch
from runs import Library, bytes_of, grid, pages, prompt, run

from kvprefetch.engines.engine import TransformersEngine, open_engine
from kvprefetch.engines.load import LoadedModel, prepare
from kvprefetch.settings import EngineSettings, PoolSettings, Settings

LENGTH = 200
CHUNK = 64


@pytest.fixture(scope="module")
def half(tiny: LoadedModel) -> LoadedModel:
    """The tiny model, its weights rounded to bf16."""
    return prepare(copy.deepcopy(tiny.model).to(torch.bfloat16), None, "tiny-bf16")


def opened(model: LoadedModel) -> TransformersEngine:
    settings = Settings(
        pool=PoolSettings(size="2MiB", block_tokens=16), engine=EngineSettings(device="cpu", chunk_tokens=CHUNK)
    )
    engine = open_engine(model, settings)
    engine.pool.tensor.fill_(float("nan"))
    return engine


@pytest.mark.parametrize("cached", [64, 128, 192])
def test_cached_and_cold_are_bit_identical_on_the_same_grid(half: LoadedModel, cached: int) -> None:
    tokens = prompt(LENGTH)
    cold_engine, warm_engine = opened(half), opened(half)
    cold = run(cold_engine, tokens, grid(0, LENGTH, CHUNK), pages(cold_engine, LENGTH))
    where = pages(warm_engine, LENGTH + 30, first=3)
    run(warm_engine, tokens[:cached] + prompt(30, seed=1), grid(0, cached + 30, CHUNK), where)
    warm = run(warm_engine, tokens, grid(cached, LENGTH, CHUNK), where)
    assert torch.equal(bytes_of(warm), bytes_of(cold))


@pytest.mark.parametrize("size", [7, 16, CHUNK])
def test_a_split_run_errs_no_more_than_one_and_a_half_times_the_cold_run(half: LoadedModel, size: int) -> None:
    exact = Library(replace(half, model=copy.deepcopy(half.model).float()))
    engine = opened(half)
    split_error, cold_error = [], []
    for seed in range(6):
        tokens, where = prompt(120, seed=seed), pages(engine, 120)
        expected = exact.logits(tokens)[-1]
        cold_error.append(run(engine, tokens, [0, 120], where).float() - expected)
        split_error.append(run(engine, tokens, grid(0, 120, size), where).float() - expected)
    cold, split = (float(torch.stack(errors).square().mean().sqrt()) for errors in (cold_error, split_error))
    assert 0 < cold < 0.5, "bf16 is no float32, and no noise either"
    assert split <= 1.5 * cold
