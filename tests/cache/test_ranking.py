"""Who has the least, whatever changed before."""

from math import inf

import hypothesis.strategies as st
from hypothesis import given

from kvprefetch.cache.ranking import Ranking

names = st.sampled_from(["ann", "bob", "cid", "dan"])
changes = st.lists(st.tuples(names, st.one_of(st.none(), st.integers(0, 3).map(float))), max_size=60)


@given(changes)
def test_the_first_has_the_least_and_of_equals_the_first_name(changes: list[tuple[str, float | None]]) -> None:
    ranking, values = Ranking(), dict[str, float]()
    for name, value in changes:
        if value is None:
            ranking.drop(name)
            values.pop(name, None)
        else:
            ranking.put(name, value)
            values[name] = value
        found = sorted((value, name) for name, value in values.items())
        assert ranking.first() == (found[0] if found else None)
        assert ranking.second() <= (found[1][0] if len(found) > 1 else inf)


def test_where_nothing_has_changed_the_second_is_known() -> None:
    ranking = Ranking()
    for value, name in enumerate(["ann", "bob", "cid", "dan"]):
        ranking.put(name, float(value))
    assert ranking.first() == (0.0, "ann")
    assert ranking.second() == 1.0


def test_what_holds_no_longer_takes_no_room() -> None:
    ranking = Ranking()
    for value in range(10_000):
        ranking.put("ann", -float(value))
        ranking.put("bob", float(value))
    assert len(ranking._heap) < 100
    assert ranking.first() == (-9999.0, "ann")
