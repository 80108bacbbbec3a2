"""Fields of a JSON object, each with a name, a type and a range. null counts as left out; unknown fields are ignored.

Everything here raises InvalidField, which names the field.
"""

from collections.abc import Mapping
from math import isfinite
from typing import Any

from kvprefetch.http.problems import InvalidField

_LONGEST_NAME = 256  # bytes of a session's name


class Fields:
    """Reads one object."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def get(self, name: str) -> Any:
        """The field as it is; None if it is left out."""
        return self._values.get(name)

    def text(self, name: str, longest: int = _LONGEST_NAME) -> str:
        """A string of at most `longest` bytes; "" if left out."""
        value = self.get(name)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise InvalidField(name, "must be a string")
        if len(value.encode()) > longest:
            raise InvalidField(name, f"must have at most {longest} bytes")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """true or false."""
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise InvalidField(name, "must be true or false")
        return value

    def integer(self, name: str, least: int, most: int) -> int | None:
        """A whole number from `least` to `most`; None if left out."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise InvalidField(name, f"must be a whole number from {least} to {most}")
        return value

    def number(self, name: str, least: float, most: float) -> float | None:
        """A number from `least` to `most`; None if left out."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
            raise InvalidField(name, f"must be a number from {least:g} to {most:g}")
        if not isfinite(value):
            raise InvalidField(name, "must be finite")
        return float(value)

    def object(self, name: str) -> dict[str, Any]:
        """An object; {} if left out."""
        value = self.get(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise InvalidField(name, "must be an object")
        return value

    def objects(self, name: str) -> tuple[dict[str, Any], ...]:
        """A list of objects; () if left out."""
        value = self.get(name)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise InvalidField(name, "must be a list of objects")
        return tuple(value)

    def only(self, name: str, *neutral: Any, why: str = "is not supported here") -> None:
        """Refuse a field that would change the answer in a way nobody here can: all but `neutral` values."""
        value = self.get(name)
        if value is not None and value not in neutral:
            raise InvalidField(name, f"{why}; leave it out")
