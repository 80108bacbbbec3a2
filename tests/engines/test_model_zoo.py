"""Families that are served: each agrees with the library's eager attention, through windows, soft caps and all."""

from itertools import pairwise

import pytest
import torch
from runs import Library, grid, pages, poison, prompt
from zoo import WINDOW, ZOO, tiny_model

from kvprefetch.engines.batch import Row
from kvprefetch.engines.engine import TransformersEngine, open_engine
from kvprefetch.engines.load import LoadedModel, prepare
from kvprefetch.settings import EngineSettings, PoolSettings, Settings

LENGTH = 4 * WINDOW + 3
CLOSE = 1e-4


def opened(loaded: LoadedModel) -> TransformersEngine:
    """The engine as a worker gets it: the self-test has passed."""
    engine = open_engine(
        loaded,
        Settings(pool=PoolSettings(size="2MiB", block_tokens=8), engine=EngineSettings(device="cpu", chunk_tokens=32)),
    )
    poison(engine)
    return engine


@pytest.mark.parametrize("name", ZOO)
def test_a_served_family_agrees_with_eager(name: str) -> None:
    """Chunks and single tokens, packed beside a row that decodes behind a longer past."""
    loaded = prepare(tiny_model(ZOO[name]()), None, name)
    engine, library = opened(loaded), Library(loaded, "eager")
    first, second = prompt(LENGTH), prompt(LENGTH, seed=1)
    expected, beside = library.logits(first), library.logits(second)
    here, there = pages(engine, LENGTH), pages(engine, LENGTH, first=20)
    engine.forward([Row(second[:60], 0, there)])
    edges = [*grid(0, 70, 32), 71, 72, LENGTH]
    for step, (start, end) in enumerate(pairwise(edges)):
        at = 60 + step
        rows = [Row(second[at : at + 1], at, there), Row(first[start:end], start, here)]
        decoded, prefilled = engine.forward(rows)
        assert (prefilled - expected[end - 1]).abs().max() <= CLOSE
        assert (decoded - beside[at]).abs().max() <= CLOSE


@pytest.mark.parametrize("name", [name for name in ZOO if "windows" in name or name in ("gemma2, soft caps", "gemma3")])
def test_the_prompts_of_this_file_reach_beyond_the_window(name: str) -> None:
    """Were the windows not applied, the test above would see it."""
    loaded = prepare(tiny_model(ZOO[name]()), None, name)
    wide = ZOO[name]()
    wide.sliding_window = 4 * LENGTH
    tokens = prompt(LENGTH)
    narrow_logits = Library(loaded, "eager").logits(tokens)
    wide_logits = Library(prepare(tiny_model(wide), None, "wide"), "eager").logits(tokens)
    torch.testing.assert_close(narrow_logits[:WINDOW], wide_logits[:WINDOW], atol=CLOSE, rtol=0)
    assert (narrow_logits - wide_logits).abs().max() > 100 * CLOSE
