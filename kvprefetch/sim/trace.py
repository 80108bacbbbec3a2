"""What a trace is, whatever its format: sessions of requests, each a path of blocks."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from kvprefetch.cache.spans import Run


@dataclass(frozen=True, slots=True)
class Request:
    """One request as it was observed. Times in seconds."""

    session: str
    tenant: str
    at: float  # arrival; within its session first, on the clock of the run once placed
    tokens: int  # prompt tokens
    out: int  # generated tokens
    busy_s: float | None  # from arrival to its end, where the trace knows it
    path: tuple[Run, ...]  # whole blocks of the prompt
    stop: str = ""  # why it ended: "tool_use", "end_turn", …
    tool_result: bool = False  # it brings a tool's result, not a user's words

    @property
    def identity(self) -> tuple[str, float, int]:
        """What tells it from every other request of the trace."""
        return self.session, self.at, self.tokens

    @property
    def blocks(self) -> int:
        """Whole blocks of the prompt."""
        return sum(count for _, count in self.path)


@dataclass(frozen=True)
class Trace:
    """Sessions in the order of the file; each in the order of its requests."""

    block_tokens: int
    sessions: tuple[tuple[Request, ...], ...]
    is_placed: bool  # arrival times are on one clock already

    def requests(self) -> list[Request]:
        """All requests by arrival."""
        return sorted((r for session in self.sessions for r in session), key=lambda r: r.at)

    def limited(self, requests: int | None) -> "Trace":
        """The sessions of the first `requests` requests of the file, the last one cut."""
        if requests is None:
            return self
        kept, left = [], requests
        for session in self.sessions:
            if left <= 0:
                break
            kept.append(session[:left])
            left -= len(kept[-1])
        return replace(self, sessions=tuple(kept))


def joined(runs: Iterable[tuple[int, int]]) -> tuple[Run, ...]:
    """`runs` with neighbours that could be one made one."""
    out: list[Run] = []
    for first, count in runs:
        if out and out[-1][0] + out[-1][1] == first:
            out[-1] = (out[-1][0], out[-1][1] + count)
        elif count:
            out.append((first, count))
    return tuple(out)


def runs_of(ids: Iterable[int]) -> Iterator[Run]:
    """A list of block names as runs."""
    start: int | None = None
    last = 0
    for name in ids:
        if start is not None and name == last + 1:
            last = name
            continue
        if start is not None:
            yield start, last - start + 1
        start = last = name
    if start is not None:
        yield start, last - start + 1


def shared_blocks(a: tuple[Run, ...], b: tuple[Run, ...]) -> int:
    """Length of the common prefix of two paths, in blocks."""
    total = 0
    for (first_a, count_a), (first_b, count_b) in zip(a, b, strict=False):
        if first_a != first_b:
            break
        total += min(count_a, count_b)
        if count_a != count_b:
            break
    return total
