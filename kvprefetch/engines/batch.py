"""A packed batch: rows of several sequences side by side, and where each reads and writes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate

import torch

from kvprefetch.tiers.device import DevicePool


@dataclass(frozen=True)
class Row:
    """`tokens` of one sequence at positions `start`, `start + 1`, …

    `pages` hold the sequence's KV through the row's end. KV at positions before `written` lies in shared
    pages: it is read and never written. `wants_logits`: compute the last position's logits.
    """

    tokens: list[int]
    start: int
    pages: list[int]
    written: int = 0
    wants_logits: bool = True

    @property
    def end(self) -> int:
        """Tokens of the sequence that have KV once the row has run."""
        return self.start + len(self.tokens)


def never() -> bool:
    """An `abandon` that never asks for it."""
    return False


class Abandoned(Exception):
    """A forward was given up at a layer boundary; nothing it wrote was published."""


@dataclass
class PagedBatch:
    """The tensors that attention needs, built once per forward and used by every layer.

    Shapes for T packed tokens in N rows: `positions` int64 `[T]`; `slot_page`, `slot_offset`, `source` int64
    `[writes]` (token `source[i]` is written to that slot); `cu_q`, `cu_kv` int32 `[N+1]`; `kv_len` int32 `[N]`; `table`
    int32 `[N, most]`. `is_padded`: the one row stands for shorter ones; its true lengths are in the tensors.
    """

    pool: DevicePool
    rows: list[Row]
    abandon: Callable[[], bool]
    source: torch.Tensor
    slot_page: torch.Tensor
    slot_offset: torch.Tensor
    positions: torch.Tensor
    cu_q: torch.Tensor
    cu_kv: torch.Tensor
    kv_len: torch.Tensor
    table: torch.Tensor
    max_q: int
    max_kv: int
    writes_all: bool
    tables: list[torch.Tensor]  # one int64 page list a row
    is_padded: bool = False
    masks: dict[tuple[int, int | None], torch.Tensor] = field(default_factory=dict)
    kv_at: tuple[torch.Tensor, torch.Tensor] | None = None  # what `kv_slots` found

    def kv_slots(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Page and slot of every KV token of every row, packed: int64 `[sum of kv_len]` each."""
        if self.kv_at is None:
            block, device = self.pool.shape.block_tokens, self.pool.device
            positions = [torch.arange(row.end, device=device) for row in self.rows]
            pages = [table[at // block] for table, at in zip(self.tables, positions, strict=True)]
            self.kv_at = torch.cat(pages), torch.cat(positions) % block
        return self.kv_at


def build_batch(pool: DevicePool, rows: list[Row], abandon: Callable[[], bool]) -> PagedBatch:
    """Lay `rows` out on the pool's device."""
    block, device = pool.shape.block_tokens, pool.device
    source, slot_page, slot_offset, cu_q = [], [], [], [0]
    for row in rows:
        first = max(row.start, row.written)
        for position in range(first, row.end):
            source.append(cu_q[-1] + position - row.start)
            slot_page.append(row.pages[position // block])
            slot_offset.append(position % block)
        cu_q.append(cu_q[-1] + len(row.tokens))
    used = [row.pages[: -(-row.end // block)] for row in rows]
    most = max(map(len, used))
    padded = [pages + [0] * (most - len(pages)) for pages in used]

    def tensor(values: list[int] | list[list[int]], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return PagedBatch(
        pool=pool,
        rows=rows,
        abandon=abandon,
        source=tensor(source, torch.int64),
        slot_page=tensor(slot_page, torch.int64),
        slot_offset=tensor(slot_offset, torch.int64),
        positions=tensor([p for row in rows for p in range(row.start, row.end)], torch.int64),
        cu_q=tensor(cu_q, torch.int32),
        cu_kv=tensor([0, *accumulate(row.end for row in rows)], torch.int32),
        kv_len=tensor([row.end for row in rows], torch.int32),
        table=tensor(padded, torch.int32),
        max_q=max(len(row.tokens) for row in rows),
        max_kv=max(row.end for row in rows),
        writes_all=len(source) == cu_q[-1],
        tables=[tensor(pages, torch.int64) for pages in used],
    )
