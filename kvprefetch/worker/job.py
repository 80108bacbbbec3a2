"""A preload in work."""

from dataclasses import dataclass, field

from kvprefetch.cache.commons import Owner
from kvprefetch.contexts import Context
from kvprefetch.plan.preload import Preload


@dataclass(eq=False)
class Job(Preload):
    """A preload into this worker's pool. `tokens` is None until its context is rendered."""

    context: Context
    owner: Owner
    tokens: list[int] | None = field(default=None, kw_only=True)
    to_host: bool = field(default=False, kw_only=True)  # it is enough to have it in the arena
