"""Draw the next token of one request. Each request has its own random state, whatever runs beside it."""

import torch
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kvprefetch.contexts import Sampling

_COLD = 1e-5  # below it logits overflow, and nothing but the greatest would be drawn anyway


class Sampler:
    """The sampler of one request; `draw` advances its random state by one token."""

    def __init__(self, sampling: Sampling) -> None:
        self.greedy = sampling.temperature < _COLD
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed % 2**64)
        self._warp = LogitsProcessorList()
        if not self.greedy:
            self._warp.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k:
            self._warp.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self._warp.append(TopPLogitsWarper(sampling.top_p))

    def draw(self, logits: torch.Tensor) -> int:
        """The next token from `logits` `[vocabulary]`."""
        if self.greedy:
            return int(logits.argmax())
        row = logits[None].float().cpu()
        scores = self._warp(torch.empty((1, 0), dtype=torch.long), row)
        weights = torch.softmax(scores[0], dim=-1)
        return int(torch.multinomial(weights, 1, generator=self._generator))
