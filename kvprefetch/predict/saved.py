"""What was learnt, as bytes and back: for a restart that forgets nothing.

Promises
- `load(dump(state))` answers and goes on learning as `state` would. Objects that are one stay one.
- Data of another version, cut short or damaged raise `StateError`; so does whatever does not fit. Nothing else is
  raised, nothing is executed: only the classes listed here are made, with exactly their own attributes.
- Whoever can write the data can teach the predictor what they like, but no more: keep it where other tenants cannot
  read it, as it names contexts.

Format: a line `kvprefetch-state VERSION CRC32 LENGTH`, then zlib-compressed JSON. Plain values stand for themselves,
all else is a list that begins with what it is. Whoever changes an attribute of a listed class makes a new version.
"""

import json
import zlib
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, is_dataclass
from itertools import count
from typing import Any, TypeVar

from kvprefetch.errors import StateError
from kvprefetch.predict import counts, gaps, memory, mixture, names, rates, sessions, trials, which
from kvprefetch.predict.names import Parts

VERSION = 1
_MAGIC = b"kvprefetch-state"
_LARGEST = 2**31  # bytes of JSON
_HEADER = 100  # bytes, at most
_T = TypeVar("_T")

_MODULES = (counts, gaps, memory, mixture, names, rates, sessions, trials, which)
_PLAIN: tuple[object, ...] = (
    *(counts.Counts(1.0, 1, 1), names.Names(), memory.Tenant(1), mixture.Mixture(())),
    *(gaps.GapModel(), rates.Shares(1.0)),
)
"""One of each class that does not itself tell its attributes, as dataclasses and classes with slots do."""
_TRANSIENT = {("Which", "_latest")}  # attributes that are not kept: they begin with their class's default


def _attributes(kind: type[Any]) -> tuple[str, ...]:
    if is_dataclass(kind):
        return tuple(field.name for field in fields(kind))
    return tuple(getattr(kind, "__slots__", ()))


def _classes() -> Iterator[tuple[type[Any], tuple[str, ...]]]:
    """All that a state can consist of, with their attributes."""
    for module in _MODULES:
        for kind in vars(module).values():
            if isinstance(kind, type) and kind.__module__ == module.__name__ and _attributes(kind):
                yield kind, _attributes(kind)
    for example in _PLAIN:
        yield type(example), tuple(vars(example))


_CLASSES = {
    kind.__name__: (kind, [name for name in attributes if (kind.__name__, name) not in _TRANSIENT])
    for kind, attributes in _classes()
}
_COLLECTIONS: dict[str, Callable[[Iterable[Any]], Any]] = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "parts": Parts._make,
}
_MAPPINGS: dict[str, Callable[[Iterable[Any]], Any]] = {"dict": dict, "ordered": OrderedDict}


def dump(state: object) -> bytes:
    """`state` as bytes. Raises StateError for what is of no listed class."""
    try:
        text = json.dumps(_Writer().encoded(state), separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise StateError(f"cannot be saved: {error}") from error
    body = zlib.compress(text.encode(), 6)
    return b"%s %d %08x %d\n" % (_MAGIC, VERSION, zlib.crc32(body), len(body)) + body


def load(data: bytes, kind: type[_T]) -> _T:
    """What was dumped, if it is of this kind. Raises StateError."""
    body = _checked(data)
    try:
        unpacker = zlib.decompressobj()
        text = unpacker.decompress(body, _LARGEST)
        if not unpacker.eof:
            raise StateError(f"the saved state is larger than {_LARGEST} bytes, or incomplete")
        state = _Reader().decoded(json.loads(text))
    except StateError:
        raise
    except (
        zlib.error,
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        AttributeError,
        OverflowError,
        RecursionError,
    ) as error:
        raise StateError(f"the saved state is no state: {type(error).__name__}: {error}") from error
    if not isinstance(state, kind):
        raise StateError(f"the saved state is of {type(state).__name__}, not of {kind.__name__}")
    return state


def _checked(data: bytes) -> bytes:
    """The body, if it is what the header says."""
    header, newline, body = data[:_HEADER].partition(b"\n")
    words = header.split(b" ")
    if not newline or len(words) != 4 or words[0] != _MAGIC:
        raise StateError("no saved state of kvprefetch, or cut short")
    if words[1] != b"%d" % VERSION:
        version = words[1].decode(errors="replace")
        raise StateError(f"the saved state is of version {version}, this is version {VERSION}: start without it")
    body = data[len(header) + 1 :]
    if words[3] != b"%d" % len(body):
        raise StateError(f"the saved state has {len(body)} bytes instead of {words[3].decode(errors='replace')}")
    if words[2] != b"%08x" % zlib.crc32(body):
        raise StateError("the saved state is damaged: its checksum is wrong")
    return body


class _Writer:
    """Values to what JSON can say."""

    def __init__(self) -> None:
        self.numbers: dict[int, int] = {}  # by id, of the objects written

    def encoded(self, value: Any) -> Any:
        """See the module's format."""
        kind = type(value)
        if value is None or kind in (bool, int, float, str):
            return value
        if kind in (list, tuple, set, Parts):
            return [kind.__name__.lower(), *map(self.encoded, value)]
        if kind in (dict, OrderedDict):
            flat = [self.encoded(part) for item in value.items() for part in item]
            return ["dict" if kind is dict else "ordered", *flat]
        if kind is deque:
            return ["deque", value.maxlen, *map(self.encoded, value)]
        if kind is count:
            return ["count", int(repr(value)[len("count(") : -1])]  # the one way to see it without moving it
        return self._object(value)

    def _object(self, value: Any) -> list[Any]:
        number = self.numbers.get(id(value))
        if number is not None:
            return ["same", number]
        name = type(value).__name__
        known, attributes = _CLASSES.get(name, (None, []))
        if type(value) is not known:
            raise TypeError(f"{name} is no part of a state")
        self.numbers[id(value)] = len(self.numbers)
        return ["object", name, *(self.encoded(getattr(value, attribute)) for attribute in attributes)]


class _Reader:
    """And back."""

    def __init__(self) -> None:
        self.objects: list[Any] = []
        self.texts: dict[str, str] = {}  # a name stands in many tables, once in memory

    def decoded(self, value: Any) -> Any:
        """See the module's format."""
        if isinstance(value, str):
            return self.texts.setdefault(value, value)
        if not isinstance(value, list):
            return value
        what, *rest = value
        if what == "same":
            return self.objects[rest[0]]
        if what == "object":
            return self._object(*rest)
        if what == "deque":
            return deque(map(self.decoded, rest[1:]), rest[0])
        if what == "count":
            return count(int(rest[0]))
        parts = list(map(self.decoded, rest))
        if what in _MAPPINGS:
            return _MAPPINGS[what](zip(parts[::2], parts[1::2], strict=True))
        return _COLLECTIONS[what](parts)

    def _object(self, name: str, *values: Any) -> Any:
        made, attributes = _CLASSES[name]
        state = object.__new__(made)
        self.objects.append(state)
        for attribute, value in zip(attributes, values, strict=True):
            setattr(state, attribute, self.decoded(value))
        return state
