"""Which upstream takes a request: the one that has its session's context, then the least loaded. Pure."""

from collections import OrderedDict
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
    @property
    def models(self) -> frozenset[str]: ...  # empty: not known


P = TypeVar("P", bound=Place)


def choose(places: Sequence[P], wanted: str, model: str = "") -> P:
    """Of all that are up; where none is, of all, so that the caller is told why. `wanted` and `model` may be "".

    One that is known not to have the model is taken only where no other may have it. Equals are taken in the order of
    the settings.
    """
    up = [place for place in places if place.is_up]
    fit = [place for place in up if not model or not place.models or model in place.models]
    gone = [place for place in places if model in place.models]
    among = fit or gone or up or places
    for place in among:
        if place.name == wanted:
            return place
    return min(among, key=lambda place: place.live)


class Kept:
    """At which upstream is what an engine keeps for its callers: responses and conversations, by tenant and id.

    Bounded: the `most` used last.
    """

    def __init__(self, most: int = 65_536) -> None:
        self.most = most
        self._places: OrderedDict[tuple[str, str], str] = OrderedDict()

    def put(self, tenant: str, number: str, place: str) -> None:
        """An id of "" is none."""
        if not number:
            return
        self._places[tenant, number] = place
        self._places.move_to_end((tenant, number))
        if len(self._places) > self.most:
            self._places.popitem(last=False)

    def find(self, tenant: str, number: str) -> str:
        """The upstream's name; "" where it is not known."""
        place = self._places.get((tenant, number), "")
        if place:
            self._places.move_to_end((tenant, number))
        return place
