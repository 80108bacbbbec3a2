"""What many sequences in one forward, a half-filled page or a very short context must not change (float32)."""

from collections.abc import Callable

import pytest
import torch
import transformers as hf
from runs import Library, bytes_of, grid, pages, poison, prompt, run
from zoo import PLAIN, SHAPE, tiny_model

from kvprefetch.engines.batch import Abandoned, Row
from kvprefetch.engines.engine import TransformersEngine, open_engine
from kvprefetch.engines.load import LoadedModel, prepare
from kvprefetch.settings import EngineSettings, PoolSettings, Settings

BLOCK = 16
LENGTH = 75
ANSWER = 64
CLOSE = 1e-4
PREFIXES = [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 1, 2 * BLOCK, 2 * BLOCK + 1, LENGTH - 1]
CHUNKS = [1, 7, BLOCK, 64, LENGTH]
Open = Callable[..., TransformersEngine]


def opened(open_tiny: Open, count: int = 48) -> TransformersEngine:
    engine = open_tiny(pages=count, block_tokens=BLOCK)
    poison(engine)
    return engine


def served(model: hf.PreTrainedModel, name: str, block: int) -> TransformersEngine:
    """An engine over another model than the tiny one; its self-test has passed."""
    settings = Settings(
        pool=PoolSettings(size="2MiB", block_tokens=block), engine=EngineSettings(device="cpu", chunk_tokens=block)
    )
    engine = open_engine(prepare(model, None, name), settings)
    poison(engine)
    return engine


class Story:
    """One sequence of its own words: a prefix that is cached first, then its prompt in chunks, then 64 tokens."""

    def __init__(self, engine: TransformersEngine, number: int, prefix: int, chunk: int) -> None:
        self.said = prompt(LENGTH, seed=number)
        each = -(-(LENGTH + ANSWER) // BLOCK)
        self.where = pages(engine, LENGTH + ANSWER, first=number * each)
        self.seen: dict[int, torch.Tensor] = {}  # logits by the number of tokens that they follow
        self._edges = [*grid(prefix, LENGTH, chunk), *range(LENGTH + 1, LENGTH + ANSWER)]
        if prefix:
            run(engine, self.said, [0, prefix], self.where)

    def row(self) -> Row | None:
        """What it runs next, or None when all is said."""
        if len(self._edges) < 2:
            return None
        start, end = self._edges[:2]
        return Row(self.said[start:end], start, self.where)

    def hear(self, logits: torch.Tensor) -> None:
        end = self._edges[1]
        self.seen[end] = logits
        if end >= LENGTH:
            self.said.append(int(logits.argmax()))
        del self._edges[0]


def test_every_prefix_in_every_chunk_size_packed_with_all_the_others_answers_as_if_it_were_cold_and_alone(
    open_tiny: Open, tiny: LoadedModel
) -> None:
    """45 sequences of different words share every forward, some still in their prompt while others decode."""
    cases = [(prefix, chunk) for prefix in PREFIXES for chunk in CHUNKS]
    engine = opened(open_tiny, count=9 * len(cases))
    stories = [Story(engine, number, *case) for number, case in enumerate(cases)]
    mixed = 0
    while rows := [(story, row) for story in stories if (row := story.row())]:
        sizes = {len(row.tokens) == 1 for _, row in rows}
        mixed += len(sizes) == 2
        for (story, _), logits in zip(rows, engine.forward([row for _, row in rows]), strict=True):
            story.hear(logits)
    assert mixed > 5, "prompts and decodes must have met in one forward"

    library = Library(tiny, "eager")
    for case, story in zip(cases, stories, strict=True):
        expected = library.logits(story.said)
        worst = max(float((logits - expected[end - 1]).abs().max()) for end, logits in story.seen.items())
        assert worst <= CLOSE, case
        # each token follows from those before it: the library's greedy answer is this one
        assert story.said[LENGTH:] == expected[LENGTH - 1 : -1].argmax(-1).tolist(), case
    assert len({token for story in stories for token in story.said[LENGTH:]}) > 64, "constant answers prove nothing"


def test_the_vocabulary_is_multiplied_out_at_wanted_positions_only(open_tiny: Open) -> None:
    """A prompt's other logits would cost more memory than its KV."""
    engine = opened(open_tiny)
    head = engine.loaded.model.lm_head
    positions: list[int] = []
    watch = head.register_forward_pre_hook(lambda _, given: positions.append(given[0].shape[1]))
    try:
        for wanted in ([False, False, False], [True, False, True], [False, True, False]):
            engine.forward(
                [Row(prompt(20 + i), 0, pages(engine, 40, first=5 * i), wants_logits=w) for i, w in enumerate(wanted)]
            )
    finally:
        watch.remove()
    assert positions == [0, 2, 1]


@pytest.mark.parametrize("layer", [0, 1])
def test_a_forward_abandoned_in_the_middle_of_a_page_keeps_what_the_page_held(open_tiny: Open, layer: int) -> None:
    """Prefill and decode were packed; slots before each row's start stay, and the redo leaves no trace of it all."""
    engine, calm = opened(open_tiny), opened(open_tiny)
    first, second = prompt(60, seed=1), prompt(22, seed=2)
    here, there = pages(engine, 60), pages(engine, 22, first=10)
    rows = [Row(first[40:], 40, here, written=40), Row(second[21:], 21, there, written=21)]
    for each in (engine, calm):
        run(each, first, [0, 40], here)
        run(each, second, [0, 21], there)
    before = engine.pool.tensor.clone()
    answers = iter([False] * layer + [True])
    with pytest.raises(Abandoned):
        engine.forward(rows, abandon=lambda: next(answers))
    after = engine.pool.tensor.clone()
    for row in rows:
        for at in range(row.start, row.end):
            place = (row.pages[at // BLOCK], slice(None), slice(None), at % BLOCK)
            after[place] = before[place]
    assert torch.equal(bytes_of(after), bytes_of(before))
    assert torch.equal(bytes_of(engine.forward(rows)), bytes_of(calm.forward(rows)))
    assert torch.equal(bytes_of(engine.pool.tensor), bytes_of(calm.pool.tensor))


@pytest.mark.parametrize(("context", "block"), [(1, 16), (2, 16), (15, 16), (16, 16), (20, 32), (100, 256)])
def test_a_model_whose_whole_context_is_shorter_than_a_block_is_served(context: int, block: int) -> None:
    config = hf.LlamaConfig(**{**SHAPE, "max_position_embeddings": context}, **PLAIN)
    engine = served(tiny_model(config), "short", block)
    tokens = prompt(context)
    logits = run(engine, tokens, sorted({0, context // 2, context}), pages(engine, context))
    assert (logits - Library(engine.loaded, "eager").logits(tokens)[-1]).abs().max() <= CLOSE


def test_linear_rope_is_served() -> None:
    """It stretches all positions alike, so a cached key stays right as the sequence grows."""
    linear = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 3.0}
    engine = served(tiny_model(hf.LlamaConfig(**SHAPE, **PLAIN, rope_parameters=linear)), "linear", BLOCK)
    tokens, where = prompt(90), pages(engine, 90)
    found = run(engine, tokens, [0, 50, 51, 90], where)
    assert (found - Library(engine.loaded, "eager").logits(tokens)[-1]).abs().max() <= CLOSE
    plain = Library(prepare(tiny_model(hf.LlamaConfig(**SHAPE, **PLAIN)), None, "plain"), "eager")
    assert (found - plain.logits(tokens)[-1]).abs().max() > 100 * CLOSE, "the stretch must matter here"
