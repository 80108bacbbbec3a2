from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class LookupRequest(_message.Message):
    __slots__ = ("instance", "tenant", "session", "keys", "lease", "speculative", "hold_s", "wait_ms")
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    SPECULATIVE_FIELD_NUMBER: _ClassVar[int]
    HOLD_S_FIELD_NUMBER: _ClassVar[int]
    WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    instance: bytes
    tenant: str
    session: str
    keys: bytes
    lease: bool
    speculative: bool
    hold_s: float
    wait_ms: int
    def __init__(self, instance: _Optional[bytes] = ..., tenant: _Optional[str] = ..., session: _Optional[str] = ..., keys: _Optional[bytes] = ..., lease: bool = ..., speculative: bool = ..., hold_s: _Optional[float] = ..., wait_ms: _Optional[int] = ...) -> None: ...

class LookupReply(_message.Message):
    __slots__ = ("lease", "slots", "found", "coming", "tier")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    FOUND_FIELD_NUMBER: _ClassVar[int]
    COMING_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    lease: int
    slots: bytes
    found: int
    coming: int
    tier: str
    def __init__(self, lease: _Optional[int] = ..., slots: _Optional[bytes] = ..., found: _Optional[int] = ..., coming: _Optional[int] = ..., tier: _Optional[str] = ...) -> None: ...

class ReserveRequest(_message.Message):
    __slots__ = ("instance", "tenant", "session", "parent", "keys", "speculative", "hold_s")
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    SPECULATIVE_FIELD_NUMBER: _ClassVar[int]
    HOLD_S_FIELD_NUMBER: _ClassVar[int]
    instance: bytes
    tenant: str
    session: str
    parent: bytes
    keys: bytes
    speculative: bool
    hold_s: float
    def __init__(self, instance: _Optional[bytes] = ..., tenant: _Optional[str] = ..., session: _Optional[str] = ..., parent: _Optional[bytes] = ..., keys: _Optional[bytes] = ..., speculative: bool = ..., hold_s: _Optional[float] = ...) -> None: ...

class ReserveReply(_message.Message):
    __slots__ = ("reservation", "slots")
    RESERVATION_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    reservation: int
    slots: bytes
    def __init__(self, reservation: _Optional[int] = ..., slots: _Optional[bytes] = ...) -> None: ...

class CommitRequest(_message.Message):
    __slots__ = ("instance", "reservation", "checksums")
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    RESERVATION_FIELD_NUMBER: _ClassVar[int]
    CHECKSUMS_FIELD_NUMBER: _ClassVar[int]
    instance: bytes
    reservation: int
    checksums: bytes
    def __init__(self, instance: _Optional[bytes] = ..., reservation: _Optional[int] = ..., checksums: _Optional[bytes] = ...) -> None: ...

class CommitReply(_message.Message):
    __slots__ = ("committed",)
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    committed: int
    def __init__(self, committed: _Optional[int] = ...) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("instance", "leases", "reservations", "corrupt")
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    RESERVATIONS_FIELD_NUMBER: _ClassVar[int]
    CORRUPT_FIELD_NUMBER: _ClassVar[int]
    instance: bytes
    leases: _containers.RepeatedScalarFieldContainer[int]
    reservations: _containers.RepeatedScalarFieldContainer[int]
    corrupt: bytes
    def __init__(self, instance: _Optional[bytes] = ..., leases: _Optional[_Iterable[int]] = ..., reservations: _Optional[_Iterable[int]] = ..., corrupt: _Optional[bytes] = ...) -> None: ...

class ReleaseReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReadRequest(_message.Message):
    __slots__ = ("namespace", "keys")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    keys: bytes
    def __init__(self, namespace: _Optional[str] = ..., keys: _Optional[bytes] = ...) -> None: ...

class Frame(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class PinRequest(_message.Message):
    __slots__ = ("namespace", "tenant", "keys", "hold_s")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    HOLD_S_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    tenant: str
    keys: bytes
    hold_s: float
    def __init__(self, namespace: _Optional[str] = ..., tenant: _Optional[str] = ..., keys: _Optional[bytes] = ..., hold_s: _Optional[float] = ...) -> None: ...

class PinReply(_message.Message):
    __slots__ = ("pinned",)
    PINNED_FIELD_NUMBER: _ClassVar[int]
    pinned: int
    def __init__(self, pinned: _Optional[int] = ...) -> None: ...
