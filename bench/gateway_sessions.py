"""Agents' recorded sessions, made to fit a small model: `agent_calls_text.jsonl.gz`. Pure, but for reading the file.

Each call of a session is recorded with its whole prompt, which begins with the one before. What came new with a call is
one piece: here a user's message, cut to `SCALE` of its characters, of which the first are kept. Answers are the
engine's own, as long as the recorded ones would be after the same cut, up to `LONGEST_ANSWER` tokens. Gaps are the
recorded ones between the starts of two calls, about a second, and are kept as they are: the time of a tool, between
the end of an answer and the next call. As the recorded ones held the answer's time too, they are a little long.
"""

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path

FILE = "agent_calls_text.jsonl.gz"
SCALE = 0.25
LONGEST_ANSWER, CHARACTERS_OF_A_TOKEN = 32, 4
AROUND = 10  # tokens that a chat template says around two messages


@dataclass(frozen=True)
class Call:
    """What is new with it, how many tokens answer it, and how long until the next."""

    text: str
    answer_tokens: int
    gap_s: float


def recorded(file: Path) -> list[list[dict[str, str | float]]]:
    """The calls of each session, in their order; the sessions as they begin. Raises ValueError."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        rows = sorted((json.loads(line) for line in lines), key=lambda row: (row["session_id"], row["timestamp"]))
    sessions = [list(calls) for _, calls in groupby(rows, key=lambda row: row["session_id"])]
    return sorted(sessions, key=lambda calls: calls[0]["timestamp"])


def scaled(calls: list[dict[str, str | float]], scale: float = SCALE) -> list[Call]:
    """One session. Raises ValueError where a call's prompt does not begin with the one before."""
    found, before = [], ""
    later = [float(after["timestamp"]) - float(call["timestamp"]) for call, after in pairwise(calls)]
    for call, gap_us in zip(calls, [*later, 0.0], strict=True):
        prompt = str(call["input"])
        if not prompt.startswith(before):
            raise ValueError("a call's prompt does not begin with the one before")
        new = prompt[len(before) :]
        answer = int(len(str(call["output"])) * scale / CHARACTERS_OF_A_TOKEN)
        text = new[: max(int(len(new) * scale), 1)]
        found.append(Call(text, min(max(answer, 1), LONGEST_ANSWER), gap_us / 1e6))
        before = prompt
    return found


def fitting(calls: list[Call], limit: int, turns: int, tokens_of: Callable[[str], int]) -> list[Call]:
    """Its first `turns` calls, as long as prompt and answers fit into `limit` tokens."""
    used, found = 0, []
    for call in calls[:turns]:
        used += tokens_of(call.text) + call.answer_tokens + AROUND
        if used > limit:
            break
        found.append(call)
    return found
