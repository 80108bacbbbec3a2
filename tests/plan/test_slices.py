from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvprefetch.plan.slices import Slice, prefill_slices, slice_end, speculative_chunk


@pytest.mark.parametrize(
    ("start", "total", "end"),
    [(0, 20, 8), (3, 20, 8), (7, 20, 8), (8, 20, 16), (16, 20, 20), (19, 20, 20), (0, 8, 8), (0, 5, 5)],
)
def test_a_slice_ends_at_the_next_absolute_multiple_or_at_the_end(start: int, total: int, end: int) -> None:
    assert slice_end(start, total, chunk=8) == end


def test_a_prompt_found_half_way_meets_the_grid_of_the_cold_run() -> None:
    """Law 1: the same chunks behind the same tokens, whatever was found resident."""
    assert prefill_slices([(5, 30)], 8) == [Slice(0, 5, 8)]
    assert prefill_slices([(8, 30)], 8) == [Slice(0, 8, 16)]


def test_nobody_waiting_gives_no_slices() -> None:
    assert prefill_slices([], 8) == []


def test_others_join_while_all_fit_into_one_chunk() -> None:
    assert prefill_slices([(6, 30), (14, 30), (0, 4), (0, 1)], 8) == [Slice(0, 6, 8), Slice(1, 14, 16), Slice(2, 0, 4)]


def test_one_that_does_not_fit_lets_a_shorter_one_join() -> None:
    assert prefill_slices([(4, 30), (0, 30), (0, 3)], 8) == [Slice(0, 4, 8), Slice(2, 0, 3)]


def test_the_first_gets_its_whole_slice_and_fills_the_forward() -> None:
    assert prefill_slices([(0, 30), (29, 30)], 8) == [Slice(0, 0, 8)]


@st.composite
def waiting_prompts(draw: st.DrawFn) -> list[tuple[int, int]]:
    totals = draw(st.lists(st.integers(1, 40), min_size=1, max_size=6))
    return [(draw(st.integers(0, total - 1)), total) for total in totals]


@given(waiting_prompts(), st.integers(1, 12))
def test_every_prompt_is_covered_exactly_once_on_the_grid(prompts: list[tuple[int, int]], chunk: int) -> None:
    """Forward after forward, those served going to the end of the line, as long as anybody waits."""
    covered: list[list[int]] = [[] for _ in prompts]
    computed = [start for start, _ in prompts]
    line = deque(range(len(prompts)))
    forwards, enough = 0, sum(-(-total // chunk) for _, total in prompts)
    while line:
        slices = prefill_slices([(computed[who], prompts[who][1]) for who in line], chunk)
        assert slices[0].index == 0
        assert sum(piece.end - piece.start for piece in slices) <= chunk
        served = [line[piece.index] for piece in slices]
        assert len(set(served)) == len(served)
        for who, piece in zip(served, slices, strict=True):
            assert piece.end % chunk == 0 or piece.end == prompts[who][1]
            covered[who] += range(piece.start, piece.end)
            computed[who] = piece.end
        line = deque(who for who in [*(w for w in line if w not in served), *served] if computed[who] < prompts[who][1])
        forwards += 1
        assert forwards <= enough
    assert covered == [list(range(start, total)) for start, total in prompts]


def test_a_step_that_can_be_abandoned_takes_the_whole_chunk() -> None:
    assert speculative_chunk(256, 32, tokens_per_s=10.0, step_s=None) == 256


def test_an_unknown_rate_is_learnt_on_one_block() -> None:
    assert speculative_chunk(256, 32, tokens_per_s=None, step_s=0.02) == 32


@pytest.mark.parametrize(
    ("tokens_per_s", "tokens"),
    [(100, 32), (1_600, 32), (3_200, 64), (6_399, 64), (6_400, 128), (12_799, 128), (12_800, 256), (1e12, 256)],
)
def test_a_step_is_as_long_as_its_time_allows(tokens_per_s: float, tokens: int) -> None:
    assert speculative_chunk(256, 32, tokens_per_s, step_s=0.02) == tokens


def test_a_step_divides_the_chunk_or_it_would_leave_the_grid() -> None:
    """Four of six blocks would fit, but do not divide the chunk; three do."""
    assert speculative_chunk(6 * 32, 32, tokens_per_s=4.5 * 32, step_s=1.0) == 3 * 32


@given(st.integers(1, 8), st.integers(1, 12), st.floats(0.001, 1e6), st.floats(0.001, 1.0))
def test_a_step_is_whole_blocks_that_divide_the_chunk_within_the_budget(
    block: int, blocks: int, tokens_per_s: float, step_s: float
) -> None:
    chunk = block * blocks
    step = speculative_chunk(chunk, block, tokens_per_s, step_s)
    assert step % block == 0
    assert chunk % step == 0
    assert step <= max(block, tokens_per_s * step_s)
