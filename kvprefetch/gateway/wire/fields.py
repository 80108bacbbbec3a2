"""Values out of JSON that anybody may have written: what is of another type counts as not said. Nothing here raises."""

from typing import Any

from kvprefetch.gateway.contract import Json


def an_object(value: Any) -> Json:
    """`value` if it is an object, else {}."""
    return value if isinstance(value, dict) else {}


def objects(value: Any) -> list[Json]:
    """The objects in a list."""
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def text(value: Any) -> str:
    """`value` if it is a string, else ""."""
    return value if isinstance(value, str) else ""


def count(value: Any) -> int | None:
    """`value` if it is a number of things."""
    return value if type(value) is int and value >= 0 else None


def is_said(value: Any) -> bool:
    """Whether a field's value says anything: an empty one is as good as none. False and 0 do."""
    return value is not None and value not in ("", [], {})
