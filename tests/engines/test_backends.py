"""The varlen adapter hands every kernel what it asks for, and the choice of a backend says why."""

import inspect
from dataclasses import replace

import pytest
import reference_varlen
import torch
import torch.nn.attention.varlen as torch_varlen_module
from definition import scene
from runs import Library, pages, poison, prompt
from zoo import ZOO, tiny_model

from kvprefetch.engines.attention import Shape, sdpa_gathered
from kvprefetch.engines.backends import (
    Packed,
    Varlen,
    pick_backend,
    torch_varlen,
)
from kvprefetch.engines.batch import Row
from kvprefetch.engines.engine import open_engine
from kvprefetch.engines.load import LoadedModel, prepare
from kvprefetch.engines.selftest import page_shape, self_test
from kvprefetch.errors import SettingsError
from kvprefetch.settings import EngineSettings, PoolSettings, Settings

ROWS = {
    "one prefill": [(0, 40)],
    "behind a past": [(300, 20)],
    "decodes": [(300, 1), (17, 1), (0, 1)],
    "all kinds packed": [(0, 33), (270, 1), (256, 16), (30, 5), (511, 1)],
}
SHAPES = {
    "plain": Shape(0.35, None, None),
    "window": Shape(0.35, 12, None),
    "soft cap": Shape(0.35, None, 1.5),
    "window and soft cap": Shape(0.35, 270, 1.5),
}


@pytest.fixture(params=reference_varlen.NAMES)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Varlen:
    """Each kernel's adapter, over its reference."""
    return reference_varlen.stand_in(request.param, monkeypatch)


@pytest.mark.parametrize("block", [16, 256])
@pytest.mark.parametrize(
    ("kernel", "shape"),
    [("flash-attn", shape) for shape in SHAPES] + [("torch-varlen", shape) for shape in ("plain", "window")],
    indirect=["kernel"],
)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("heads", [(4, 2), (3, 3)], ids=["grouped", "one each"])
def test_one_kernel_call_for_all_rows_equals_gathered_sdpa(
    kernel: Varlen, rows: str, shape: str, block: int, heads: tuple[int, int]
) -> None:
    made = scene(ROWS[rows], block=block, q_heads=heads[0], kv_heads=heads[1])
    found = kernel(made.q, *made.pages, made.batch, SHAPES[shape])
    expected = sdpa_gathered(made.q, *made.pages, made.batch, SHAPES[shape])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_the_reference_has_the_signature_of_the_torch_that_is_installed() -> None:
    ours, theirs = (
        inspect.signature(module.varlen_attn).parameters for module in (reference_varlen, torch_varlen_module)
    )
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]


@pytest.mark.parametrize(("block", "paged"), [(16, False), (128, False), (256, True), (512, True)])
def test_pages_are_read_in_place_only_where_the_kernel_takes_them(block: int, paged: bool) -> None:
    tables, keys = [], []

    def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: Packed, shape: Shape) -> torch.Tensor:
        tables.append(packed.table)
        keys.append(k.data_ptr())
        return q

    made = scene([(300, 4), (0, 9)], block=block)
    Varlen(kernel)(made.q, *made.pages, made.batch, SHAPES["plain"])
    assert (tables[0] is not None) is paged
    assert (keys[0] == made.pages[0].data_ptr()) is paged


def test_a_torch_whose_kernel_knows_no_pages_yet_is_given_gathered_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    def older(q, k, v, cu_q, cu_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)):  # type: ignore[no-untyped-def]
        return reference_varlen.varlen_attn(
            q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, window_size=window_size, enable_gqa=True
        )

    monkeypatch.setattr(torch_varlen_module, "varlen_attn", older)
    backend = torch_varlen()
    assert backend is not None
    made = scene(ROWS["all kinds packed"], block=256, q_heads=4, kv_heads=2)
    found = backend(made.q, *made.pages, made.batch, SHAPES["window"])
    expected = sdpa_gathered(made.q, *made.pages, made.batch, SHAPES["window"])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("block", [16, 256])
@pytest.mark.parametrize("name", ["llama", "mistral, windows"])
def test_a_whole_model_runs_on_the_varlen_adapter(kernel: Varlen, name: str, block: int) -> None:
    loaded = prepare(tiny_model(ZOO[name]()), None, name)
    settings = Settings(
        pool=PoolSettings(size="2MiB", block_tokens=block), engine=EngineSettings(device="cpu", chunk_tokens=block)
    )
    engine = replace(open_engine(loaded, settings), backend=kernel)
    self_test(loaded, engine.shape, engine.backend)
    poison(engine)
    tokens, where = prompt(60), pages(engine, 60)
    engine.forward([Row(tokens[:20], 0, where)])
    found = engine.forward([Row(tokens[20:], 20, where)])[0]
    assert (found - Library(loaded, "eager").logits(tokens)[-1]).abs().max() <= 1e-4


# -- the choice ------------------------------------------------------------------------------------------
def test_on_a_cpu_auto_is_sdpa(tiny: LoadedModel) -> None:
    assert pick_backend("auto", page_shape(tiny, 16), tiny) == ("sdpa", sdpa_gathered)
    assert pick_backend("sdpa", page_shape(tiny, 16), tiny) == ("sdpa", sdpa_gathered)


@pytest.mark.parametrize("name", ["flash-attn", "torch-varlen"])
def test_a_kernel_asked_for_by_name_says_why_it_cannot_serve(name: str, tiny: LoadedModel) -> None:
    with pytest.raises(SettingsError, match=f"engine.attention '{name}': it needs a CUDA device"):
        pick_backend(name, page_shape(tiny, 16), tiny)


class OnCuda:
    """A loaded model that says it is on a GPU: choosing touches nothing else of it."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.device, self.model = torch.device("cuda"), loaded.model


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float32}, "float16 or bfloat16, the model is torch.float32"),
        ({"head_dim": 320}, "the model's have 320"),
        ({"head_dim": 36}, "the model's have 36"),
    ],
)
@pytest.mark.parametrize("name", ["flash-attn", "torch-varlen"])
def test_a_model_that_a_kernel_cannot_take_is_told_so(
    name: str, changes: dict[str, object], reason: str, tiny: LoadedModel
) -> None:
    shape = replace(page_shape(tiny, 16), **{"dtype": torch.bfloat16, "head_dim": 64, **changes})
    with pytest.raises(SettingsError, match=reason):
        pick_backend(name, shape, OnCuda(tiny))
    assert pick_backend("auto", shape, OnCuda(tiny))[0] == "sdpa"


def test_torchs_kernel_has_no_soft_cap() -> None:
    loaded = prepare(tiny_model(ZOO["gemma2, soft caps"]()), None, "gemma2")
    shape = replace(page_shape(loaded, 16), dtype=torch.bfloat16)
    with pytest.raises(SettingsError, match="no soft cap, which the model needs"):
        pick_backend("torch-varlen", shape, OnCuda(loaded))


def test_an_unknown_backend_is_answered_with_the_known_ones(tiny: LoadedModel) -> None:
    with pytest.raises(SettingsError, match="'magic': choose auto, sdpa or one of flash-attn, torch-varlen"):
        pick_backend("magic", page_shape(tiny, 16), tiny)
