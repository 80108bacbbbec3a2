"""Equal fingerprints mean equal pages: whatever changes a page changes the fingerprint (law 4)."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from zoo import LLAMA3, PLAIN, SHAPE, YARN, ZOO, tiny_model

from kvprefetch.cache.keys import Fingerprint, Namespace, Scope, root_key
from kvprefetch.engines.engine import open_engine
from kvprefetch.engines.fingerprint import fingerprint
from kvprefetch.engines.load import LoadedModel, load_model, prepare
from kvprefetch.engines.selftest import page_shape
from kvprefetch.settings import EngineSettings, PoolSettings, Settings


def taken(model: Any, block: int = 16, dtype: torch.dtype = torch.float32, adapter: str = "") -> Fingerprint:
    """The fingerprint of a model."""
    loaded = prepare(model.to(dtype), None, "any name")
    return fingerprint(loaded.model, page_shape(loaded, block), adapter)


def llama(**changes: Any) -> Any:
    return tiny_model(hf.LlamaConfig(**{**SHAPE, **PLAIN, **changes}))


@pytest.fixture(scope="module")
def plain() -> Fingerprint:
    return taken(llama())


def test_the_same_model_twice_has_one_fingerprint(plain: Fingerprint) -> None:
    assert taken(llama()) == plain


WEIGHTS = list(llama().state_dict())


@pytest.mark.parametrize("weight", [*WEIGHTS[:6], WEIGHTS[-2], WEIGHTS[-1]])
def test_one_bit_of_any_weight_changes_it(plain: Fingerprint, weight: str) -> None:
    model = llama()
    bits = model.state_dict()[weight].view(torch.int32).flatten()
    bits[-1] ^= 1
    assert taken(model) != plain


def test_two_weights_that_change_places_change_it(plain: Fingerprint) -> None:
    model = llama()
    model.model.layers[0].mlp, model.model.layers[1].mlp = model.model.layers[1].mlp, model.model.layers[0].mlp
    assert taken(model) != plain


CHANGES: dict[str, Callable[[], Fingerprint]] = {
    "dtype": lambda: taken(llama(), dtype=torch.bfloat16),
    "block size": lambda: taken(llama(), block=32),
    "rope theta": lambda: taken(llama(rope_parameters={"rope_type": "default", "rope_theta": 20_000.0})),
    "rope of llama3": lambda: taken(llama(rope_parameters=LLAMA3)),
    "rope yarn": lambda: taken(llama(rope_parameters=YARN)),
    "rope yarn, another factor": lambda: taken(llama(rope_parameters={**YARN, "factor": 8.0})),
    "a rounding constant": lambda: taken(llama(rms_norm_eps=1e-5)),
    "adapter": lambda: taken(llama(), adapter="tuned"),
    "family": lambda: taken(tiny_model(ZOO["qwen2"]())),
    "window": lambda: taken(tiny_model(ZOO["mistral, windows"]())),
}


def test_what_changes_a_page_changes_it_and_no_two_changes_agree(plain: Fingerprint) -> None:
    every = [plain, *(change() for change in CHANGES.values())]
    secret, namespace = b"s" * 32, Namespace(Scope.PRIVATE, "ann")
    assert len({root_key(secret, namespace, one) for one in every}) == len(every)


def test_a_window_alone_changes_it() -> None:
    narrow, wide = ZOO["mistral, windows"](), ZOO["mistral, windows"]()
    wide.sliding_window = 25
    assert taken(tiny_model(narrow)) != taken(tiny_model(wide))


def test_where_a_model_lies_does_not_change_it(tmp_path: Path, tiny: LoadedModel) -> None:
    """Loaded from two folders, and used as it was in memory."""
    settings = EngineSettings(device="cpu", dtype="float32")
    found = []
    for name in ("here", "there"):
        tiny.model.save_pretrained(tmp_path / name)
        tiny.tokenizer.save_pretrained(tmp_path / name)
        loaded = load_model(tmp_path / name, settings)
        found.append(fingerprint(loaded.model, page_shape(loaded, 16)))
    assert found[0] == found[1]
    assert found[0] == fingerprint(tiny.model, page_shape(tiny, 16))


def test_running_a_model_does_not_change_it(tiny: LoadedModel) -> None:
    before = fingerprint(tiny.model, page_shape(tiny, 16))
    settings = Settings(
        pool=PoolSettings(size="1MiB", block_tokens=16), engine=EngineSettings(device="cpu", chunk_tokens=64)
    )
    engine = open_engine(replace(tiny, name="the same"), settings)
    assert engine.fingerprint.numerics == "cpu sdpa 64"
    assert replace(engine.fingerprint, numerics="") == before == fingerprint(tiny.model, engine.shape)
