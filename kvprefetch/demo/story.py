"""The story: a developer opens files, reads, asks, asks again, moves on; some files are never asked about."""

import sysconfig
from dataclasses import dataclass
from pathlib import Path

SYSTEM = "You answer questions about the source file below, in one short paragraph.\n\n"


@dataclass(frozen=True)
class Open:
    """The developer opens a file and looks at it for `read_s` seconds."""

    file: str
    read_s: float


@dataclass(frozen=True)
class Ask:
    """A question about an opened file, after `pause_s` more seconds."""

    file: str
    question: str
    kind: str  # first | follow-up | return
    pause_s: float = 0.0


Step = Open | Ask

STORY: tuple[Step, ...] = (
    Open("string.py", 5.0),  # never asked about
    Open("copy.py", 9.0),
    Ask("copy.py", "What is the difference between copy and deepcopy here?", "first"),
    Ask("copy.py", "Which method would my class define to take part?", "follow-up", 3.0),
    Open("netrc.py", 3.0),  # never asked about
    Open("shlex.py", 12.0),
    Ask("shlex.py", "What does the posix flag change?", "first"),
    Open("fnmatch.py", 7.0),
    Ask("fnmatch.py", "How is a pattern turned into a regular expression?", "first"),
    Ask("copy.py", "How are recursive objects handled?", "return", 3.0),
)


def standard_library(story: tuple[Step, ...] = STORY) -> dict[str, str]:
    """The texts of the story's files, from this Python's standard library."""
    folder = Path(sysconfig.get_path("stdlib"))
    return {step.file: (folder / step.file).read_text(encoding="utf-8") for step in story}


def opening(text: str) -> list[dict[str, str]]:
    """The conversation about a file before anything was asked."""
    return [{"role": "system", "content": SYSTEM + text}]
