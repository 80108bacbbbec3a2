"""Cut prefill into slices that end at absolute multiples of the chunk size (law 1)."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Slice:
    """Tokens `start`…`end` of the sequence at `index` of what was given."""

    index: int
    start: int
    end: int


def slice_end(start: int, total: int, chunk: int) -> int:
    """Where a slice that begins at `start` ends: the next absolute multiple of `chunk`, or the total."""
    return min((start // chunk + 1) * chunk, total)


def prefill_slices(waiting: Sequence[tuple[int, int]], chunk: int) -> list[Slice]:
    """One forward's prefill for sequences `(computed, total)` in the order of their turns.

    The first always gets its slice; others join while all slices together stay within `chunk` tokens.
    """
    slices: list[Slice] = []
    room = chunk
    for index, (start, total) in enumerate(waiting):
        end = slice_end(start, total, chunk)
        if slices and end - start > room:
            continue
        slices.append(Slice(index, start, end))
        room -= end - start
    return slices


def speculative_chunk(chunk: int, block: int, tokens_per_s: float | None, step_s: float | None) -> int:
    """Tokens of one speculative step: at most `step_s` of estimated work, in whole blocks that divide `chunk`.

    `step_s` None: a step can be abandoned at once, so the whole chunk is taken. An unknown rate (None) takes
    one block, to learn it.
    """
    if step_s is None:
        return chunk
    room = block if tokens_per_s is None else int(tokens_per_s * step_s)
    fitting = [size for size in range(block, chunk + 1, block) if chunk % size == 0 and size <= room]
    return max(fitting, default=block)
