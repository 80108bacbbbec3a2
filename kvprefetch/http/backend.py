"""The worker in this process, as the endpoints see it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kvprefetch.cache.shares import Shares
from kvprefetch.engines.render import Renderer
from kvprefetch.inprocess import Local


@dataclass(frozen=True)
class Backend:
    """`as_tenant(name)` is the worker for one tenant's requests; `ping` raises Closed once it takes no more."""

    model: str
    block_tokens: int
    max_tokens: int | None  # of prompt and answer together; None: only the pool limits them
    renderer: Renderer
    validate: Callable[[list[int]], None]
    as_tenant: Callable[[str], Local]
    stats: Callable[[], dict[str, Any]]  # waits for at most one step of the worker
    charges: Callable[[], Mapping[str, Mapping[str, float]]]  # pages by tenant and kind; waits as `stats` does
    shares: Callable[[], tuple[Shares, int]]  # of how many pages
    ping: Callable[[], None]

    @classmethod
    def of(cls, local: Local) -> "Backend":
        """Over `local`, which stays its owner's to close."""
        engine, worker = local.engine, local.worker
        return cls(
            engine.loaded.name,
            engine.block_tokens,
            engine.max_tokens,
            worker.renderer,
            engine.validate,
            local.as_tenant,
            local.stats,
            lambda: worker.call(worker.pool.charges),
            lambda: (worker.shares, worker.pool.pages),
            lambda: worker.post(lambda: None),
        )
