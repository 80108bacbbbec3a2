"""On a GPU, in bf16: every kernel that is installed agrees with gathered SDPA and with the definition."""

import pytest
import torch
from definition import scene
from runs import grid, pages, poison, prompt, run
from zoo import ZOO, tiny_model

from kvprefetch.engines.attention import Backend, Shape, sdpa_gathered
from kvprefetch.engines.backends import flash_attn, pick_backend, torch_varlen
from kvprefetch.engines.engine import open_engine
from kvprefetch.engines.load import prepare
from kvprefetch.engines.selftest import page_shape
from kvprefetch.settings import EngineSettings, PoolSettings, Settings

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

KERNELS = {"flash-attn": flash_attn, "torch-varlen": torch_varlen}
ROWS = {
    "prefill": [(0, 300)],
    "prefill behind a past": [(300, 130)],
    "decode": [(700, 1), (3, 1)],
    "all kinds packed": [(0, 100), (600, 1), (256, 64), (30, 5)],
}
CLOSE = 0.02  # bf16, values of spread 1


def backend(name: str) -> Backend:
    """The backend, or skip where its kernel is not installed."""
    if name == "sdpa":
        return sdpa_gathered
    if KERNELS[name]() is None:
        pytest.skip(f"{name} is not installed")
    loaded = prepare(tiny_model(ZOO["llama"]()).to("cuda", torch.bfloat16), None, "llama")
    return pick_backend(name, page_shape(loaded, 16), loaded)[1]


@pytest.mark.parametrize("window", [None, 12, 256])
@pytest.mark.parametrize("block", [32, 256])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", ["sdpa", *KERNELS])
def test_a_backend_is_attention_by_definition(name: str, rows: str, block: int, window: int | None) -> None:
    shape = Shape(0.125, window, None)
    made = scene(ROWS[rows], block=block, q_heads=8, kv_heads=2, dim=64, dtype=torch.bfloat16, device="cuda")
    found = backend(name)(made.q, *made.pages, made.batch, shape)
    torch.testing.assert_close(found.float(), made.by_definition(shape).float(), atol=CLOSE, rtol=CLOSE)


@pytest.mark.parametrize("block", [32, 256])
def test_flash_attention_applies_the_soft_cap(block: int) -> None:
    shape = Shape(0.125, 100, 1.5)
    made = scene(ROWS["all kinds packed"], block=block, dim=64, dtype=torch.bfloat16, device="cuda")
    found = backend("flash-attn")(made.q, *made.pages, made.batch, shape)
    torch.testing.assert_close(found.float(), made.by_definition(shape).float(), atol=CLOSE, rtol=CLOSE)


@pytest.mark.parametrize("name", ["auto", "sdpa", *KERNELS])
@pytest.mark.parametrize("family", ["llama", "mistral, windows", "qwen3"])
def test_a_model_is_served_and_a_cached_prefix_is_bit_identical_on_the_same_grid(family: str, name: str) -> None:
    if name in KERNELS:
        backend(name)
    loaded = prepare(tiny_model(ZOO[family]()).to("cuda", torch.bfloat16), None, family)
    settings = Settings(
        pool=PoolSettings(size="8MiB", block_tokens=32),
        engine=EngineSettings(device="cuda", chunk_tokens=64, attention=name),
    )
    engine, tokens = open_engine(loaded, settings), prompt(200)
    poison(engine)
    cold = run(engine, tokens, grid(0, 200, 64), pages(engine, 200))
    where = pages(engine, 200, first=20)
    run(engine, tokens[:128] + prompt(30, seed=1), grid(0, 158, 64), where)
    assert torch.equal(run(engine, tokens, grid(128, 200, 64), where), cold)
