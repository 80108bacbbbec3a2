"""Attention by its definition, in float64, one query at a time; and pages filled with random KV to try it on."""

from dataclasses import dataclass

import torch

from kvprefetch.engines.attention import Shape
from kvprefetch.engines.batch import PagedBatch, Row, build_batch
from kvprefetch.tiers.device import DevicePool, PageShape


@dataclass(frozen=True)
class Scene:
    """Rows over a pool of one layer whose every slot that no row wrote is NaN."""

    batch: PagedBatch
    q: torch.Tensor  # [T, q heads, dim]
    kv: list[tuple[torch.Tensor, torch.Tensor]]  # each row's keys and values [kv tokens, kv heads, dim]

    @property
    def pages(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.batch.pool.layer(0)

    def by_definition(self, shape: Shape) -> torch.Tensor:
        """What every backend must answer."""
        return torch.cat(
            [
                attention(q, k, v, shape)
                for q, (k, v) in zip(
                    self.q.split([len(row.tokens) for row in self.batch.rows]),
                    self.kv,
                    strict=True,
                )
            ]
        )


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Causal attention of the last tokens of a sequence, `q` `[T, q heads, dim]`, to all of its KV so far."""
    past, group = len(k) - len(q), q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, dim=1) for x in (k, v))
    rows = []
    for at, query in enumerate(q.double()):
        first = 0 if shape.window is None else max(0, past + at + 1 - shape.window)
        seen = slice(first, past + at + 1)
        scores = torch.einsum("hd,thd->ht", query, k[seen]) * shape.scale
        if shape.softcap is not None:
            scores = shape.softcap * torch.tanh(scores / shape.softcap)
        rows.append(torch.einsum("ht,thd->hd", scores.softmax(-1), v[seen]))
    return torch.stack(rows).to(q.dtype)


def scene(
    rows: list[tuple[int, int]],
    *,
    block: int = 16,
    q_heads: int = 4,
    kv_heads: int = 2,
    dim: int = 8,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Scene:
    """`rows`: (tokens in the pages before, tokens now). Pages are taken from a pool in mixed order."""
    draw = torch.Generator().manual_seed(5)
    counts = [-(-(past + now) // block) for past, now in rows]
    pool = DevicePool(PageShape(1, kv_heads, dim, block, dtype), sum(counts) + 2, torch.device(device))
    pool.tensor.fill_(float("nan"))
    free = torch.randperm(pool.pages, generator=draw).tolist()
    kv, made = [], []
    for (past, now), count in zip(rows, counts, strict=True):
        mine, free = free[:count], free[count:]
        k, v = torch.randn((2, past + now, kv_heads, dim), generator=draw).to(device, dtype)
        for at in range(past + now):
            pool.tensor[mine[at // block], 0, 0, at % block] = k[at]
            pool.tensor[mine[at // block], 0, 1, at % block] = v[at]
        kv.append((k, v))
        made.append(Row([0] * now, past, mine))
    q = torch.randn((sum(now for _, now in rows), q_heads, dim), generator=draw).to(device, dtype)
    return Scene(build_batch(pool, made, lambda: False), q, kv)
