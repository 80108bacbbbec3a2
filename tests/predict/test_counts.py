"""Counts that forget, bounded in rows and width."""

from kvprefetch.predict.counts import Counts, Row


def test_a_row_keeps_its_width_and_lets_the_lightest_go() -> None:
    row = Row()
    for context in ("a", "a", "b", "c"):
        row.add(context, 1.0, 2)
    assert row.counts == {"a": 2.0, "c": 1.0}
    assert row.total == 4.0


def test_with_growth_the_latest_outweighs_the_frequent() -> None:
    row = Row()
    for context in ("old",) * 5 + ("new",) * 2:
        row.add(context, 2.0, 8)
    assert row.counts["new"] > row.counts["old"]


def test_a_row_never_overflows_and_keeps_its_proportions() -> None:
    row = Row()
    for _ in range(10_000):
        row.add("a", 1.5, 4)
        row.add("b", 1.5, 4)
    assert 0 < row.counts["a"] < row.counts["b"] <= row.total < 1e14
    assert 1.4 < row.counts["b"] / row.counts["a"] < 1.6


def test_the_row_longest_unused_makes_room() -> None:
    counts = Counts(growth=1.0, width=4, max_rows=2)
    for key in ("first", "second", "first", "third"):
        counts.add(key, "x")
    assert list(counts.rows) == ["first", "third"]
    assert counts.row("second") is None
