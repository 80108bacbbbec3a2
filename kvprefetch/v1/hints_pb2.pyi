from kvprefetch.v1 import outcomes_pb2 as _outcomes_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Context(_message.Message):
    __slots__ = ("model", "messages", "tools", "chat_template_kwargs", "token_ids", "name", "adapter", "namespace")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    TOOLS_FIELD_NUMBER: _ClassVar[int]
    CHAT_TEMPLATE_KWARGS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    model: str
    messages: bytes
    tools: bytes
    chat_template_kwargs: bytes
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    name: str
    adapter: str
    namespace: str
    def __init__(self, model: _Optional[str] = ..., messages: _Optional[bytes] = ..., tools: _Optional[bytes] = ..., chat_template_kwargs: _Optional[bytes] = ..., token_ids: _Optional[_Iterable[int]] = ..., name: _Optional[str] = ..., adapter: _Optional[str] = ..., namespace: _Optional[str] = ...) -> None: ...

class SignalRequest(_message.Message):
    __slots__ = ("kind", "session", "contexts", "attributes", "at")
    KIND_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    CONTEXTS_FIELD_NUMBER: _ClassVar[int]
    ATTRIBUTES_FIELD_NUMBER: _ClassVar[int]
    AT_FIELD_NUMBER: _ClassVar[int]
    kind: str
    session: str
    contexts: _containers.RepeatedCompositeFieldContainer[Context]
    attributes: bytes
    at: float
    def __init__(self, kind: _Optional[str] = ..., session: _Optional[str] = ..., contexts: _Optional[_Iterable[_Union[Context, _Mapping]]] = ..., attributes: _Optional[bytes] = ..., at: _Optional[float] = ...) -> None: ...

class SignalReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PrefetchRequest(_message.Message):
    __slots__ = ("context", "session", "probability", "expected_in_s", "hold_s", "follow")
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_IN_S_FIELD_NUMBER: _ClassVar[int]
    HOLD_S_FIELD_NUMBER: _ClassVar[int]
    FOLLOW_FIELD_NUMBER: _ClassVar[int]
    context: Context
    session: str
    probability: float
    expected_in_s: float
    hold_s: float
    follow: int
    def __init__(self, context: _Optional[_Union[Context, _Mapping]] = ..., session: _Optional[str] = ..., probability: _Optional[float] = ..., expected_in_s: _Optional[float] = ..., hold_s: _Optional[float] = ..., follow: _Optional[int] = ...) -> None: ...

class PrefetchEvent(_message.Message):
    __slots__ = ("hint", "outcome", "use", "tokens", "reason", "because", "worker")
    HINT_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    USE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    BECAUSE_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    hint: int
    outcome: _outcomes_pb2.Outcome
    use: _outcomes_pb2.Use
    tokens: int
    reason: str
    because: str
    worker: str
    def __init__(self, hint: _Optional[int] = ..., outcome: _Optional[_Union[_outcomes_pb2.Outcome, str]] = ..., use: _Optional[_Union[_outcomes_pb2.Use, str]] = ..., tokens: _Optional[int] = ..., reason: _Optional[str] = ..., because: _Optional[str] = ..., worker: _Optional[str] = ...) -> None: ...

class CancelRequest(_message.Message):
    __slots__ = ("hint",)
    HINT_FIELD_NUMBER: _ClassVar[int]
    hint: int
    def __init__(self, hint: _Optional[int] = ...) -> None: ...

class CancelReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
