"""Reference of the two operations between token rows and pages: write rows into slots, gather a sequence.

A layer's pages are `[pages, block, heads, dim]` with any strides; a sequence's tokens are `[tokens, heads, dim]`.
"""

import torch


def write_rows(pages: torch.Tensor, rows: torch.Tensor, page: torch.Tensor, slot: torch.Tensor) -> None:
    """`pages[page[i], slot[i]] = rows[i]`. `page`, `slot`: int64 `[tokens]`, distinct pairs."""
    pages.index_put_((page, slot), rows)


def gather_rows(pages: torch.Tensor, table: torch.Tensor, length: int) -> torch.Tensor:
    """The first `length` tokens of the sequence whose pages `table` (int64 `[n]`) lists: a copy."""
    rows = torch.index_select(pages, 0, table)
    return rows.flatten(0, 1)[:length]
