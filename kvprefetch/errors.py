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
├── TierError
│   ├── TierUnavailable    a tier cannot be reached or used right now
│   └── ArenaRefused       an arena or disk file of another model, version or service
├── ServiceError
│   ├── ServiceUnavailable the service cannot be reached, is draining, or took too long
│   ├── Unauthenticated    no credential, or a wrong one
│   ├── PermissionDenied   the credential's role may not do this
│   ├── UnknownContext     no context, hint or model is known by that name
│   └── LimitExceeded      the tenant's limit, or the service's
├── UpstreamError          an engine behind the gateway took too long, or answers what it should not
│   └── UpstreamGone       it cannot be reached, or has closed the connection
├── Closed                 the worker or connection was closed
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


class TierError(KVPrefetchError):
    """A tier's place cannot give or take blocks."""


class TierUnavailable(TierError):
    """A tier cannot be reached or used right now; nothing was changed."""


class ArenaRefused(TierError):
    """An arena or disk file of another model, version or service; the message says what to do."""


class ServiceError(KVPrefetchError):
    """The cache service did not do what was asked."""


class ServiceUnavailable(ServiceError):
    """The service cannot be reached, is draining, or took too long."""


class Unauthenticated(ServiceError):
    """No credential, or a wrong one."""


class PermissionDenied(ServiceError):
    """The credential's role may not do this."""


class UnknownContext(ServiceError):
    """No context, hint or model is known by that name."""


class LimitExceeded(ServiceError):
    """The tenant's limit, or the service's, is reached."""


class UpstreamError(KVPrefetchError):
    """An engine behind the gateway cannot be used, took too long, or answers what it should not."""


class UpstreamGone(UpstreamError):
    """It cannot be reached, or closed the connection before its answer was there: it may have ended."""


class Closed(KVPrefetchError):
    """The worker or connection was closed before or during the call."""


class WorkerFailed(KVPrefetchError):
    """The engine broke while serving this request; the cause is chained."""


class AccountingError(KVPrefetchError):
    """A page, reference or charge does not add up (law 5)."""
