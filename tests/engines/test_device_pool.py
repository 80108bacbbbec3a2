"""The device pool: sizes as people write them, and one block-major tensor behind all views."""

import psutil
import pytest
import torch

from kvprefetch.engines.engine import open_engine
from kvprefetch.engines.load import LoadedModel
from kvprefetch.errors import PoolTooSmall, SettingsError
from kvprefetch.settings import PoolSettings, Settings
from kvprefetch.tiers.device import DevicePool, PageShape, pool_bytes

CPU = torch.device("cpu")
SHAPE = PageShape(layers=3, kv_heads=2, head_dim=8, block_tokens=4, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("2GiB", 2 * 2**30),
        ("512KiB", 512 * 2**10),
        ("1.5 MiB", 3 * 2**19),
        ("1TiB", 2**40),
        ("64MB", 64 * 2**20),
        ("3g", 3 * 2**30),
        ("4096", 4096),
        (" 17 B ", 17),
        ("0", 0),
    ],
)
def test_sizes_are_read_as_they_are_written(size: str, expected: int) -> None:
    assert pool_bytes(size, CPU) == expected


def test_a_share_is_one_of_the_memory_that_is_free() -> None:
    available = psutil.virtual_memory().available
    quarter, all_of_it = pool_bytes("25%", CPU), pool_bytes(" 100 % ", CPU)
    assert 0.2 * available < quarter < 0.3 * available
    assert 3.5 < all_of_it / quarter < 4.5
    assert pool_bytes("12.5%", CPU) < quarter


@pytest.mark.parametrize(
    "size", ["", "much", "-1GiB", "2GiB!", "5iB", "1e9", "2 Gi B", "0%", "101%", "-5%", "%", "half%", "GiB", "1,5GiB"]
)
def test_a_size_that_is_none_is_an_error_that_names_it(size: str) -> None:
    with pytest.raises(SettingsError, match=r"pool\.size"):
        pool_bytes(size, CPU)


def test_a_page_counts_keys_and_values_of_all_layers() -> None:
    assert SHAPE.bytes == 3 * 2 * 4 * 2 * 8 * 2
    pool = DevicePool(SHAPE, 5, CPU)
    assert pool.tensor.nbytes == 5 * SHAPE.bytes
    assert pool.tensor[0].is_contiguous(), "one page moves as one copy"


def test_a_pool_without_room_for_one_page_is_too_small(tiny: LoadedModel) -> None:
    with pytest.raises(PoolTooSmall, match=f"one page takes {SHAPE.bytes} bytes"):
        DevicePool(SHAPE, 0, CPU)
    with pytest.raises(PoolTooSmall, match="room for none"):
        open_engine(tiny, Settings(pool=PoolSettings(size="1KiB")))


def test_a_pool_has_as_many_whole_pages_as_fit(tiny: LoadedModel) -> None:
    page = open_engine(tiny, Settings(pool=PoolSettings(size="1MiB"))).shape.bytes
    for size, pages in ((3 * page, 3), (4 * page - 1, 3), (4 * page, 4)):
        assert open_engine(tiny, Settings(pool=PoolSettings(size=str(size)))).pool.pages == pages


def test_views_of_a_layer_alias_the_tensor() -> None:
    pool = DevicePool(SHAPE, 5, CPU)
    pool.tensor.zero_()
    for layer in range(SHAPE.layers):
        keys, values = pool.layer(layer)
        assert keys.shape == values.shape == (5, 4, 2, 8)
        keys[3, 1] = layer + 1
        values[2, 0] = -layer - 1
    for layer in range(SHAPE.layers):
        assert (pool.tensor[3, layer, 0, 1] == layer + 1).all()
        assert (pool.tensor[2, layer, 1, 0] == -layer - 1).all()
    assert int(pool.tensor.count_nonzero()) == 2 * SHAPE.layers * 2 * 8


def test_a_pool_larger_than_the_machine_is_a_wrong_setting() -> None:
    shape = PageShape(layers=2, kv_heads=2, head_dim=16, block_tokens=16, dtype=torch.float32)
    with pytest.raises(SettingsError, match=r"pool\.size"):
        DevicePool(shape, 2**50, torch.device("cpu"))
