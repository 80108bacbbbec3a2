"""A draft that no tokenizer is at hand for: its own request, with its text cut where the wanted tokens may end. Pure.

How many characters a token has is learnt from what the answers say that prompts had; it begins with a guess.
"""

import math
from dataclasses import dataclass, field

from kvprefetch.gateway.contract import Dialect, Draft, Json, Rendered, WarmRequest
from kvprefetch.gateway.engines.answers import encode
from kvprefetch.gateway.engines.probes import followed
from kvprefetch.gateway.wire import Cuts, one_token

_FIRST_GUESS, _LEAST, _MOST = 3.5, 0.25, 25.0  # characters in a token
_WEIGHT = 0.3  # of what was seen last
_TELLING_TOKENS = 64  # in shorter prompts the template has too great a part
_WIDER = 1.25


@dataclass(frozen=True)
class RenderedText:
    """Pieces are the draft itself, shortened: they end near the wanted token, and never within a message's calls."""

    draft: Draft = field(repr=False)
    chars_per_token: float
    tokens: int
    text: Cuts = field(repr=False, compare=False)  # the draft's
    is_exact: bool = False
    token_ids: tuple[int, ...] = ()

    def request(self, end: int) -> WarmRequest:
        """About the first `end` tokens, or more where the text cannot be cut there."""
        cut, reached = self._cut(end)
        dialect = self.draft.dialect
        is_whole = reached == self.tokens
        if dialect is not Dialect.COMPLETIONS and not (is_whole and self.draft.exact):
            cut = followed(dialect, cut)
        body = one_token(cut, dialect)
        if self.draft.salt:
            body = {**body, "cache_salt": self.draft.salt}
        return WarmRequest(dialect.value, encode(body), reached)

    def _cut(self, end: int) -> tuple[Json, int]:
        wanted = chars = end * self.chars_per_token
        while end < self.tokens and chars < self.text.length:
            cut, length = self.text.cut(math.ceil(chars))
            if length >= wanted - 1:
                return cut, min(max(end, math.floor(length / self.chars_per_token)), self.tokens)
            chars *= _WIDER
        return self.draft.body, self.tokens


class TextRenderer:
    """Renders by text, and learns how long tokens are."""

    def __init__(self) -> None:
        self._chars_per_token = _FIRST_GUESS

    def render(self, draft: Draft) -> RenderedText:
        """Nothing is asked of the engine."""
        text = Cuts(draft)
        tokens = max(1, math.ceil(text.length / self._chars_per_token))
        return RenderedText(draft, self._chars_per_token, tokens, text)

    def learn(self, rendered: Rendered, end: int, prompt_tokens: int) -> None:
        """A piece that ended at `end` had `prompt_tokens`."""
        if isinstance(rendered, RenderedText) and prompt_tokens >= _TELLING_TOKENS:
            seen = min(max(end * rendered.chars_per_token / prompt_tokens, _LEAST), _MOST)
            self._chars_per_token += _WEIGHT * (seen - self._chars_per_token)
