"""Short forwards replayed from recordings: on a GPU their launches alone cost more than their work.

A recording runs the model once on buffers that stay where they are; a replay repeats the same kernels on
whatever the buffers hold by then (a CUDA graph). So its shapes are fixed: a row is padded to `tokens` new
tokens and to `kv_tokens` of past and present. Padding writes into the pool's spare page and nobody reads it.

A recording is compared with the plain forward before it is used. Where it cannot be made, or differs, the
engine goes without it and says so in the log.
"""

import logging
from collections.abc import Callable
from dataclasses import replace

import torch

from kvprefetch.engines.attention import Backend
from kvprefetch.engines.batch import PagedBatch, Row, never
from kvprefetch.engines.forward import forward_batch, run_rows
from kvprefetch.engines.load import LoadedModel
from kvprefetch.engines.selftest import TOLERANCE
from kvprefetch.tiers.device import DevicePool

log = logging.getLogger(__name__)
# One token is a decode step; a suffix of 32 or 128 may come with most of a block of 32 before it.
TOKENS = (1, 64, 160)
_SHORTEST_KV = 4_096
_PAST = 300  # tokens behind the row that a new recording is compared on
Work = Callable[[], torch.Tensor]
Record = Callable[[Work], tuple[torch.Tensor, Callable[[], None]]]
"""Runs the work; returns its output, whose memory stays, and what fills that memory again."""


@torch.inference_mode()
def cuda_graph(work: Work) -> tuple[torch.Tensor, Callable[[], None]]:
    """Record on the current CUDA device. Raises RuntimeError where something in `work` cannot be captured."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # lazily made handles and compiled kernels do not belong in the graph
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = work()
    return output, graph.replay


class RecordedStep:
    """One recording: a single row of up to `tokens` new tokens, `kv_tokens` with its past. Used by one thread."""

    def __init__(
        self, loaded: LoadedModel, pool: DevicePool, backend: Backend, tokens: int, kv_tokens: int, record: Record
    ) -> None:
        self.loaded, self.pool, self.backend = loaded, pool, backend
        self.tokens, self.kv_tokens = tokens, kv_tokens
        pages = -(-kv_tokens // pool.shape.block_tokens)

        def buffer(*shape: int, dtype: torch.dtype = torch.int64, value: int = 0) -> torch.Tensor:
            return torch.full(shape, value, dtype=dtype, device=pool.device)

        self.ids, self.keep, positions = buffer(1, tokens), buffer(1), buffer(tokens)
        self.batch = PagedBatch(
            pool=pool,
            rows=[Row([0] * tokens, kv_tokens - tokens, [])],
            abandon=never,
            source=torch.arange(tokens, device=pool.device),
            slot_page=buffer(tokens, value=pool.spare),
            slot_offset=torch.arange(tokens, device=pool.device) % pool.shape.block_tokens,
            cu_q=torch.tensor([0, 1], dtype=torch.int32, device=pool.device),
            cu_kv=torch.tensor([0, 1], dtype=torch.int32, device=pool.device),
            kv_len=buffer(1, dtype=torch.int32, value=1),
            table=buffer(1, pages, dtype=torch.int32, value=pool.spare),
            positions=positions,
            max_q=tokens,
            max_kv=kv_tokens,
            writes_all=True,
            is_padded=True,
            tables=[buffer(pages, value=pool.spare)],
        )
        self._logits, self._replay = record(self._forward)

    def fits(self, row: Row) -> bool:
        """Whether `row` can be run by this recording."""
        return row.wants_logits and len(row.tokens) <= self.tokens and row.end <= self.kv_tokens

    @torch.inference_mode()
    def run(self, row: Row) -> torch.Tensor:
        """Logits `[1, vocabulary]` of the row's last token; its KV is written as in a plain forward."""
        self._fill(row)
        self._replay()
        return self._logits.clone()

    def _fill(self, row: Row) -> None:
        batch, block, new = self.batch, self.pool.shape.block_tokens, len(row.tokens)
        used = row.pages[: -(-row.end // block)]
        writes = [p if p >= row.written else -1 for p in range(row.start, row.end)]
        padding = self.tokens - new

        def put(target: torch.Tensor, values: list[int]) -> None:
            target[: len(values)].copy_(torch.tensor(values, dtype=target.dtype))

        put(self.ids[0], row.tokens + [0] * padding)
        put(self.keep, [new - 1])
        put(batch.positions, [*range(row.start, row.end), *[row.end - 1] * padding])
        put(batch.slot_page, [self.pool.spare if p < 0 else row.pages[p // block] for p in writes])
        put(batch.slot_page[new:], [self.pool.spare] * padding)
        put(batch.slot_offset, [p % block for p in range(row.start, row.start + self.tokens)])
        put(batch.cu_q, [0, new])
        put(batch.cu_kv, [0, row.end])
        put(batch.kv_len, [row.end])
        for table in (batch.table[0], batch.tables[0]):
            put(table, used)

    def _forward(self) -> torch.Tensor:
        batch = replace(self.batch, masks={}, kv_at=None)  # what is derived from the buffers is recorded too
        return forward_batch(self.loaded, batch, self.backend, self.ids, self.keep)


def record_steps(
    loaded: LoadedModel, pool: DevicePool, backend: Backend, longest: int, is_paged: bool, record: Record = cuda_graph
) -> tuple[RecordedStep, ...]:
    """Recordings for rows of up to `longest` tokens with their past, the cheapest first; none where they fail.

    A kernel that reads pages itself (`is_paged`) does no work for padding, so one length serves all.
    """
    lengths = [longest]
    while not is_paged and lengths[-1] > _SHORTEST_KV:
        lengths.append(lengths[-1] // 2)
    try:
        steps = [
            RecordedStep(loaded, pool, backend, tokens, kv, record)
            for tokens in TOKENS
            for kv in reversed(lengths)
            if tokens <= kv
        ]
    except RuntimeError:
        log.exception("%s: short steps could not be recorded; they run as any other", loaded.name)
        return ()
    return tuple(step for step in steps if _agrees(step))


def _agrees(step: RecordedStep) -> bool:
    """Whether the recording gives one row the logits that a plain forward gives it."""
    pool, block = step.pool, step.pool.shape.block_tokens
    end = min(_PAST + step.tokens, step.kv_tokens, pool.pages * block)
    start = max(0, end - max(1, step.tokens - 3))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, step.loaded.model.config.vocab_size, (end,), generator=generator).tolist()
    pages = list(range(-(-end // block)))
    if start:
        run_rows(step.loaded, pool, step.backend, [Row(tokens[:start], 0, pages, wants_logits=False)])
    row = Row(tokens[start:], start, pages)
    recorded = step.run(row)[0].float()
    plain = run_rows(step.loaded, pool, step.backend, [row])[0].float()
    error = float((recorded - plain).square().mean().sqrt()) / (float(plain.std()) or 1.0)
    if not error <= TOLERANCE[pool.shape.dtype]:
        log.warning("a recorded step of %d tokens differs by %.2g of the logits' spread: unused", step.tokens, error)
        return False
    return True
