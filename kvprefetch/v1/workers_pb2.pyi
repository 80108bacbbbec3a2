from kvprefetch.v1 import admin_pb2 as _admin_pb2
from kvprefetch.v1 import hints_pb2 as _hints_pb2
from kvprefetch.v1 import outcomes_pb2 as _outcomes_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Place(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PLACE_UNSPECIFIED: _ClassVar[Place]
    PLACE_DEVICE: _ClassVar[Place]
    PLACE_HOST: _ClassVar[Place]
PLACE_UNSPECIFIED: Place
PLACE_DEVICE: Place
PLACE_HOST: Place

class WorkerMessage(_message.Message):
    __slots__ = ("register", "load", "preload", "session")
    REGISTER_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    PRELOAD_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    register: Register
    load: LoadReport
    preload: PreloadReport
    session: SessionReport
    def __init__(self, register: _Optional[_Union[Register, _Mapping]] = ..., load: _Optional[_Union[LoadReport, _Mapping]] = ..., preload: _Optional[_Union[PreloadReport, _Mapping]] = ..., session: _Optional[_Union[SessionReport, _Mapping]] = ...) -> None: ...

class Register(_message.Message):
    __slots__ = ("instance", "pid", "started", "model", "fingerprint", "block_bytes", "block_tokens", "leases", "reservations", "device_blocks")
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    STARTED_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    RESERVATIONS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    instance: bytes
    pid: int
    started: int
    model: str
    fingerprint: str
    block_bytes: int
    block_tokens: int
    leases: _containers.RepeatedScalarFieldContainer[int]
    reservations: _containers.RepeatedScalarFieldContainer[int]
    device_blocks: int
    def __init__(self, instance: _Optional[bytes] = ..., pid: _Optional[int] = ..., started: _Optional[int] = ..., model: _Optional[str] = ..., fingerprint: _Optional[str] = ..., block_bytes: _Optional[int] = ..., block_tokens: _Optional[int] = ..., leases: _Optional[_Iterable[int]] = ..., reservations: _Optional[_Iterable[int]] = ..., device_blocks: _Optional[int] = ...) -> None: ...

class LoadReport(_message.Message):
    __slots__ = ("live", "preloads", "free_blocks", "tokens_per_s")
    LIVE_FIELD_NUMBER: _ClassVar[int]
    PRELOADS_FIELD_NUMBER: _ClassVar[int]
    FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    live: int
    preloads: int
    free_blocks: int
    tokens_per_s: float
    def __init__(self, live: _Optional[int] = ..., preloads: _Optional[int] = ..., free_blocks: _Optional[int] = ..., tokens_per_s: _Optional[float] = ...) -> None: ...

class PreloadReport(_message.Message):
    __slots__ = ("hint", "outcome", "use", "tokens", "reason", "because")
    HINT_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    USE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    BECAUSE_FIELD_NUMBER: _ClassVar[int]
    hint: int
    outcome: _outcomes_pb2.Outcome
    use: _outcomes_pb2.Use
    tokens: int
    reason: str
    because: str
    def __init__(self, hint: _Optional[int] = ..., outcome: _Optional[_Union[_outcomes_pb2.Outcome, str]] = ..., use: _Optional[_Union[_outcomes_pb2.Use, str]] = ..., tokens: _Optional[int] = ..., reason: _Optional[str] = ..., because: _Optional[str] = ...) -> None: ...

class SessionReport(_message.Message):
    __slots__ = ("tenant", "session")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    session: str
    def __init__(self, tenant: _Optional[str] = ..., session: _Optional[str] = ...) -> None: ...

class ServiceMessage(_message.Message):
    __slots__ = ("registered", "preload", "withdraw", "observed", "draining", "shares")
    REGISTERED_FIELD_NUMBER: _ClassVar[int]
    PRELOAD_FIELD_NUMBER: _ClassVar[int]
    WITHDRAW_FIELD_NUMBER: _ClassVar[int]
    OBSERVED_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    SHARES_FIELD_NUMBER: _ClassVar[int]
    registered: Registered
    preload: Preload
    withdraw: Withdraw
    observed: Observed
    draining: Draining
    shares: Shares
    def __init__(self, registered: _Optional[_Union[Registered, _Mapping]] = ..., preload: _Optional[_Union[Preload, _Mapping]] = ..., withdraw: _Optional[_Union[Withdraw, _Mapping]] = ..., observed: _Optional[_Union[Observed, _Mapping]] = ..., draining: _Optional[_Union[Draining, _Mapping]] = ..., shares: _Optional[_Union[Shares, _Mapping]] = ...) -> None: ...

class Registered(_message.Message):
    __slots__ = ("namespace", "arena", "slots", "slot_bytes", "secret", "service")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    ARENA_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    SLOT_BYTES_FIELD_NUMBER: _ClassVar[int]
    SECRET_FIELD_NUMBER: _ClassVar[int]
    SERVICE_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    arena: str
    slots: int
    slot_bytes: int
    secret: bytes
    service: str
    def __init__(self, namespace: _Optional[str] = ..., arena: _Optional[str] = ..., slots: _Optional[int] = ..., slot_bytes: _Optional[int] = ..., secret: _Optional[bytes] = ..., service: _Optional[str] = ...) -> None: ...

class Preload(_message.Message):
    __slots__ = ("hint", "tenant", "session", "context", "probability", "expected_in_s", "hold_s", "kind", "place")
    HINT_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_IN_S_FIELD_NUMBER: _ClassVar[int]
    HOLD_S_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    PLACE_FIELD_NUMBER: _ClassVar[int]
    hint: int
    tenant: str
    session: str
    context: _hints_pb2.Context
    probability: float
    expected_in_s: float
    hold_s: float
    kind: str
    place: Place
    def __init__(self, hint: _Optional[int] = ..., tenant: _Optional[str] = ..., session: _Optional[str] = ..., context: _Optional[_Union[_hints_pb2.Context, _Mapping]] = ..., probability: _Optional[float] = ..., expected_in_s: _Optional[float] = ..., hold_s: _Optional[float] = ..., kind: _Optional[str] = ..., place: _Optional[_Union[Place, str]] = ...) -> None: ...

class Withdraw(_message.Message):
    __slots__ = ("hint",)
    HINT_FIELD_NUMBER: _ClassVar[int]
    hint: int
    def __init__(self, hint: _Optional[int] = ...) -> None: ...

class Observed(_message.Message):
    __slots__ = ("tenant", "session", "kind", "about")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    ABOUT_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    session: str
    kind: str
    about: str
    def __init__(self, tenant: _Optional[str] = ..., session: _Optional[str] = ..., kind: _Optional[str] = ..., about: _Optional[str] = ...) -> None: ...

class Shares(_message.Message):
    __slots__ = ("tenants",)
    TENANTS_FIELD_NUMBER: _ClassVar[int]
    tenants: _containers.RepeatedCompositeFieldContainer[_admin_pb2.TenantShare]
    def __init__(self, tenants: _Optional[_Iterable[_Union[_admin_pb2.TenantShare, _Mapping]]] = ...) -> None: ...

class Draining(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
