"""Each expert names what it should."""

import pytest

from kvprefetch.predict import experts
from kvprefetch.predict.memory import Session, Tenant


def story(*uses: str, gap: float = 10.0) -> tuple[Tenant, Session]:
    """Used one after the other in a session "s" of "user"."""
    tenant = Tenant()
    session = tenant.session("s", "user")
    for i, context in enumerate(uses):
        tenant.used(session, context, "read", 100.0 + gap * i)
    return tenant, session


def said_of(context: str, tenant: Tenant, session: Session) -> dict[str, float]:
    """Opinions on a context by name."""
    found, _ = experts.opinions_on(tenant, session)
    return {experts.NAMES[which]: strength for which, strength in found.get(context, [])}


@pytest.mark.parametrize(
    ("uses", "context", "opinion"),
    [
        (("a", "b", "c", "a", "b"), "c", "followed these two"),
        (("a", "b", "c", "a"), "b", "followed this one"),
        (("a", "b", "c", "a"), "b", "followed this one with this user"),
        (("a", "b"), "a", "used together"),
        (("a", "b"), "a", "recent in this session"),
        (("a", "b"), "a", "used lately in this session"),
        (("a", "b"), "a", "used lately by this user"),
        (("a", "b"), "a", "popular"),
        (("x/b.py", "x/a.py"), "x/b.py", "next by name"),
        (("y/b.py", "x/a.py"), "y/b.py", "of the same type"),
        (("x/b.py", "x/a.py"), "x/b.py", "in the same folder"),
        (("y/api.py", "x/api.py"), "y/api.py", "of the same name elsewhere"),
        (("test/test_api.py", "x/y.py", "src/api.py"), "test/test_api.py", "next of the same subject"),
        (("docs/api.md", "x/y.py", "src/api.py"), "docs/api.md", "earlier of the same subject"),
        (("docs/api.md", "x/y.py", "src/api.py"), "docs/api.md", "its subject used lately"),
        (("a", "b"), "a", "by its last use"),
        (("a", "b"), "a", "by the time of its last use"),
    ],
)
def test_an_opinion_is_given(uses: tuple[str, ...], context: str, opinion: str) -> None:
    assert said_of(context, *story(*uses))[opinion] > 0


def test_counts_speak_the_louder_the_more_they_saw() -> None:
    tenant, session = story("a", "b", "a", "b", "a", "b", "a", "c", "a")
    often, once = said_of("b", tenant, session), said_of("c", tenant, session)
    assert often["followed this one"] > once["followed this one"] > 0


def test_a_test_that_never_was_is_named_by_analogy() -> None:
    tenant, session = story("src/pool.go", "src/pool_test.go", "src/cache.go", "src/cache_test.go", "src/router.go")
    said = said_of("src/router_test.go", tenant, session)
    assert said["as others: same subject"] > 0
    assert said["never used"] == 1.0


def test_what_a_signal_names_is_a_candidate() -> None:
    tenant, session = story(*(f"{i}/x{i}.py" for i in range(60)))
    assert not said_of("20/x20.py", tenant, session)
    tenant.observed(session, "grep", "20/x20.py", 900.0)
    assert said_of("20/x20.py", tenant, session)["named by the latest signal"] > 0


def test_signals_foretell_what_followed_them() -> None:
    tenant, session = story("a", "b")
    for at in (200.0, 300.0):
        tenant.observed(session, "test failed", "", at)
        tenant.used(session, "log", "read", at + 1)
        tenant.used(session, "a", "read", at + 50)
    tenant.observed(session, "test failed", "", 400.0)
    assert said_of("log", tenant, session)["followed this signal"] > said_of("a", tenant, session).get(
        "followed this signal", 0.0
    )


def test_an_act_is_told_apart_from_what_came_before() -> None:
    tenant, session = story("z", "b", "a", "c", gap=0.1)
    assert "touched in this act" in said_of("a", tenant, session)
    assert "earlier by name in this act" in said_of("a", tenant, session)
    assert "earlier by name in this act" not in said_of("z", tenant, session)
    apart = said_of("a", *story("a", "b", gap=60.0))
    assert not {"touched in this act", "earlier by name in this act"} & apart.keys()


def test_nothing_is_said_of_an_empty_memory() -> None:
    found, none = experts.opinions_on(Tenant(), Session("user"))
    assert not found
    assert none


def test_what_is_named_first_stays_a_candidate() -> None:
    found = experts.Candidates()
    for i in range(200):
        found.say(f"f{i}", experts.POPULAR)
    assert list(found) == [f"f{i}" for i in range(80)]


def test_candidates_and_their_marks_are_bounded() -> None:
    tenant, session = story(*(f"{i % 7}/{i * 37 % 101}.py" for i in range(2_000)))
    found, _ = experts.opinions_on(tenant, session)
    assert len(found) <= 80
    assert all(len(opinions) < 40 for opinions in found.values())
