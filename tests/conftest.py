"""A tiny model and engines over it: small enough for stories, real in every part."""

import os
from collections.abc import Callable
from pathlib import Path

if not Path("/dev/nvidiactl").exists():  # before anything imports Triton: there its kernels run on the CPU
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
from tiny_models import tiny_llama, tiny_settings, tiny_tokenizer

from kvprefetch.engines.engine import TransformersEngine, open_engine
from kvprefetch.engines.load import LoadedModel, prepare

torch.set_num_threads(1)  # tiny tensors gain nothing from more, and several test runs would wait for each other


@pytest.fixture(scope="session")
def tiny() -> LoadedModel:
    """The tiny Llama with its tokenizer, prepared for paged attention. It is shared: leave it as it is."""
    tokenizer = tiny_tokenizer()
    model = tiny_llama(eos_token_id=tokenizer.eos_token_id)
    return prepare(model, tokenizer, "tiny-llama")


@pytest.fixture(scope="session")
def open_tiny(tiny: LoadedModel) -> Callable[..., TransformersEngine]:
    """`open_tiny(pages=64, block_tokens=16, chunk_tokens=64, **engine settings)`: an engine with a pool of its own."""

    def open_it(
        pages: int = 64, block_tokens: int = 16, chunk_tokens: int = 64, model: LoadedModel = tiny, **engine: object
    ) -> TransformersEngine:
        return open_engine(model, tiny_settings(model, pages, block_tokens, chunk_tokens, **engine))

    return open_it
