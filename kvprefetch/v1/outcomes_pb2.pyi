from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from typing import ClassVar as _ClassVar

DESCRIPTOR: _descriptor.FileDescriptor

class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OUTCOME_UNSPECIFIED: _ClassVar[Outcome]
    OUTCOME_WARM: _ClassVar[Outcome]
    OUTCOME_ALREADY_WARM: _ClassVar[Outcome]
    OUTCOME_CLIPPED: _ClassVar[Outcome]
    OUTCOME_REJECTED: _ClassVar[Outcome]
    OUTCOME_CANCELLED: _ClassVar[Outcome]
    OUTCOME_EXPIRED: _ClassVar[Outcome]
    OUTCOME_FAILED: _ClassVar[Outcome]

class Use(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    USE_UNSPECIFIED: _ClassVar[Use]
    USE_USED: _ClassVar[Use]
    USE_LATE: _ClassVar[Use]
    USE_EVICTED: _ClassVar[Use]
    USE_UNUSED: _ClassVar[Use]

class MissReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MISS_REASON_UNSPECIFIED: _ClassVar[MissReason]
    MISS_REASON_NEVER_SEEN: _ClassVar[MissReason]
    MISS_REASON_DIVERGED: _ClassVar[MissReason]
    MISS_REASON_IN_FLIGHT: _ClassVar[MissReason]
    MISS_REASON_EVICTED: _ClassVar[MissReason]
    MISS_REASON_TIMED_OUT: _ClassVar[MissReason]
    MISS_REASON_CORRUPT: _ClassVar[MissReason]
    MISS_REASON_UNAVAILABLE: _ClassVar[MissReason]
    MISS_REASON_UNKNOWN: _ClassVar[MissReason]
OUTCOME_UNSPECIFIED: Outcome
OUTCOME_WARM: Outcome
OUTCOME_ALREADY_WARM: Outcome
OUTCOME_CLIPPED: Outcome
OUTCOME_REJECTED: Outcome
OUTCOME_CANCELLED: Outcome
OUTCOME_EXPIRED: Outcome
OUTCOME_FAILED: Outcome
USE_UNSPECIFIED: Use
USE_USED: Use
USE_LATE: Use
USE_EVICTED: Use
USE_UNUSED: Use
MISS_REASON_UNSPECIFIED: MissReason
MISS_REASON_NEVER_SEEN: MissReason
MISS_REASON_DIVERGED: MissReason
MISS_REASON_IN_FLIGHT: MissReason
MISS_REASON_EVICTED: MissReason
MISS_REASON_TIMED_OUT: MissReason
MISS_REASON_CORRUPT: MissReason
MISS_REASON_UNAVAILABLE: MissReason
MISS_REASON_UNKNOWN: MissReason
