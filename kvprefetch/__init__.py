"""kvprefetch: the KV cache of the context a user will need, in memory before the request comes.

    import kvprefetch

    with kvprefetch.local(model="path/or/hub-id") as kv:
        context = kv.context(messages=[{"role": "system", "content": document}])
        kv.prefetch(context, session="u-7", probability=0.8)
        for piece in kv.generate([*context.messages, question], session="u-7"):
            print(piece, end="")

Importing this module loads no torch; `local` does, when it is first used.
"""

from typing import TYPE_CHECKING, Any

from kvprefetch.contexts import Context, Sampling
from kvprefetch.errors import (
    AccountingError,
    Closed,
    InvalidRequest,
    KVPrefetchError,
    ModelError,
    PoolError,
    PoolFull,
    PoolTooSmall,
    SettingsError,
    UnknownModel,
    UnsupportedModel,
    WorkerFailed,
)
from kvprefetch.outcomes import MissReason, Outcome, Result, Use
from kvprefetch.settings import Settings, load_settings

if TYPE_CHECKING:
    from kvprefetch.inprocess import Local, local

__version__ = "0.1.0"

__all__ = [
    "AccountingError",
    "Closed",
    "Context",
    "InvalidRequest",
    "KVPrefetchError",
    "Local",
    "MissReason",
    "ModelError",
    "Outcome",
    "PoolError",
    "PoolFull",
    "PoolTooSmall",
    "Result",
    "Sampling",
    "Settings",
    "SettingsError",
    "UnknownModel",
    "UnsupportedModel",
    "Use",
    "WorkerFailed",
    "load_settings",
    "local",
]


def __getattr__(name: str) -> Any:
    """Load the worker, and torch with it, only when it is asked for."""
    if name in ("local", "Local"):
        from kvprefetch import inprocess

        return getattr(inprocess, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
