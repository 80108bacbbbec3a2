"""What a call's status means, in our own errors."""

import grpc

from kvprefetch import errors

_KINDS: dict[grpc.StatusCode, type[errors.KVPrefetchError]] = {
    grpc.StatusCode.UNAVAILABLE: errors.ServiceUnavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.ServiceUnavailable,
    grpc.StatusCode.CANCELLED: errors.ServiceUnavailable,
    grpc.StatusCode.UNAUTHENTICATED: errors.Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: errors.PermissionDenied,
    grpc.StatusCode.NOT_FOUND: errors.UnknownContext,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.LimitExceeded,
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidRequest,
}


def error_of(code: grpc.StatusCode, details: str | None, address: str) -> errors.KVPrefetchError:
    """The error to raise for a call that ended with `code`; its line says what to do."""
    kind = _KINDS.get(code, errors.ServiceError)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return kind(f"the service at {address} took too long; its machine is too busy, or it is stopped")
    if kind is errors.ServiceUnavailable:
        return kind(f"no service at {address}: {last_words(details)}; is `kvprefetch serve` running there?")
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return kind(f"the service at {address} is of another version: {details}")
    return kind(details or code.name) if kind is not errors.ServiceError else kind(f"{code.name}: {details}")


def last_words(details: str | None) -> str:
    """gRPC's account of a failed connection, without what leads up to it."""
    return (details or "no reason given").rpartition("last error: ")[2].rpartition(" error: ")[2]
