"""Read what people and agents touched, one event at a time: the input of `predict/which.py`.

`file_navigation`: a line is a commit, with the files that it touched. `agent_tool_events`: a line is a message of an
agent's session, with its tool calls; a read of a file is a use of it, any other call, and a user's message, a signal.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvprefetch.errors import TraceError
from kvprefetch.sim.formats import rows_of

_TEAM = "team"  # the tenant of traces that name none


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened in a session. A use has a context; a signal may have a subject."""

    tenant: str
    user: str
    session: str
    kind: str
    at: float  # s
    context: str | None = None  # what was used
    about: str = ""  # what a signal was about
    chars: int = 0  # size of the context, where known


def read_events(path: Path) -> list[Event]:
    """The events of a file in either format, in order of time. Raises TraceError naming what cannot be read."""
    rows = list(rows_of(path))
    if not rows:
        raise TraceError(f"{path.name} is empty")
    try:
        events = list(_commits(rows) if "files" in rows[0] else _messages(rows))
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise TraceError(f"{path.name} holds no events that are known: {type(error).__name__}: {error}") from error
    return sorted(events, key=lambda event: event.at)  # stable: what happened at once keeps its order


def _commits(rows: Iterable[dict[str, Any]]) -> Iterator[Event]:
    for row in rows:
        for name, status, chars in row["files"]:
            yield Event(row["tenant"], row["user"], row["session"], status, float(row["ts"]), name, chars=chars or 0)


def _messages(rows: Iterable[dict[str, Any]]) -> Iterator[Event]:
    for row in rows:
        user, session, at = row["user"], row["session"], float(row["ts"])
        tenant = row.get("tenant", _TEAM)
        if row["role"] == "user":
            yield Event(tenant, user, session, "message", at)
        for tool in row.get("tools") or ():
            target, name = tool["target"], tool["name"]
            if tool["type"] == "read" and target:
                yield Event(tenant, user, session, name, at, target, chars=tool["chars"] or 0)
            else:
                yield Event(tenant, user, session, name, at, about=target or "")
