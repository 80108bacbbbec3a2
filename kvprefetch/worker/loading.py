"""Loading a prompt's blocks from the arena into pages, in bounded steps, as far as it is faster than computing them."""

from collections.abc import Callable

from kvprefetch.cache.sequence import PagedSequence
from kvprefetch.plan.rates import Line, Rates
from kvprefetch.worker.host import Found, Host

BESIDE_S, AHEAD_S, ALONE_S = 0.005, 0.01, 0.02
"""Copying in one go: while others decode; as speculation; and for whom nobody but itself waits."""
_BLOCKS = 4  # copied between two looks at the clock
_EXPLORE = 16  # of so many loads that would not pay, one is made: what was slow once may not be any more


class Loader:
    """Used by the loop's thread alone. Rates are learnt from what it does."""

    def __init__(self, host: Host, rates: Rates, block_tokens: int) -> None:
        self.host, self.rates, self.block_tokens = host, rates, block_tokens
        self._unpaid = 0

    def step(
        self,
        sequence: PagedSequence,
        found: Found,
        now: Callable[[], float],
        *,
        budget_s: float = ALONE_S,
        speculative_until: float | None = None,
    ) -> bool:
        """Load some of `found` into the sequence's pages and publish them; whether that was all that can be.

        Ends early where a block is bad (`found.failed`), or where computing the rest is faster.
        """
        began = at = now()
        limit = began + budget_s
        while at < limit:
            first = sequence.shared
            pages = sequence.pages[first : min(first + _BLOCKS, found.blocks)]
            if not pages or found.failed or not self._pays(first, found.blocks - first):
                return True
            good = self.host.load(found, first, pages)
            if good:
                sequence.loaded(good, speculative_until=speculative_until)
            at, began = now(), at
            if good == len(pages):
                self.rates.loaded(good * self.block_tokens, at - began)
        return sequence.shared >= min(found.blocks, len(sequence.blocks))

    def is_worth(self, first: int, blocks: int) -> bool:
        """Whether loading so many blocks behind the first `first` is faster than computing them, as far as is known."""
        start, end = first * self.block_tokens, (first + blocks) * self.block_tokens
        load, compute = self.rates.load_s(end - start), self.rates.prefill_s(start, end)
        return load is None or compute is None or load <= compute

    def _pays(self, first: int, blocks: int) -> bool:
        """As `is_worth`; now and then what was learnt is forgotten, and learnt anew."""
        if self.is_worth(first, blocks):
            return True
        self._unpaid += 1
        if self._unpaid % _EXPLORE:
            return False
        self.rates.loading = Line()
        return True
