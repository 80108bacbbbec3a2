"""Attention over paged KV: the function that transformers calls in every layer, and its backends.

The function is registered under a neutral name and no mask is registered with it, so transformers passes
no mask; causality, sliding windows and soft caps are applied here.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from kvprefetch.engines.batch import Abandoned, PagedBatch
from kvprefetch.errors import UnsupportedModel
from kvprefetch.ops import gather_rows, write_rows

IMPLEMENTATION = "kvpages_ext"


@dataclass(frozen=True)
class Shape:
    """What one layer asks of attention beyond q, k and v. `window`: tokens visible, self included."""

    scale: float
    window: int | None
    softcap: float | None


Backend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, PagedBatch, Shape], torch.Tensor]
"""`(q [T, q heads, dim], k_pages, v_pages [pages, block, kv heads, dim], batch, shape) -> [T, q heads, dim]`"""


@dataclass
class Probe:
    """Stands in for a batch to learn a model's geometry: (layer, kv heads, q heads, key dim, value dim)."""

    seen: list[tuple[int, int, int, int, int]] = field(default_factory=list)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    kv_batch: "PagedBatch | Probe | None" = None,
    kv_backend: Backend | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **extra: Any,
) -> tuple[torch.Tensor, None]:
    """Write this layer's KV into the batch's pages and attend to all of each sequence's.

    `query` `[1, q heads, T, dim]`, `key`, `value` `[1, kv heads, T, dim]`, after RoPE; returns
    `[1, T, q heads, dim]`. Raises Abandoned when the batch asks for it, UnsupportedModel for arguments that
    would change the result and that nothing here applies.
    """
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    unknown = [name for name in ("s_aux", "position_bias") if extra.get(name) is not None]
    if attention_mask is not None or unknown:
        needs = ", ".join(unknown) or "a mask of its own"
        raise UnsupportedModel(f"attention of layer {layer} needs {needs}, which paged attention does not apply")
    if isinstance(kv_batch, Probe):
        kv_batch.seen.append((layer, key.shape[1], query.shape[1], key.shape[-1], value.shape[-1]))
        return query.new_zeros((1, query.shape[2], query.shape[1], value.shape[-1])), None
    if kv_batch is None or kv_backend is None:
        raise UnsupportedModel(f"attention of layer {layer} was not given the batch: keyword arguments are dropped")
    if kv_batch.abandon():
        raise Abandoned
    k_pages, v_pages = kv_batch.pool.layer(layer)
    _write(k_pages, key[0].transpose(0, 1), kv_batch)
    _write(v_pages, value[0].transpose(0, 1), kv_batch)
    shape = Shape(scaling or query.shape[-1] ** -0.5, sliding_window, softcap)
    return kv_backend(query[0].transpose(0, 1), k_pages, v_pages, kv_batch, shape)[None], None


def _write(pages: torch.Tensor, rows: torch.Tensor, batch: PagedBatch) -> None:
    chosen = rows if batch.writes_all else rows[batch.source]
    write_rows(pages, chosen, batch.slot_page, batch.slot_offset)


AttentionInterface.register(IMPLEMENTATION, attend)


def sdpa_gathered(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, batch: PagedBatch, shape: Shape
) -> torch.Tensor:
    """Each row on its own: gather its pages, then torch's SDPA, grouped heads without copies. Runs anywhere."""
    out = torch.empty_like(q)
    at = 0
    for index, row in enumerate(batch.rows):
        end = at + len(row.tokens)
        k = gather_rows(k_pages, batch.tables[index], row.end).transpose(0, 1)[:, None]
        v = gather_rows(v_pages, batch.tables[index], row.end).transpose(0, 1)[:, None]
        if batch.is_padded:  # what nobody wrote may be NaN, which no mask takes out of a product
            unwritten = (torch.arange(row.end, device=q.device) >= batch.kv_len[index])[:, None]
            k, v = k.masked_fill(unwritten, 0), v.masked_fill(unwritten, 0)
        heads, groups = k.shape[0], q.shape[1] // k.shape[0]
        grouped = q[at:end].transpose(0, 1).reshape(heads, groups, end - at, q.shape[-1])
        k, v = (x.expand(heads, groups, -1, -1) for x in (k, v))
        seen = _attend_row(grouped, k, v, batch, index, shape)
        out[at:end] = seen.flatten(0, 1).transpose(0, 1)
        at = end
    return out


def _attend_row(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: PagedBatch, index: int, shape: Shape
) -> torch.Tensor:
    row = batch.rows[index]
    window = shape.window if shape.window is not None and row.end > shape.window else None
    is_plain = window is None and not batch.is_padded
    if shape.softcap is not None:
        return _soft_capped(q, k, v, _mask(batch, index, window), shape)
    if row.start == 0 and is_plain:  # is_causal is aligned top-left: right only without a past
        return F.scaled_dot_product_attention(q, k, v, is_causal=len(row.tokens) > 1, scale=shape.scale)
    mask = None if len(row.tokens) == 1 and is_plain else _mask(batch, index, window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=shape.scale)


def _soft_capped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, shape: Shape) -> torch.Tensor:
    assert shape.softcap is not None
    scores = shape.softcap * torch.tanh(q @ k.transpose(-1, -2) * shape.scale / shape.softcap)
    weights = torch.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1, dtype=torch.float32)
    return weights.to(q.dtype) @ v


def _mask(batch: PagedBatch, index: int, window: int | None) -> torch.Tensor:
    """bool `[row tokens, kv tokens]`, true where a query may look; built once per forward, not per layer."""
    found = batch.masks.get((index, window))
    if found is None:
        first = sum(len(row.tokens) for row in batch.rows[:index])
        query = batch.positions[first : first + len(batch.rows[index].tokens), None]
        key = torch.arange(batch.rows[index].end, device=query.device)[None]
        found = key <= query
        if window is not None:
            found &= key > query - window
        batch.masks[(index, window)] = found
    return found
