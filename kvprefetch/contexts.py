"""What callers hand in: a context worth preloading, and how an answer is sampled."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

from kvprefetch.errors import InvalidRequest

Message = Mapping[str, Any]
PUBLIC = "public"
"""The namespace that everybody reads and the operator alone fills."""
_GROUP = "group:"
_LONGEST_NAME = 63  # bytes, of a group as of a tenant


def group_of(namespace: str) -> str:
    """The group whose namespace it is; "" for the private one and the public one. Raises InvalidRequest for no such."""
    group = namespace.removeprefix(_GROUP)
    if namespace in ("", PUBLIC):
        return ""
    if group == namespace or not 0 < len(group.encode("utf-8", "replace")) <= _LONGEST_NAME:
        raise InvalidRequest(f'a namespace is "", "public" or "group:" and a name, not {namespace[:80]!r}')
    return group


def qualified(tenant: str, name: str) -> str:
    """A session's or context's name, told apart from another tenant's of the same name; "" stays ""."""
    return f"{tenant}\x1f{name}" if name else ""


def unqualified(name: str) -> str:
    """The name as its tenant gave it."""
    return name.partition("\x1f")[2]


@dataclass(frozen=True)
class Context:
    """A prefix of a coming prompt: either `messages` (more will follow) or exact `token_ids`.

    `messages` are the conversation so far in the chat format; the request that uses the context has the
    same messages and at least one more. Rendering to tokens happens on the worker.

    `namespace`: who shares its blocks: "" nobody, "group:NAME" the tenants of that group, "public" everybody.
    """

    messages: tuple[Message, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    token_ids: tuple[int, ...] = ()
    name: str = ""
    namespace: str = ""

    def __post_init__(self) -> None:
        group_of(self.namespace)
        if bool(self.messages) == bool(self.token_ids):
            raise InvalidRequest("a context has either messages or token_ids, and not an empty list of them")

    def with_answer(self, answer: str) -> "Context":
        """The context of the session's next turn."""
        reply = {"role": "assistant", "content": answer}
        return Context((*self.messages, reply), self.tools, self.chat_template_kwargs, namespace=self.namespace)


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 are off."""

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        checks = {
            "max_tokens must be at least 1": self.max_tokens >= 1,
            "temperature must be 0 or more, and finite": 0 <= self.temperature < inf,
            "top_k must be 0 or more": self.top_k >= 0,
            "top_p must be in (0, 1]": 0 < self.top_p <= 1,
            "stop strings must not be empty": all(self.stop),
        }
        for message, holds in checks.items():
            if not holds:
                raise InvalidRequest(message)
