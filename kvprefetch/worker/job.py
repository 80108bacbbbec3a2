"""A preload in work."""

from collections.abc import Callable
from dataclasses import dataclass, field

from kvprefetch.cache.sequence import Owner
from kvprefetch.contexts import Context
from kvprefetch.outcomes import Result
from kvprefetch.plan.preload import Preload

Resolved = Callable[[Result], None]


@dataclass(eq=False)
class Job(Preload):
    """A preload into this worker's pool. `tokens` is None until its context is rendered."""

    context: Context
    owner: Owner
    resolved: Resolved
    tokens: list[int] | None = field(default=None, kw_only=True)
    to_host: bool = field(default=False, kw_only=True)  # it is enough to have it in the arena
