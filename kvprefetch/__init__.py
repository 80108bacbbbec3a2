"""kvprefetch: the KV cache of the context a user will need, in memory before the request comes.

    import kvprefetch

    with kvprefetch.local(model="path/or/hub-id") as kv:
        context = kv.context(messages=[{"role": "system", "content": document}])
        kv.prefetch(context, session="u-7", probability=0.8)
        for piece in kv.generate([*context.messages, question], session="u-7"):
            print(piece, end="")

and the same, without `generate`, from any process of a machine where `kvprefetch serve` runs:

    with kvprefetch.connect() as kv:
        kv.signal("document_opened", session="u-7", contexts=[kv.context(token_ids=tokens, name="handbook")])

Importing this module loads neither torch nor gRPC; `local` and `connect` do, when they are first used.
"""

from typing import TYPE_CHECKING, Any

from kvprefetch.contexts import Context, Sampling
from kvprefetch.errors import (
    AccountingError,
    ArenaRefused,
    Closed,
    InvalidRequest,
    KVPrefetchError,
    LimitExceeded,
    ModelError,
    PermissionDenied,
    PoolError,
    PoolFull,
    PoolTooSmall,
    ServiceError,
    ServiceUnavailable,
    SettingsError,
    TierError,
    TierUnavailable,
    Unauthenticated,
    UnknownContext,
    UnknownModel,
    UnsupportedModel,
    WorkerFailed,
)
from kvprefetch.outcomes import MissReason, Outcome, Result, Use
from kvprefetch.settings import Settings, load_settings

if TYPE_CHECKING:
    from kvprefetch.client.connect import Connection, connect
    from kvprefetch.inprocess import Local, local

__version__ = "0.1.0"

__all__ = [
    "AccountingError",
    "ArenaRefused",
    "Closed",
    "Connection",
    "Context",
    "InvalidRequest",
    "KVPrefetchError",
    "LimitExceeded",
    "Local",
    "MissReason",
    "ModelError",
    "Outcome",
    "PermissionDenied",
    "PoolError",
    "PoolFull",
    "PoolTooSmall",
    "Result",
    "Sampling",
    "ServiceError",
    "ServiceUnavailable",
    "Settings",
    "SettingsError",
    "TierError",
    "TierUnavailable",
    "Unauthenticated",
    "UnknownContext",
    "UnknownModel",
    "UnsupportedModel",
    "Use",
    "WorkerFailed",
    "connect",
    "load_settings",
    "local",
]


def __getattr__(name: str) -> Any:
    """Load the worker, and torch with it, or the client, and gRPC with it, only when it is asked for."""
    if name in ("local", "Local"):
        from kvprefetch import inprocess

        return getattr(inprocess, name)
    if name in ("connect", "Connection"):
        from kvprefetch.client import connect

        return getattr(connect, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
