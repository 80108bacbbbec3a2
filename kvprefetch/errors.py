"""Every error that kvprefetch raises, in one tree.

KVPrefetchError
├── SettingsError          a settings file or value is wrong
├── TraceError             a trace file cannot be read
├── StateError             saved state is of another version, damaged, or no state
├── InvalidRequest         the caller's prompt, context or option cannot be served
├── ModelError
│   ├── UnknownModel       nothing to load under that name
│   └── UnsupportedModel   it loads, but would not be served right
├── PoolError
│   ├── PoolFull           not enough free or evictable pages right now
│   └── PoolTooSmall       would not fit even in an empty pool
├── Closed                 the worker was closed
├── WorkerFailed           the engine broke while serving; the cause is chained
└── AccountingError        ``check()`` found a page that is not accounted for
"""


class KVPrefetchError(Exception):
    """Base of all errors raised by kvprefetch."""


class SettingsError(KVPrefetchError):
    """A settings file or value is wrong; the message names the key."""


class TraceError(KVPrefetchError):
    """A trace file cannot be read; the message names the line or what is missing."""


class StateError(KVPrefetchError):
    """Saved state is of another version, damaged, or no state; the message says which."""


class InvalidRequest(KVPrefetchError):
    """The caller's prompt, context or option cannot be served."""


class ModelError(KVPrefetchError):
    """A model cannot be loaded or served."""


class UnknownModel(ModelError):
    """Nothing to load under that name."""


class UnsupportedModel(ModelError):
    """The model loads, but its answers from a paged cache would be wrong."""


class PoolError(KVPrefetchError):
    """The page pool cannot give what was asked."""


class PoolFull(PoolError):
    """Not enough free or evictable pages right now; nothing was taken."""


class PoolTooSmall(PoolError):
    """More pages than the whole pool has."""


class Closed(KVPrefetchError):
    """The worker was closed before or during the call."""


class WorkerFailed(KVPrefetchError):
    """The engine broke while serving this request; the cause is chained."""


class AccountingError(KVPrefetchError):
    """A page, reference or charge does not add up (law 5)."""
