"""One packed forward through the model's public interface."""

from collections.abc import Callable

import torch

from kvprefetch.engines.attention import Backend
from kvprefetch.engines.batch import Row, build_batch
from kvprefetch.engines.load import LoadedModel
from kvprefetch.tiers.device import DevicePool


def never() -> bool:
    """An `abandon` that never asks for it."""
    return False


@torch.inference_mode()
def run_rows(
    loaded: LoadedModel,
    pool: DevicePool,
    backend: Backend,
    rows: list[Row],
    abandon: Callable[[], bool] = never,
) -> torch.Tensor:
    """Run all rows in one forward, writing their KV into their pages.

    Returns logits `[rows that want them, vocabulary]`; none are computed for other positions. `abandon` is
    asked at every layer; when true, Abandoned is raised and the rows' unpublished pages hold garbage.
    """
    device = pool.device
    batch = build_batch(pool, rows, abandon)
    ids = torch.tensor([[t for row in rows for t in row.tokens]], device=device)
    positions = torch.tensor([[p for row in rows for p in range(row.start, row.end)]], device=device)
    wanted, at = [], -1
    for row in rows:
        at += len(row.tokens)
        if row.wants_logits:
            wanted.append(at)
    keep = torch.tensor(wanted, dtype=torch.long, device=device)
    output = loaded.model(
        input_ids=ids,
        position_ids=positions,
        use_cache=False,
        logits_to_keep=keep,
        kv_batch=batch,
        kv_backend=backend,
    )
    logits: torch.Tensor = output.logits[0]
    return logits
