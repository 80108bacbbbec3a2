"""Words for stories about an engine: prompts, runs cut at edges, and what the library itself answers."""

from collections.abc import Sequence
from copy import deepcopy
from itertools import pairwise

import torch
from transformers import DynamicCache

from kvprefetch.engines.batch import Row
from kvprefetch.engines.engine import TransformersEngine
from kvprefetch.engines.load import LoadedModel


def prompt(length: int, seed: int = 0, vocabulary: int = 96) -> list[int]:
    """`length` random tokens, the same for the same seed."""
    return torch.randint(2, vocabulary, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def poison(engine: TransformersEngine) -> None:
    """From here on, reading KV that nobody wrote shows in the logits."""
    engine.pool.tensor.fill_(float("nan"))


def pages(engine: TransformersEngine, tokens: int, first: int = 0) -> list[int]:
    """Enough pages for `tokens`, from page `first` on, and not in order."""
    return list(range(first, first - (-tokens // engine.block_tokens)))[::-1]


def run(engine: TransformersEngine, tokens: list[int], edges: Sequence[int], where: list[int]) -> torch.Tensor:
    """Run `tokens` in pieces that end at `edges`, the first of which is where it starts; the last piece's logits."""
    logits = torch.empty(0)
    for start, end in pairwise(edges):
        logits = engine.forward([Row(tokens[start:end], start, where)])
    return logits[0]


def grid(start: int, end: int, size: int) -> list[int]:
    """Edges of pieces that end at absolute multiples of `size`."""
    return [start, *range(start - start % size + size, end, size), end]


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that compares bit by bit, NaN or not."""
    return tensor.contiguous().view(torch.uint8).clone()


class Library:
    """The same model as the library itself runs it: no pages, its own attention and its own cache."""

    def __init__(self, loaded: LoadedModel, attention: str = "sdpa") -> None:
        self._model = deepcopy(loaded.model)
        self._model.set_attn_implementation(attention)

    @torch.inference_mode()
    def logits(self, tokens: list[int]) -> torch.Tensor:
        """Logits of every position `[tokens, vocabulary]`, cold."""
        found: torch.Tensor = self._model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
        return found

    @torch.inference_mode()
    def greedy(self, tokens: list[int], count: int) -> list[int]:
        """The next `count` tokens, with the library's cache."""
        ids = torch.tensor([tokens])
        answer = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=DynamicCache(config=self._model.config),
            do_sample=False,
            min_new_tokens=0,
            max_new_tokens=count,
            eos_token_id=[-1],
            pad_token_id=0,
        )
        return answer[0, len(tokens) :].tolist()
