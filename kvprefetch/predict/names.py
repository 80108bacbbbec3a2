"""Contexts by name: what lies beside one, what is about the same subject, and which are named in a text.

Names are paths in the common case; any other name is a path of one part. Bounded by the owner: about 1 KB a name, and
of a long name its length besides.
"""

import re
from bisect import bisect_left, insort
from hashlib import blake2b
from typing import NamedTuple

_WORDS = re.compile(r"[^\s\"'`|;,()=:<>*]+")
LONGEST = 512
"""Characters of a name that is remembered."""
_TEXT = 2000  # characters of a text that are looked at
_NAMED = 6
_ALIKE = 16  # names with one last part that a mention of it may mean
_LATEST = 32  # words of a text that are looked at
_SHORTEST = 3  # characters of a subject that can be told from a mere word
_HOLE = "\0"  # where a shape has its subject


class Parts(NamedTuple):
    """What a name is made of, and what one that follows it has to do with it.

    An **analogy** carries over to other names, also to such as were never used: the same subject in another shape
    (`test/#_test.go` of `src/#.go`), another name beside it, the same name in another folder.
    """

    folder: str
    base: str  # its last part
    ending: str  # what follows the last dot
    stem: str  # what it is about, in one spelling
    subject: str  # the same as it is written; "" where it cannot be told
    shape: str  # the name with a hole where the subject is; "" with no subject

    def analogies(self) -> tuple[str, str, str]:
        """What analogies to this name are kept under, by their number; "" if there can be none."""
        return self.shape, self.base, self.folder

    def analogy(self, other: "Parts") -> tuple[int, str, str]:
        """(number, what it is kept under, what `other` is in these terms); kept under "" if there is none."""
        if self.shape and self.subject == other.subject:
            return 0, self.shape, other.shape
        if self.folder == other.folder:
            return 1, self.base, other.base
        if self.base == other.base:
            return 2, self.folder, other.folder
        return 0, "", ""

    def transferred(self, number: int, other: str) -> str:
        """The name that is to this one as `analogy` says."""
        if number == 0:
            return other.replace(_HOLE, self.subject)
        at, last = (self.folder, other) if number == 1 else (other, self.base)
        return f"{at}/{last}" if at else last


class Names:
    """Known names in order; adding and dropping cost O(log n) and a move within one list."""

    def __init__(self) -> None:
        self.ordered: list[str] = []
        self.stems: dict[str, list[str]] = {}  # ordered
        self.bases: dict[str, list[str]] = {}

    def add(self, name: str, parts: Parts) -> None:
        """A name not yet known, and what it is made of."""
        insort(self.ordered, name)
        insort(self.stems.setdefault(parts.stem, []), name)
        insort(self.bases.setdefault(parts.base, []), name)

    def drop(self, name: str, parts: Parts) -> None:
        """A known name is forgotten."""
        del self.ordered[bisect_left(self.ordered, name)]
        for index, key in ((self.stems, parts.stem), (self.bases, parts.base)):
            index[key].remove(name)
            if not index[key]:
                del index[key]

    def after(self, name: str, count: int) -> list[str]:
        """The next ones in order."""
        at = bisect_left(self.ordered, name)
        at += at < len(self.ordered) and self.ordered[at] == name
        return self.ordered[at : at + count]

    def alike(self, name: str, subject: str, count: int) -> tuple[list[str], list[str]]:
        """Others about the same subject, which is the stem of `name`: the next ones in order, and the two before."""
        same = self.stems.get(subject, [])
        at = bisect_left(same, name)
        here = at < len(same) and same[at] == name
        return same[at + here : at + here + count], same[max(at - 2, 0) : at]

    def named_in(self, text: str) -> tuple[str, ...]:
        """Known names that a text mentions, as the command of a tool call mentions a file."""
        found: list[str] = []
        for word in _WORDS.findall(text[:_TEXT])[-_LATEST:]:
            tail = word.lstrip("./")
            for name in self.bases.get(base(tail), ())[-_ALIKE:] if tail else ():
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


def parts_of(name: str) -> Parts:
    """See `Parts`."""
    about, last = stem(name), base(name)
    at = last.lower().find(about) if len(last.lower()) == len(last) else -1  # some letters grow in lower case
    if len(about) < _SHORTEST or at < 0 or _HOLE in name:
        return Parts(folder(name), last, ending(name), about, "", "")
    start = len(name) - len(last) + at
    end = start + len(about)
    return Parts(folder(name), last, ending(name), about, name[start:end], name[:start] + _HOLE + name[end:])


def short(name: str) -> str:
    """The name, or of a long one its beginning and a hash that tells it from others."""
    if len(name) <= LONGEST:
        return name
    return name[: LONGEST // 2] + "#" + blake2b(name.encode(errors="surrogatepass")).hexdigest()
