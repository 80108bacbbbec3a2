"""The attention that runs anywhere agrees with the definition, and refuses what it cannot apply."""

import pytest
import torch
import torch.nn.functional as F
from definition import scene

from kvprefetch.engines.attention import Probe, Shape, attend, sdpa_gathered
from kvprefetch.engines.batch import Abandoned, Row, build_batch
from kvprefetch.errors import UnsupportedModel
from kvprefetch.tiers.device import DevicePool, PageShape

ROWS = {
    "prefill": [(0, 37)],
    "one token": [(0, 1)],
    "prefill behind a past": [(21, 18)],
    "past of whole blocks": [(32, 16)],
    "decode": [(40, 1)],
    "all kinds packed": [(0, 20), (40, 1), (16, 16), (7, 3), (63, 1), (0, 1)],
}
SHAPES = {
    "plain": Shape(0.35, None, None),
    "window": Shape(0.35, 12, None),
    "window of one": Shape(0.35, 1, None),
    "window as long as the row": Shape(0.35, 39, None),
    "soft cap": Shape(0.35, None, 1.5),
    "window and soft cap": Shape(0.35, 12, 1.5),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("heads", [(4, 2), (4, 4), (6, 1)], ids=["grouped", "one each", "one for all"])
def test_gathered_attention_is_attention_by_definition(rows: str, shape: str, heads: tuple[int, int]) -> None:
    made = scene(ROWS[rows], q_heads=heads[0], kv_heads=heads[1])
    found = sdpa_gathered(made.q, *made.pages, made.batch, SHAPES[shape])
    torch.testing.assert_close(found, made.by_definition(SHAPES[shape]), atol=1e-5, rtol=0)


def test_torchs_own_causal_flag_would_be_wrong_behind_a_past() -> None:
    """It lines the triangle up at the top left: the first query would see one token of the past."""
    made, shape = scene([(21, 18)], q_heads=2, kv_heads=2), SHAPES["plain"]
    k, v = made.kv[0]
    q, k, v = (x.transpose(0, 1) for x in (made.q, k, v))
    flagged = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=shape.scale).transpose(0, 1)
    expected = made.by_definition(shape)
    assert (flagged - expected).abs().max() > 0.1
    found = sdpa_gathered(made.q, *made.pages, made.batch, shape)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_masks_are_built_once_for_all_layers_and_apart_for_each_window() -> None:
    made = scene([(5, 6), (9, 4)])
    windowed, plain = SHAPES["window of one"], SHAPES["plain"]
    for shape in (windowed, plain, windowed):
        found = sdpa_gathered(made.q, *made.pages, made.batch, shape)
        torch.testing.assert_close(found, made.by_definition(shape), atol=1e-5, rtol=0)
    assert len(made.batch.masks) == 4


class Layer(torch.nn.Module):
    """What attend asks of a module."""

    def __init__(self, layer_idx: int = 0) -> None:
        super().__init__()
        self.layer_idx = layer_idx


def tensors(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v = torch.randn((3, 1, 2, tokens, 8), generator=torch.Generator().manual_seed(2))
    return q, k, v


def small_pool(layers: int = 2) -> DevicePool:
    pool = DevicePool(PageShape(layers, 2, 8, 4, torch.float32), 4, torch.device("cpu"))
    pool.tensor.fill_(float("nan"))
    return pool


def test_kv_lands_in_its_layer_and_its_slots_alone() -> None:
    pool = small_pool()
    batch = build_batch(pool, [Row([1, 2, 3], 2, [3, 1]), Row([4], 0, [0])], lambda: False)
    q, k, v = tensors(4)
    attend(Layer(1), q, k, v, None, kv_batch=batch, kv_backend=lambda q, *rest: q)
    places = [(3, 2), (3, 3), (1, 0), (0, 0)]
    for at, (page, slot) in enumerate(places):
        assert torch.equal(pool.tensor[page, 1, 0, slot], k[0, :, at])
        assert torch.equal(pool.tensor[page, 1, 1, slot], v[0, :, at])
    assert int(pool.tensor.isnan().all(-1).all(-1).logical_not().sum()) == 2 * len(places)


def test_kv_before_written_is_read_and_never_written() -> None:
    pool = small_pool()
    batch = build_batch(pool, [Row([1, 2, 3], 2, [3, 1], written=4)], lambda: False)
    q, k, v = tensors(3)
    attend(Layer(0), q, k, v, None, kv_batch=batch, kv_backend=lambda q, *rest: q)
    assert pool.tensor[3].isnan().all()
    assert torch.equal(pool.tensor[1, 0, 0, 0], k[0, :, 2])


def test_an_abandoned_layer_writes_nothing() -> None:
    pool = small_pool()
    batch = build_batch(pool, [Row([1, 2, 3], 0, [0])], lambda: True)
    with pytest.raises(Abandoned):
        attend(Layer(), *tensors(3), None, kv_batch=batch, kv_backend=lambda q, *rest: q)
    assert pool.tensor.isnan().all()


def test_what_would_change_the_result_is_refused() -> None:
    batch = build_batch(small_pool(), [Row([1], 0, [0])], lambda: False)
    given = {"kv_batch": batch, "kv_backend": lambda q, *rest: q}
    with pytest.raises(UnsupportedModel, match="layer 5 needs s_aux"):
        attend(Layer(5), *tensors(1), None, **given, s_aux=torch.zeros(2))
    with pytest.raises(UnsupportedModel, match="position_bias"):
        attend(Layer(), *tensors(1), None, **given, position_bias=torch.zeros(2))
    with pytest.raises(UnsupportedModel, match="a mask of its own"):
        attend(Layer(), *tensors(1), torch.ones(1, 1, 1, 1), **given)
    with pytest.raises(UnsupportedModel, match="keyword arguments are dropped"):
        attend(Layer(), *tensors(1), None)


def test_a_probe_learns_the_geometry_of_a_layer() -> None:
    probe = Probe()
    q, k, v = torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 6)
    out, _ = attend(Layer(7), q, k, v, None, kv_batch=probe)
    assert probe.seen == [(7, 2, 4, 8, 6)]
    assert out.shape == (1, 3, 4, 6)
