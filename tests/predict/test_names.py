"""Names: neighbours, subjects, mentions and analogies."""

from hypothesis import given
from hypothesis import strategies as st

from kvprefetch.predict.names import Names, parts_of, short

FILES = ("src/cache.py", "src/pool.py", "src/router.py", "test/test_pool.py", "docs/pool.md")


def known(*names: str) -> Names:
    found = Names()
    for name in names:
        found.add(name, parts_of(name))
    return found


def test_neighbours_come_in_order_and_without_the_name_itself() -> None:
    assert known(*FILES).after("src/cache.py", 2) == ["src/pool.py", "src/router.py"]
    assert known(*FILES).after("src/m.py", 1) == ["src/pool.py"], "a name that is not known has neighbours, too"


def test_a_subject_is_found_in_its_test_and_its_notes() -> None:
    later, earlier = known(*FILES).alike("src/pool.py", "pool", 6)
    assert (later, earlier) == (["test/test_pool.py"], ["docs/pool.md"])


def test_mentions_are_found_with_and_without_their_folder() -> None:
    names = known(*FILES)
    assert names.named_in("grep -n 'def f' ./src/pool.py | head") == ("src/pool.py",)
    assert names.named_in("cat router.py") == ("src/router.py",)
    assert names.named_in("nothing of the kind: ./// . ..") == ()
    assert names.named_in("other/pool.py") == (), "the same last part elsewhere is not meant"


def test_analogies_carry_over_to_names_that_were_never_used() -> None:
    for last, then, other, expected in (
        ("src/pool.go", "src/pool_test.go", "src/cache.go", "src/cache_test.go"),
        ("src/pool.py", "test/test_pool.py", "src/cache.py", "test/test_cache.py"),
        ("a/first.py", "a/second.py", "b/first.py", "b/second.py"),
        ("a/main.py", "b/main.py", "a/util.py", "b/util.py"),
        ("a/main.py", "main.py", "a/util.py", "util.py"),
    ):
        number, key, what = parts_of(last).analogy(parts_of(then))
        assert parts_of(other).analogies()[number] == key, last
        assert parts_of(other).transferred(number, what) == expected


def test_a_forgotten_name_leaves_nothing_behind() -> None:
    names = known(*FILES)
    for name in FILES:
        names.drop(name, parts_of(name))
    assert (names.ordered, names.stems, names.bases) == ([], {}, {})


def test_long_names_are_told_apart_by_more_than_their_beginning() -> None:
    one, two = "x" * 10_000 + "1", "x" * 10_000 + "2"
    assert short(one) != short(two)
    assert len(short(one)) < 513
    assert short("short") == "short"


@given(st.text("abs_/.", max_size=9) | st.text(max_size=9), st.text("abs_/.", max_size=9) | st.text(max_size=9))
def test_any_text_is_a_name_and_its_analogies_lead_back(last: str, then: str) -> None:
    number, key, what = parts_of(last).analogy(parts_of(then))
    if key and last != then:
        assert parts_of(last).transferred(number, what).strip("/") == then.strip("/")


@given(st.lists(st.text(max_size=12), unique=True, max_size=12), st.text(max_size=60))
def test_mentions_are_known_names(names: list[str], text: str) -> None:
    found = known(*names).named_in(text)
    assert set(found) <= set(names)
    assert len(found) == len(set(found)) <= 6
