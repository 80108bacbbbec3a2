"""What engines say: JSON objects, and figures in Prometheus's text format. Pure; garbage says nothing."""

from collections.abc import Iterator
from typing import Any

import msgspec
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from kvprefetch.gateway.contract import Json

encode = msgspec.json.encode
_MOST = 2**53  # where a float counts no longer; NaN is not less


def decoded(raw: bytes) -> Json:
    """The JSON object in `raw`; an empty one where it holds none."""
    value = _value(raw)
    return value if isinstance(value, dict) else {}


def decoded_list(raw: bytes) -> list[Any]:
    """The JSON list in `raw`; an empty one where it holds none."""
    value = _value(raw)
    return value if isinstance(value, list) else []


def samples(text: bytes, *names: str) -> list[Sample]:
    """The figures of these names that count something. Other lines are not parsed: an engine has hundreds."""
    lines = [line for line in text.decode(errors="replace").splitlines() if line.startswith(names)]
    try:
        return [sample for sample in _parsed(lines) if sample.name in names and abs(sample.value) < _MOST]
    except (ValueError, LookupError, TypeError, AttributeError):  # what its parser says of odd lines
        return []


def _value(raw: bytes) -> Any:
    try:
        return msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _parsed(lines: list[str]) -> Iterator[Sample]:
    for family in text_string_to_metric_families("\n".join(lines) + "\n"):
        yield from family.samples
