"""What a caller asks for, whichever endpoint it came by, and the fields that all endpoints read alike."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers

from kvprefetch.errors import UnknownModel
from kvprefetch.http.fields import Fields
from kvprefetch.http.problems import InvalidField

SESSION_HEADER = "x-kvprefetch-session"
NAMESPACE_HEADER = "x-kvprefetch-namespace"
_MOST_STOPS, _LONGEST_STOP = 16, 256  # they are looked for after every token
_COLDEST = 1e-5  # a lower temperature is greedy: dividing by it would overflow, which fails the whole batch
_LIMIT = 2**31 - 1
_LONGEST_HEADER = 256


@dataclass(frozen=True)
class Ask:
    """One request. Either `messages`, or `text` or `token_ids`; `max_tokens` None: the caller does not say."""

    messages: tuple[dict[str, Any], ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    token_ids: tuple[int, ...] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)
    max_tokens: int | None = None
    session: str = ""
    namespace: str = ""
    stream: bool = False
    include_usage: bool = False


def common(fields: Fields, headers: Headers, model: str) -> dict[str, Any]:
    """The arguments of `Ask` that every endpoint has. Raises InvalidField, UnknownModel."""
    check_model(fields.text("model", longest=4_096), model)
    fields.only("n", 1, why="only one answer (1) is made for each request")
    fields.only("best_of", 1, why="only one answer (1) is made for each request")
    for name in ("presence_penalty", "frequency_penalty", "min_p", "min_tokens"):
        fields.only(name, 0)
    fields.only("repetition_penalty", 1)
    for name in ("logit_bias", "stop_token_ids", "bad_words"):
        fields.only(name, {}, [])
    fields.only("response_format", {"type": "text"}, why='only {"type": "text"} is supported here')
    fields.only("cache_salt", why="a tenant's cache is private to it already")
    options = Fields(fields.object("stream_options"))
    stream = fields.flag("stream")
    return {
        "sampling": _sampling(fields),
        "session": _session(fields, headers),
        "namespace": headers.get(NAMESPACE_HEADER, ""),
        "stream": stream,
        "include_usage": stream and options.flag("include_usage"),
    }


def check_model(asked: str, served: str) -> None:
    """Raises UnknownModel unless `asked` is the model that is served, or ""."""
    if asked not in ("", served):
        raise UnknownModel(f"the model {asked[:100]!r} is not served here; {served!r} is")


def most_tokens(fields: Fields, name: str) -> int | None:
    """How many tokens the answer may have; 0 asks for a warm prompt alone."""
    return fields.integer(name, 0, _LIMIT)


def _session(fields: Fields, headers: Headers) -> str:
    named = headers.get(SESSION_HEADER, "")
    if len(named) > _LONGEST_HEADER:
        raise InvalidField(SESSION_HEADER, f"must have at most {_LONGEST_HEADER} characters")
    return named or fields.text("user") or fields.text("prompt_cache_key")


def _sampling(fields: Fields) -> dict[str, Any]:
    """What the caller says of `Sampling`; the rest keeps its default."""
    temperature = fields.number("temperature", 0, 1e6)
    top_p = fields.number("top_p", 0, 1)
    top_k = fields.integer("top_k", -1, _LIMIT)
    if top_p == 0:
        raise InvalidField("top_p", "must be more than 0")
    said = {
        "temperature": 0.0 if temperature is not None and temperature < _COLDEST else temperature,
        "top_p": top_p,
        "top_k": max(top_k, 0) if top_k is not None else None,  # -1 is off, as elsewhere
        "seed": fields.integer("seed", -(2**63), 2**64 - 1),
        "stop": _stop(fields.get("stop")),
        "ignore_eos": fields.flag("ignore_eos"),
    }
    return {name: value for name, value in said.items() if value is not None}


def _stop(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value or []
    if not isinstance(stops, list) or len(stops) > _MOST_STOPS:
        raise InvalidField("stop", f"must be a string or a list of at most {_MOST_STOPS}")
    if not all(isinstance(stop, str) and 0 < len(stop) <= _LONGEST_STOP for stop in stops):
        raise InvalidField("stop", f"each must be a string of 1 to {_LONGEST_STOP} characters")
    return tuple(stops)
