"""Settings as TOML, for people: what is secret (fields without a repr) is not shown."""

import json
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from kvprefetch.settings import Settings

HIDDEN = "(hidden)"
_WITH_PASSWORD = "url"


def as_toml(settings: Settings) -> str:
    """The whole of it, in the order of `settings.py`, which says what each key means."""
    return "\n".join(_table(settings, "")) + "\n"


def _table(settings: Any, path: str) -> Iterator[str]:
    below = []
    for field in fields(settings):
        value = getattr(settings, field.name)
        name = f"{path}.{field.name}" if path else field.name
        if is_dataclass(value):
            below.append((f"[{name}]", value, name))
        elif isinstance(value, tuple) and any(is_dataclass(each) for each in value):
            below += [(f"[[{name}]]", each, name) for each in value]
        elif not field.repr and value and field.name != _WITH_PASSWORD:
            yield f"# {field.name} = {HIDDEN}"
        else:
            yield f"{field.name} = {_value(value)}"
    for header, table, name in below:
        yield ""
        yield header
        yield from _table(table, name)


def _value(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        shown = re.sub(r"(://[^/@:]*:)[^@]*@", rf"\1{HIDDEN}@", value)  # a URL's password
        return json.dumps(shown, ensure_ascii=False).replace("\x7f", "\\u007f")  # else JSON's strings are TOML's
    if isinstance(value, tuple):
        return f"[{', '.join(map(_value, value))}]"
    return repr(value)
