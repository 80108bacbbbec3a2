"""Which upstream takes a request: the one that has its session's context, then the least loaded. Pure."""

from collections.abc import Sequence
from typing import Protocol, TypeVar


class Place(Protocol):
    """What is looked at."""

    @property
    def name(self) -> str: ...
    @property
    def is_up(self) -> bool: ...
    @property
    def live(self) -> int: ...


P = TypeVar("P", bound=Place)


def choose(places: Sequence[P], wanted: str) -> P:
    """Of all that are up; where none is, of all, so that the caller is told why. `wanted` may be "".

    Equals are taken in the order of the settings.
    """
    up = [place for place in places if place.is_up] or list(places)
    for place in up:
        if place.name == wanted:
            return place
    return min(up, key=lambda place: place.live)
