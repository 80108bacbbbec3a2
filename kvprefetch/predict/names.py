"""Contexts by name: what lies beside one, what is about the same subject, and which are named in a text.

Names are paths in the common case; any other name is a path of one part. Bounded by the owner.
"""

import re
from bisect import bisect_left, insort

_WORDS = re.compile(r"[^\s\"'`|;,()=:<>*]+")
_TEXT = 2000  # characters of a text that are looked at
_NAMED = 6


class Names:
    """Known names in order; adding and dropping cost O(log n) and a move within one list."""

    def __init__(self) -> None:
        self.ordered: list[str] = []
        self.stems: dict[str, list[str]] = {}  # ordered
        self.bases: dict[str, list[str]] = {}
        self.parts: dict[str, tuple[str, str, str]] = {}  # folder, last part, what follows the last dot

    def add(self, name: str) -> None:
        """A name not yet known."""
        insort(self.ordered, name)
        insort(self.stems.setdefault(stem(name), []), name)
        insort(self.bases.setdefault(base(name), []), name)
        self.parts[name] = folder(name), base(name), ending(name)

    def drop(self, name: str) -> None:
        """A known name is forgotten."""
        del self.parts[name]
        del self.ordered[bisect_left(self.ordered, name)]
        for index, key in ((self.stems, stem(name)), (self.bases, base(name))):
            index[key].remove(name)
            if not index[key]:
                del index[key]

    def after(self, name: str, count: int) -> list[str]:
        """The next ones in order."""
        at = bisect_left(self.ordered, name)
        at += at < len(self.ordered) and self.ordered[at] == name
        return self.ordered[at : at + count]

    def before(self, name: str, count: int) -> list[str]:
        """The ones before it in order, the nearest first."""
        at = bisect_left(self.ordered, name)
        return self.ordered[max(at - count, 0) : at][::-1]

    def alike(self, name: str, count: int) -> tuple[list[str], list[str]]:
        """Others about the same subject: the next ones in order, and the ones before."""
        same = self.stems.get(stem(name), [])
        at = bisect_left(same, name)
        here = at < len(same) and same[at] == name
        return same[at + here : at + here + count], same[max(at - count, 0) : at]

    def named_in(self, text: str) -> tuple[str, ...]:
        """Known names that a text mentions, as the command of a tool call mentions a file."""
        found: list[str] = []
        for word in _WORDS.findall(text[:_TEXT])[-32:]:
            tail = word.lstrip("./")
            for name in self.bases.get(base(tail), ())[-16:] if tail else ():
                known = name.lstrip("./")
                if (known.endswith(tail) or tail.endswith(known)) and name not in found:
                    found.append(name)
        return tuple(found[-_NAMED:])


def base(name: str) -> str:
    """Its last part."""
    return name[name.rfind("/") + 1 :]


def folder(name: str) -> str:
    """All but its last part."""
    return name[: max(name.rfind("/"), 0)]


def ending(name: str) -> str:
    """What follows the last dot."""
    return name[name.rfind(".") + 1 :]


def stem(name: str) -> str:
    """What it is about, whether it is the thing, its test or its notes."""
    subject = base(name).partition(".")[0].lower()
    return subject.removeprefix("test_").removesuffix("_test").removeprefix("_").removesuffix("s")
