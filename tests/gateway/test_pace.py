"""How long a piece of warming may be, and where it ends."""

from math import inf, nan

import hypothesis.strategies as st
import pytest
from hypothesis import given

from kvprefetch.gateway.pace import Pace, piece_end

STEP = 0.02
seconds = st.floats(1e-4, 10.0)
blocks = st.sampled_from([1, 2, 16, 128, 784])


def _learnt(start_s: float = 0.005, token_s: float = 1e-4, block: int = 16, pieces: int = 20) -> Pace:
    """A pace that has seen an engine of this speed."""
    pace = Pace(STEP)
    for _ in range(pieces):
        tokens = pace.piece(block, 0.0)
        pace.warmed(tokens, start_s + tokens * token_s)
    return pace


def test_the_first_pieces_try_several_sizes() -> None:
    pace, sizes = Pace(STEP), []
    for _ in range(3):
        sizes.append(pace.piece(16, inf))
        pace.warmed(sizes[-1], 0.01)
    assert len(set(sizes)) == len(sizes)
    assert sizes == sorted(sizes)


def test_a_piece_has_as_many_tokens_as_fit_into_a_step() -> None:
    pace = _learnt()
    assert pace.piece(16, 0.0) == 144  # 5 ms and 0.1 ms for each token
    assert pace.seconds(144) == pytest.approx(0.0194)


def test_a_slow_engine_gets_single_blocks() -> None:
    assert _learnt(start_s=0.5, token_s=0.01).piece(16, 0.0) == 16


def test_what_a_piece_costs_beside_its_tokens_is_learnt() -> None:
    pace = _learnt(start_s=0.01, token_s=2e-4)
    assert pace.seconds(0) == pytest.approx(0.01, rel=1e-3)
    assert pace.seconds(1000) == pytest.approx(0.21, rel=1e-3)


def test_where_first_tokens_take_long_anyway_pieces_may_take_longer() -> None:
    pace = _learnt()
    short = pace.piece(16, 0.0)
    for _ in range(8):
        pace.answered(0.2)
    assert pace.bound_s(0.0) == pytest.approx(0.1)
    assert pace.piece(16, 0.0) > short


def test_nothing_is_usual_before_enough_was_seen() -> None:
    pace = Pace(STEP)
    for _ in range(3):
        pace.answered(0.2)
        assert pace.usual_s is None
    pace.answered(0.2)
    assert pace.usual_s == pytest.approx(0.2)


def test_pieces_grow_when_nobody_has_come_for_a_while() -> None:
    pace = _learnt(pieces=200)
    for _ in range(8):
        pace.answered(0.5)
    sizes = [pace.piece(16, silence) for silence in (0.0, 7.0, 12.0, 1e6)]
    assert sizes == sorted(sizes)
    assert pace.bound_s(inf) == pytest.approx(3.0)  # six usual first tokens


def test_no_piece_is_much_longer_than_the_longest_before() -> None:
    """One measurement is no reason to send everything at once."""
    pace = Pace(STEP)
    longest = 0
    for _ in range(12):
        tokens = pace.piece(16, inf)
        assert tokens <= max(2 * longest, 64)
        pace.warmed(tokens, 1e-6 * tokens)
        longest = max(longest, tokens)
    assert longest == 8192


@pytest.mark.parametrize("absurd", [0.0, -1.0, inf, -inf, nan])
def test_absurd_measurements_teach_nothing(absurd: float) -> None:
    taught, pace = Pace(STEP), Pace(STEP)
    for each in (taught, pace):
        for tokens in (16, 32, 64, 128):
            each.warmed(tokens, 0.001 * tokens)
            each.answered(0.1)
    for _ in range(8):
        pace.warmed(4096, absurd)
        pace.answered(absurd)
    pace.warmed(0, 1.0)
    pace.warmed(-16, 1.0)
    assert pace == taught


@pytest.mark.parametrize("absurd", [0.0, -1.0, inf, nan])
def test_an_engine_of_which_nothing_sane_is_known_gets_first_pieces(absurd: float) -> None:
    pace = Pace(STEP)
    for _ in range(8):
        pace.warmed(64, absurd)
    assert pace.piece(16, inf) == 16


@given(
    pieces=st.lists(st.tuples(st.integers(0, 5000), seconds | st.sampled_from([0.0, inf, nan, -1.0])), max_size=12),
    first_tokens=st.lists(seconds | st.sampled_from([0.0, inf, nan]), max_size=12),
    block=blocks,
    silence=st.floats(0, 1e4) | st.just(inf),
)
def test_a_piece_takes_no_longer_than_the_bound(
    pieces: list[tuple[int, float]], first_tokens: list[float], block: int, silence: float
) -> None:
    pace = Pace(STEP)
    for tokens, took in pieces:
        pace.warmed(tokens, took)
    for took in first_tokens:
        pace.answered(took)
    bound, tokens = pace.bound_s(silence), pace.piece(block, silence)
    assert STEP <= bound < inf
    assert pace.bound_s(0.0) <= bound <= pace.bound_s(inf)
    assert tokens >= block
    assert tokens % block == 0
    sane = sum(tokens > 0 and 0 < took < inf for tokens, took in pieces)
    if sane >= 3 and tokens > block:
        expected = pace.seconds(tokens)
        assert expected is not None
        assert expected <= bound


@given(st.integers(0, 10_000), st.integers(1, 10_000), st.integers(1, 10_000), blocks)
def test_a_piece_ends_at_a_multiple_of_the_block_or_with_the_whole(
    start: int, more: int, piece: int, block: int
) -> None:
    total = start + more
    end = piece_end(start, total, piece, block)
    assert start < end <= total
    assert end % block == 0 or end == total
    assert end - start <= max(piece, block)
