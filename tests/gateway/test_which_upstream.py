"""Which engine takes a request."""

from dataclasses import dataclass

import hypothesis.strategies as st
from hypothesis import given

from kvprefetch.gateway.placement import choose


@dataclass(frozen=True)
class Engine:
    """As it is looked at."""

    name: str
    is_up: bool = True
    live: int = 0
    models: frozenset[str] = frozenset()


def test_a_session_stays_with_the_engine_that_has_its_context() -> None:
    assert choose([Engine("a"), Engine("b", live=9)], "b").name == "b"


def test_a_session_of_no_engine_goes_to_the_least_loaded() -> None:
    assert choose([Engine("a", live=2), Engine("b", live=1), Engine("c", live=1)], "").name == "b"


def test_an_engine_that_is_gone_is_no_longer_wanted() -> None:
    assert choose([Engine("a", live=3), Engine("b", is_up=False), Engine("c", live=1)], "b").name == "c"


def test_where_all_are_down_the_caller_is_told_by_the_one_that_it_would_have_had() -> None:
    assert choose([Engine("a", is_up=False), Engine("b", is_up=False)], "b").name == "b"


engines = st.builds(Engine, st.sampled_from("abcd"), st.booleans(), st.integers(0, 3))


@given(st.lists(engines, min_size=1, max_size=5, unique_by=lambda engine: engine.name), st.sampled_from(["", *"abcd"]))
def test_nobody_goes_to_an_engine_that_is_down_while_another_is_up(places: list[Engine], wanted: str) -> None:
    chosen = choose(places, wanted)
    assert chosen in places
    up = [place for place in places if place.is_up]
    assert chosen.is_up or not up
    if chosen.name != wanted:
        assert wanted not in {place.name for place in up}
        assert chosen.live == min(place.live for place in up or places)
