"""The varlen functions of flash-attention 2 and of torch, on a CPU: their signatures, their checks, the definition."""

import sys
from itertools import pairwise
from types import ModuleType

import pytest
import torch
import torch.nn.attention.varlen as torch_varlen_module
from definition import attention

from kvprefetch.engines.attention import Shape
from kvprefetch.engines.backends import Varlen, flash_attn, torch_varlen

Window = tuple[int, int]
NAMES = ("flash-attn", "torch-varlen")


def stand_in(name: str, monkeypatch: pytest.MonkeyPatch) -> Varlen:
    """The product's adapter of a kernel, over the function of this module in the place of the real one."""
    package = ModuleType("flash_attn")
    package.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr(torch_varlen_module, "varlen_attn", varlen_attn)
    adapted = flash_attn() if name == "flash-attn" else torch_varlen()
    assert adapted is not None
    return adapted


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
) -> torch.Tensor:
    """flash-attn 2.8's: `causal` is aligned bottom-right, a window counts the tokens beside the query."""
    _demand(dropout_p == 0.0 and alibi_slopes is None and not return_attn_probs, "not used here")
    lengths = cu_seqlens_k.diff()
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k, block_table)
    _check_longest(cu_seqlens_q, lengths, max_seqlen_q, max_seqlen_k)
    right = 0 if causal else window_size[1]
    shape = _shape(q, softmax_scale, (window_size[0], right), softcap)
    return _rows(q, k, v, cu_seqlens_q, lengths, block_table, shape)


def varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: object = None,
    scale: float | None = None,
    window_size: Window = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    num_splits: int | None = None,
) -> torch.Tensor:
    """torch's: pages need `seqused_k`, packed tokens `cu_seq_k`; fewer key heads must be asked for."""
    _demand(return_aux is None and num_splits in (None, 1), "not used here")
    _demand(enable_gqa or query.shape[1] == key.shape[-2], "the same number of heads, or enable_gqa")
    _demand((block_table is None) == (seqused_k is None), "a block table requires seqused_k")
    _demand((block_table is None) == (cu_seq_k is not None), "packed tokens require cu_seq_k")
    given = cu_seq_k if seqused_k is None else seqused_k
    assert given is not None
    lengths = given.diff() if seqused_k is None else given
    _check(query, key, value, cu_seq_q, given, block_table)
    _check_longest(cu_seq_q, lengths, max_q, max_k)
    return _rows(query, key, value, cu_seq_q, lengths, block_table, _shape(query, scale, window_size, 0.0))


def _shape(q: torch.Tensor, scale: float | None, window: Window, softcap: float) -> Shape:
    left, right = window
    _demand(right == 0, "only causal attention is wanted")
    return Shape(scale or q.shape[-1] ** -0.5, None if left < 0 else left + 1, softcap or None)


def _rows(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    lengths: torch.Tensor,
    table: torch.Tensor | None,
    shape: Shape,
) -> torch.Tensor:
    out, at = torch.full_like(q, float("nan")), 0
    for row, (start, end) in enumerate(pairwise(cu_q.tolist())):
        length = int(lengths[row])
        if table is None:
            mine = [x[at : at + length] for x in (k, v)]
        else:
            pages = table[row, : -(-length // k.shape[1])].long()
            mine = [x[pages].flatten(0, 1)[:length] for x in (k, v)]
        out[start:end] = attention(q[start:end], *mine, shape)
        at += length
    return out


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    kv: torch.Tensor,
    table: torch.Tensor | None,
) -> None:
    heads, dim = k.shape[-2:]
    _demand(q.dtype == k.dtype == v.dtype, "query, key and value must have the same dtype")
    _demand(all(x.stride(-1) == 1 for x in (q, k, v)), "the last dimension must be contiguous")
    for given in (cu_q, kv, *([] if table is None else [table])):
        _demand(given.dtype == torch.int32, "cu_seqlens, seqused_k and block_table must be int32")
        _demand(given.is_contiguous(), "cu_seqlens, seqused_k and block_table must be contiguous")
    _demand(q.dim() == 3 and q.shape[-1] == dim and dim % 8 == 0 and dim <= 256, "head_size: a multiple of 8, to 256")
    _demand(q.shape[1] % heads == 0, "the number of query heads must be a multiple of the key's")
    _demand(q.shape[0] >= int(cu_q[-1]), "cu_seqlens_q must end within the query tokens; the rest is padding")
    if table is None:
        _demand(k.shape == v.shape and k.dim() == 3, "k, v: [tokens, heads, dim]")
        _demand(k.shape[0] >= int(kv[-1]), "cu_seqlens_k must end within the tokens; the rest is padding")
        return
    _demand(k.dim() == 4 and k.shape == v.shape, "k, v: [pages, page size, heads, dim]")
    _demand(k.shape[1] % 256 == 0, "a paged KV cache's block size must be divisible by 256")
    _demand(table.shape[0] == len(cu_q) - 1, "the block table must have one line a row")
    _demand(int(table.min()) >= 0 and int(table.max()) < k.shape[0], "the block table must name pages")


def _check_longest(cu_q: torch.Tensor, lengths: torch.Tensor, max_q: int, max_kv: int) -> None:
    _demand(len(lengths) == len(cu_q) - 1, "as many rows of keys as of queries")
    _demand(max_q >= int(cu_q.diff().max()), "max_seqlen_q must be the longest row's, or more")
    _demand(max_kv >= int(lengths.max()), "max_seqlen_k must be the longest row's, or more")


def _demand(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)
