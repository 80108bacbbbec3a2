"""A prefix that is already in the pages changes nothing but the time (law 1, float32)."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from runs import Library, bytes_of, grid, pages, poison, prompt, run

from kvprefetch.engines.batch import Abandoned, Row
from kvprefetch.engines.engine import TransformersEngine
from kvprefetch.engines.load import LoadedModel

BLOCK = 16
LENGTH = 200
CLOSE = 1e-4
Open = Callable[..., TransformersEngine]
EDGES = sorted({0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 1, 2 * BLOCK, 2 * BLOCK + 1, 64, 129, LENGTH - 1})


@pytest.fixture(scope="module")
def library(tiny: LoadedModel) -> Library:
    return Library(tiny)


@pytest.fixture(scope="module")
def cold(library: Library) -> torch.Tensor:
    """The library's logits at every position of the usual prompt."""
    return library.logits(prompt(LENGTH))


@pytest.fixture
def engine(open_tiny: Open) -> TransformersEngine:
    opened = open_tiny(pages=48, block_tokens=BLOCK)
    poison(opened)
    return opened


def differ(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference; NaN if there is one."""
    return float((logits - expected).abs().max())


def decode(engine: TransformersEngine, rows: list[tuple[list[int], list[int]]], count: int) -> list[list[int]]:
    """Greedy continuations of (tokens of which the last is not yet run, pages), all decoded in one batch."""
    said = [list(tokens) for tokens, _ in rows]
    for _ in range(count):
        batch = [Row(said[i][-1:], len(said[i]) - 1, where) for i, (_, where) in enumerate(rows)]
        for one, token in zip(said, engine.forward(batch).argmax(-1).tolist(), strict=True):
            one.append(token)
    return [one[len(tokens) :] for one, (tokens, _) in zip(said, rows, strict=True)]


@pytest.mark.parametrize("prefix", EDGES)
def test_logits_after_a_cached_prefix_are_the_cold_ones(
    engine: TransformersEngine, cold: torch.Tensor, prefix: int
) -> None:
    """Another prompt with the same beginning computed the prefix; this one reads it and never writes it."""
    tokens = prompt(LENGTH)
    shared = pages(engine, prefix)
    if prefix:
        run(engine, tokens, [0, prefix], shared)
    before = bytes_of(engine.pool.tensor[shared])
    own = pages(engine, LENGTH, first=20)
    full = prefix // BLOCK  # whole pages are shared; a partial one is computed again
    where = shared[:full] + own[full:]
    start = full * BLOCK
    logits = engine.forward([Row(tokens[start:], start, where, written=start)])[0]
    assert differ(logits, cold[-1]) <= CLOSE
    assert torch.equal(bytes_of(engine.pool.tensor[shared]), before)


@pytest.mark.parametrize("prefix", EDGES)
def test_a_run_goes_on_from_any_position(engine: TransformersEngine, cold: torch.Tensor, prefix: int) -> None:
    where = pages(engine, LENGTH)
    logits = run(engine, prompt(LENGTH), sorted({0, prefix, LENGTH}), where)
    assert differ(logits, cold[-1]) <= CLOSE


@pytest.mark.parametrize("size", [1, 7, BLOCK, 64, LENGTH])
def test_every_chunk_of_a_prompt_has_the_cold_logits(engine: TransformersEngine, cold: torch.Tensor, size: int) -> None:
    tokens, where = prompt(LENGTH), pages(engine, LENGTH)
    for start, end in pairwise(grid(0, LENGTH, size)):
        logits = engine.forward([Row(tokens[start:end], start, where)])[0]
        assert differ(logits, cold[end - 1]) <= CLOSE


def test_64_greedy_tokens_are_the_librarys_after_every_prefix(library: Library, open_tiny: Open) -> None:
    """All sequences are decoded packed together, each behind its own cached prefix."""
    engine = open_tiny(pages=len(EDGES) * 18, block_tokens=BLOCK)
    poison(engine)
    tokens = prompt(LENGTH)
    expected = library.greedy(tokens, 64)
    assert len(set(expected)) > 16, "a constant answer would prove nothing"
    rows = []
    for index, prefix in enumerate(EDGES):
        where = pages(engine, LENGTH + 64, first=18 * index)
        run(engine, tokens, sorted({0, prefix, LENGTH - 1}), where)
        rows.append((tokens, where))
    assert decode(engine, rows, 64) == [expected] * len(EDGES)


def test_prefills_and_decodes_packed_in_one_forward_do_not_see_each_other(
    engine: TransformersEngine, library: Library
) -> None:
    first, second, third = prompt(70, seed=1), prompt(49, seed=2), prompt(33, seed=3)
    here, there, elsewhere = pages(engine, 70), pages(engine, 49, first=10), pages(engine, 33, first=20)
    run(engine, first, [0, 69], here)
    run(engine, second, [0, 16], there)
    logits = engine.forward([Row(first[69:], 69, here), Row(second[16:], 16, there), Row(third, 0, elsewhere)])
    for row, tokens in zip(logits, (first, second, third), strict=True):
        assert differ(row, library.logits(tokens)[-1]) <= CLOSE


def test_sequences_that_take_turns_do_not_see_each_other(engine: TransformersEngine, library: Library) -> None:
    texts = [prompt(90, seed=seed) for seed in (4, 5)]
    places = [pages(engine, 90), pages(engine, 90, first=6)]
    for start in range(0, 90, 15):
        logits = [
            engine.forward([Row(tokens[start : start + 15], start, where)])[0]
            for tokens, where in zip(texts, places, strict=True)
        ]
    for last, tokens in zip(logits, texts, strict=True):
        assert differ(last, library.logits(tokens)[-1]) <= CLOSE


def test_two_sequences_share_the_pages_of_a_prefix(engine: TransformersEngine, library: Library) -> None:
    prefix = prompt(4 * BLOCK)
    shared = pages(engine, len(prefix))
    run(engine, prefix, [0, len(prefix)], shared)
    ends = [prompt(20, seed=6), prompt(5, seed=7)]
    rows = [
        Row(end, len(prefix), shared + pages(engine, len(end), first=10 + 2 * i), written=len(prefix))
        for i, end in enumerate(ends)
    ]
    for row, end in zip(engine.forward(rows), ends, strict=True):
        assert differ(row, library.logits(prefix + end)[-1]) <= CLOSE


@pytest.mark.parametrize("length", [1, BLOCK, 5 * BLOCK, 5 * BLOCK + 3])
def test_a_fully_cached_prompt_gives_the_cold_logits_and_its_pages_stay_as_they_are(
    engine: TransformersEngine, cold: torch.Tensor, length: int
) -> None:
    tokens, where = prompt(LENGTH)[:length], pages(engine, length)
    run(engine, tokens, [0, length], where)
    engine.pool.tensor[where[-1], :, :, (length - 1) % BLOCK] += 0.25  # the KV of the last token: kept, and read
    marked = bytes_of(engine.pool.tensor)
    moved = engine.forward([Row(tokens[-1:], length - 1, where, written=length)])[0]
    assert torch.equal(bytes_of(engine.pool.tensor), marked)
    engine.pool.tensor[where[-1], :, :, (length - 1) % BLOCK] -= 0.25
    logits = engine.forward([Row(tokens[-1:], length - 1, where, written=length)])[0]
    assert differ(logits, cold[length - 1]) <= CLOSE
    assert differ(moved, cold[length - 1]) > CLOSE


def test_only_wanted_logits_are_computed_in_the_order_of_the_rows(engine: TransformersEngine, library: Library) -> None:
    texts = [prompt(20, seed=8), prompt(9, seed=9), prompt(31, seed=10)]
    places = [pages(engine, 40, first=5 * i) for i in range(3)]

    def rows(*wanted: bool) -> list[Row]:
        return [Row(t, 0, where, wants_logits=w) for t, where, w in zip(texts, places, wanted, strict=True)]

    assert engine.forward(rows(False, False, False)).shape == (0, engine.vocab_size)
    some = engine.forward(rows(True, False, True))
    assert some.shape == (2, engine.vocab_size)
    for row, tokens in zip(some, (texts[0], texts[2]), strict=True):
        assert differ(row, library.logits(tokens)[-1]) <= CLOSE


@pytest.mark.parametrize("layer", [0, 1])
def test_an_abandoned_forward_leaves_other_pages_and_a_redo_is_bit_identical(
    engine: TransformersEngine, open_tiny: Open, layer: int
) -> None:
    tokens, where = prompt(100), pages(engine, 100)
    neighbour = pages(engine, 40, first=20)
    run(engine, prompt(40, seed=11), [0, 40], neighbour)
    run(engine, tokens, [0, 64], where)
    finished = where[:4]
    others = [page for page in range(engine.pool.pages) if page not in where[4:]]
    before = bytes_of(engine.pool.tensor[others])
    answers = iter([False] * layer + [True])
    with pytest.raises(Abandoned):
        engine.forward([Row(tokens[64:], 64, where, written=64)], abandon=lambda: next(answers))
    assert next(answers, None) is None, "it was asked once a layer, up to the layer that gave up"
    assert torch.equal(bytes_of(engine.pool.tensor[others]), before)

    redone = engine.forward([Row(tokens[64:], 64, where, written=64)])
    calm = open_tiny(pages=48, block_tokens=BLOCK)
    run(calm, tokens, [0, 64], where)
    never_abandoned = calm.forward([Row(tokens[64:], 64, where, written=64)])
    assert torch.equal(bytes_of(redone), bytes_of(never_abandoned))
    assert torch.equal(bytes_of(engine.pool.tensor[finished]), bytes_of(calm.pool.tensor[finished]))


def test_the_same_grid_is_bit_identical_behind_a_cached_prefix(engine: TransformersEngine, open_tiny: Open) -> None:
    tokens, where = prompt(LENGTH), pages(engine, LENGTH)
    other = open_tiny(pages=48, block_tokens=BLOCK)
    straight = run(other, tokens, grid(0, LENGTH, 64), pages(other, LENGTH, first=7))
    run(engine, tokens[:128] + prompt(30, seed=12), grid(0, 158, 64), where)
    assert torch.equal(run(engine, tokens, grid(128, LENGTH, 64), where), straight)
