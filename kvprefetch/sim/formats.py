"""Read traces: kv-cache-tester's agent sessions, Mooncake's requests, and our own JSON lines. Plain or gzip."""

import gzip
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from kvprefetch.cache.spans import Run
from kvprefetch.errors import TraceError
from kvprefetch.sim.trace import Request, Trace, joined, runs_of

_SCOPE = 1 << 32  # names of one session's blocks stay apart from another's
_TOOLS = -(1 << 40)  # names of blocks shared by equal tool sets, apart from all sessions'
MOONCAKE_BLOCK = 512


def read_trace(path: Path, name: str, tenants: int) -> Trace:
    """The trace in `path`. Raises TraceError naming the line that cannot be read."""
    try:
        return FORMATS[name](rows_of(path), tenants)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise TraceError(f"{path.name} is not a trace of format {name}: {type(error).__name__}: {error}") from error


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a JSON lines file, gzipped or not. Raises TraceError naming the line."""
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise TraceError(f"{path.name}, line {number}: {error}") from error
                if not isinstance(row, dict):
                    raise TraceError(f"{path.name}, line {number}: not an object")
                yield row
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise TraceError(f"{path}: {error}") from error


# -- kv-cache-tester ---------------------------------------------------------------------------------------
def _agent_sessions(rows: Iterable[dict[str, Any]], tenants: int) -> Trace:
    """Sessions with times of their own. Equal `tool_tokens` share the blocks of tools and system prompt.

    A tenant is a group of equal tools: the largest group's rank is 0, and the tenant is the rank modulo `tenants`.
    """
    found = list(rows)
    sizes: dict[int, int] = {}
    for row in found:
        sizes[row.get("tool_tokens") or 0] = sizes.get(row.get("tool_tokens") or 0, 0) + 1
    ranks = {tools: rank for rank, tools in enumerate(sorted(sizes, key=lambda tools: (-sizes[tools], tools)))}
    sessions: list[tuple[Request, ...]] = []
    block = 64
    for number, row in enumerate(found):
        block = row["block_size"]
        rank = ranks[row.get("tool_tokens") or 0]
        names = _naming(row, number, rank, block)
        for session, requests in _conversations(row):
            sessions.append(tuple(_agent_request(q, session, f"tenant-{rank % tenants}", names) for q in requests))
    return Trace(block, tuple(session for session in sessions if session), is_placed=False)


def _conversations(row: dict[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The session itself, then its subagents, whose times count from their own start."""
    own = [q for q in row["requests"] if "requests" not in q]
    yield row["id"], own
    for number, sub in enumerate(q for q in row["requests"] if "requests" in q):
        moved = [{**q, "t": q["t"] + sub["t"]} for q in sub["requests"]]
        yield f"{row['id']}/{sub.get('agent_id', number)}", moved


def _naming(row: dict[str, Any], number: int, rank: int, block: int) -> Callable[[Run], Iterator[Run]]:
    """How a session's block names become those of the whole trace."""
    if row.get("hash_id_scope") == "global":
        return lambda run: iter((run,))
    offset = (number + 1) * _SCOPE
    shared = ((row.get("tool_tokens") or 0) + (row.get("system_tokens") or 0)) // block
    tools = _TOOLS + rank * (1 << 24)

    def name(run: Run) -> Iterator[Run]:
        first, count = run
        common = max(min(first + count - 1, shared) - first + 1, 0)  # names count from 1, tools first
        if common:
            yield tools + first, common
        if count > common:
            yield offset + first + common, count - common

    return name


def _agent_request(row: dict[str, Any], session: str, tenant: str, names: Callable[[Run], Iterator[Run]]) -> Request:
    path = joined(run for pair in row["hash_rle"] for run in names((pair[0], pair[1])))
    return Request(
        session=session,
        tenant=tenant,
        at=float(row["t"]),
        tokens=int(row["in"]),
        out=int(row.get("out") or 0),
        busy_s=row.get("api_time"),
        path=path,
        stop=row.get("stop") or "",
        tool_result="tool_result" in (row.get("input_types") or ()),
    )


# -- Mooncake ----------------------------------------------------------------------------------------------
def _mooncake(rows: Iterable[dict[str, Any]], tenants: int) -> Trace:
    """Requests without sessions: each continues the session whose latest prompt it extends by most blocks.

    It must extend at least half of that prompt (and more than the first block, which is everybody's).
    """
    last: dict[int, int] = {}  # block → the session that used it last
    sessions: list[list[Request]] = []
    for row in rows:
        ids = row["hash_ids"]
        number = next((last[name] for name in reversed(ids) if name in last), None)
        if number is not None:
            before = sessions[number][-1].blocks
            known = sum(name in last for name in ids)
            if known < 2 or 2 * known < before:
                number = None
        if number is None:
            number = len(sessions)
            sessions.append([])
        last.update(dict.fromkeys(ids, number))
        sessions[number].append(
            Request(
                session=f"s{number}",
                tenant=f"tenant-{number % tenants}",
                at=row["timestamp"] / 1000,
                tokens=row["input_length"],
                out=row["output_length"],
                busy_s=None,
                path=joined(runs_of(ids[: row["input_length"] // MOONCAKE_BLOCK])),
            )
        )
    return Trace(MOONCAKE_BLOCK, tuple(tuple(session) for session in sessions), is_placed=True)


# -- ours --------------------------------------------------------------------------------------------------
def _jsonl(rows: Iterable[dict[str, Any]], tenants: int) -> Trace:
    """One request a line: session, at (s), tokens, blocks ([first, count] runs or plain names), and optionally
    tenant, out, busy_s, stop, tool_result, block_tokens (the first line's counts, default 64).
    """
    sessions: dict[str, list[Request]] = {}
    block = 0
    for row in rows:
        block = block or int(row.get("block_tokens", 64))
        blocks = row["blocks"]
        runs = runs_of(blocks) if blocks and isinstance(blocks[0], int) else ((a, b) for a, b in blocks)
        name = str(row["session"])
        request = Request(
            session=name,
            tenant=str(row.get("tenant", "tenant-0")),
            at=float(row["at"]),
            tokens=int(row["tokens"]),
            out=int(row.get("out", 0)),
            busy_s=row.get("busy_s"),
            path=joined(runs),
            stop=str(row.get("stop", "")),
            tool_result=bool(row.get("tool_result", False)),
        )
        sessions.setdefault(name, []).append(request)
    ordered = (tuple(sorted(requests, key=lambda r: r.at)) for requests in sessions.values())
    return Trace(block or 64, tuple(ordered), is_placed=True)


FORMATS: dict[str, Callable[[Iterable[dict[str, Any]], int], Trace]] = {
    "kv-cache-tester": _agent_sessions,
    "mooncake": _mooncake,
    "jsonl": _jsonl,
}
