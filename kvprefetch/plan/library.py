"""Contexts that callers have named or preloaded, and which of them a session will use next.

A request **uses** the longest known context that its prompt begins with. Used by the loop's thread alone. Bounded:
the contexts used or named last are kept, `max_contexts` of them.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Generic

from kvprefetch.cache.keys import BlockKey
from kvprefetch.contexts import qualified
from kvprefetch.plan.preload import P
from kvprefetch.predict.which import Prediction, Which

PREDICTED = "predicted"
"""The kind of evidence that the predictor's own word is."""
_LEAST = 0.05  # probability of what is worth naming
_OUTCOMES = 3  # uses that were seen, before a learnt rule acts


class Library(Generic[P]):
    """See the module's promises."""

    def __init__(self, max_contexts: int) -> None:
        self.which = Which()
        self.max_contexts = max_contexts
        self.uses = 0
        self._contexts: OrderedDict[BlockKey, tuple[str, Any]] = OrderedDict()  # by the last block of each
        self._keys: dict[str, BlockKey] = {}  # by name
        self._latest: OrderedDict[str, str] = OrderedDict()  # what each session used last

    def add(self, job: P) -> None:
        """A rendered context that is not merely a session's next turn."""
        if job.is_next_turn or not job.keys:
            return
        key = job.own_keys[-1]
        name = qualified(job.ticket.tenant, job.named) or key.hex()
        self._forget_name(key)
        self._contexts[key] = name, job.context
        self._contexts.move_to_end(key)
        self._keys[name] = key
        if len(self._contexts) > self.max_contexts:
            oldest = next(iter(self._contexts))
            self._forget_name(oldest)
            del self._contexts[oldest]

    def _forget_name(self, key: BlockKey) -> None:
        """The context's name is free, unless it means another context by now."""
        name = self._contexts[key][0] if key in self._contexts else None
        if name is not None and self._keys.get(name) == key:
            del self._keys[name]

    def signalled(self, session: str, tenant: str, kind: str, about: str, now: float) -> None:
        """Something was observed in the session; `about` the name of a context, where it names one."""
        self.which.signalled(session, tenant, session, kind, qualified(tenant, about), now)

    def used(self, session: str, tenant: str, keys: Sequence[BlockKey], now: float) -> None:
        """A request of the session begins with these blocks."""
        key = next((key for key in reversed(keys) if key in self._contexts), None)
        if key is None or not session:
            return
        self._contexts.move_to_end(key)
        name = self._contexts[key][0]
        if self._latest.get(session) == name:
            return  # another turn about the same
        self.uses += 1
        self._latest[session] = name
        self._latest.move_to_end(session)
        if len(self._latest) > self.max_contexts:
            self._latest.popitem(last=False)
        self.which.used(session, tenant, session, name, "request", now)

    def next(self, session: str, tenant: str, now: float) -> list[tuple[Any, Prediction]]:
        """What the session will probably use next, as far as there is a record of such predictions."""
        if session not in self._latest or self.uses < _OUTCOMES:
            return []
        said = self.which.predictions(session, tenant, session, now)
        sure = [p for p in said if p.probability >= _LEAST and p.context in self._keys]
        return [(self._contexts[self._keys[p.context]][1], p) for p in sure if p.context != self._latest[session]]
