"""A draft as the engine's own token ids. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvprefetch.gateway.contract import Dialect, Json, WarmRequest
from kvprefetch.gateway.engines.answers import encode


@dataclass(frozen=True)
class RenderedIds:
    """A rendered draft whose pieces are prefixes of its token ids, sent to /v1/completions."""

    token_ids: tuple[int, ...] = field(repr=False)
    model: str
    salt: str = field(default="", repr=False)
    is_exact: bool = True

    @property
    def tokens(self) -> int:
        """All of them."""
        return len(self.token_ids)

    def request(self, end: int) -> WarmRequest:
        """Exactly the first `end` tokens."""
        body: Json = {"model": self.model, "prompt": self.token_ids[:end], "max_tokens": 1, "temperature": 0}
        if self.salt:
            body["cache_salt"] = self.salt
        return WarmRequest(Dialect.COMPLETIONS.value, encode(body), end)


def shared_prefix(one: Sequence[int], other: Sequence[int]) -> tuple[int, ...]:
    """The longest prefix of both."""
    first, second = tuple(one), tuple(other)
    shared, most = 0, min(len(first), len(second))
    while shared < most:  # by halves, as slices are compared faster than each of their ids
        middle = (shared + most + 1) // 2
        if first[shared:middle] == second[shared:middle]:
            shared = middle
        else:
            most = middle - 1
    return first[:shared]
