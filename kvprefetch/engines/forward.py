"""One packed forward through the model's public interface."""

from collections.abc import Callable

import torch

from kvprefetch.engines.attention import Backend
from kvprefetch.engines.batch import PagedBatch, Row, build_batch, never
from kvprefetch.engines.load import LoadedModel
from kvprefetch.tiers.device import DevicePool


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
    wanted, at = [], -1
    for row in rows:
        at += len(row.tokens)
        if row.wants_logits:
            wanted.append(at)
    keep = torch.tensor(wanted, dtype=torch.long, device=device)
    return forward_batch(loaded, batch, backend, ids, keep)


def forward_batch(
    loaded: LoadedModel, batch: PagedBatch, backend: Backend, ids: torch.Tensor, keep: torch.Tensor
) -> torch.Tensor:
    """Logits `[len(keep), vocabulary]` at the packed positions `keep`; `ids` int64 `[1, T]`."""
    output = loaded.model(
        input_ids=ids,
        position_ids=batch.positions[None],
        use_cache=False,
        logits_to_keep=keep,
        kv_batch=batch,
        kv_backend=backend,
    )
    logits: torch.Tensor = output.logits[0]
    return logits
