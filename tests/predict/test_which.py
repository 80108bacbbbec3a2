"""Which context comes next: short stories."""

from math import inf, nan

import pytest

from kvprefetch.predict.rates import Shares
from kvprefetch.predict.which import Which


def play(which: Which, uses: str, session: str = "s", tenant: str = "t", user: str = "u") -> list[list[str]]:
    """Contexts separated by spaces are used ten seconds apart; what was foreseen before each."""
    foreseen = []
    for context in uses.split():
        foreseen.append([p.context for p in which.predictions(session, tenant, user, which.now)])
        which.used(session, tenant, user, context, "read", which.now + 10.0)
    return foreseen


def likeliest(which: Which, session: str = "s", tenant: str = "t", user: str = "u") -> str:
    return which.predictions(session, tenant, user, which.now)[0].context


def test_a_habit_is_foreseen() -> None:
    which = Which()
    play(which, "spec code test log " * 12)
    said = which.predictions("s", "t", "u", which.now)
    assert said[0].context == "spec"
    assert said[0].probability > 0.6
    assert said[0].outcomes > 10
    assert 5.0 < said[0].gap_s[1] < 20.0
    assert "followed" in said[0].because


def test_no_claim_is_surer_than_its_record_is_long() -> None:
    which = Which()
    for turn in range(12):
        play(which, "same")
        said = which.predictions("s", "t", "u", which.now)[0]
        assert said.probability <= (said.outcomes + 1) / (said.outcomes + 2) <= (turn + 1) / (turn + 2)


def test_claims_never_sum_to_more_than_one() -> None:
    which = Which(truth=Shares(start=50.0, prior=1e9))  # a record of claims that were all far too timid
    play(which, "a b c d e a c e b d")
    said = which.predictions("s", "t", "u", which.now)
    assert len(said) == 5
    assert sum(p.probability for p in said) <= 1.0


def test_a_new_session_starts_with_the_habits_of_its_user() -> None:
    which = Which()
    for day in range(8):
        play(which, "mail plan code", f"ann {day}", user="ann")
        play(which, "chat docs code", f"bob {day}", user="bob")
    for user, first in (("ann", "mail"), ("bob", "chat")):
        said = which.predictions("new", "t", user, which.now)
        assert first in [p.context for p in said[:3]], user


def test_what_a_signal_names_comes_first() -> None:
    which, turn, right = Which(), 1, 0
    play(which, "src/a.py src/b.py src/c.py src/d.py " * 3)
    for _ in range(40):
        turn = turn * 75 % 65537
        name = f"src/{'abcd'[turn % 4]}.py"
        which.signalled("s", "t", "u", "opened", name, which.now + 1)
        right += likeliest(which) == name
        play(which, name)
    assert right >= 36


def test_a_file_that_never_was_is_foreseen_by_analogy() -> None:
    which = Which()
    for name in ("pool", "cache", "router", "engine", "store"):
        play(which, f"src/{name}.go src/{name}_test.go main.go")
    play(which, "src/planner.go")
    assert "src/planner_test.go" in [p.context for p in which.predictions("s", "t", "u", which.now)]


def test_claims_come_true_as_often_as_they_say() -> None:
    """After each "ask" comes one of four by turns that are hard to foresee: claims of them must not sum to more."""
    which, claimed, true, turn = Which(), 0.0, 0, 1
    for _ in range(400):
        play(which, "ask")
        turn = turn * 75 % 65537
        context = "abcd"[turn % 4]
        for said in which.predictions("s", "t", "u", which.now):
            claimed += said.probability
            true += said.context == context
        play(which, context)
    assert claimed == pytest.approx(true, rel=0.1)


def test_a_new_tenant_borrows_what_experts_are_worth() -> None:
    """Where the last but one always comes back, a tenant's first moments profit from what others have shown."""
    story = " ".join(f"f{i} g{i} f{i} g{i}" for i in range(12))

    def hits(which: Which) -> int:
        return sum(f[:1] == [c] for f, c in zip(play(which, story, tenant="new"), story.split(), strict=True))

    taught = Which()
    for day in range(12):
        play(taught, " ".join(f"x{i} y{i} x{i} y{i}" for i in range(12)), session=f"day {day}", tenant="old")
    assert hits(taught) > hits(Which())


def test_a_new_tenant_is_not_hurt_by_others() -> None:
    """Others only ever return to what they just left; this one goes round and round."""
    taught = Which()
    for day in range(20):
        play(taught, " ".join(f"x{i} y{i} x{i} y{i}" for i in range(12)), session=f"day {day}", tenant="old")
    play(taught, "spec code test log " * 12, tenant="new")
    foreseen = play(taught, "spec code test log", tenant="new")
    assert [f[0] for f in foreseen] == ["spec", "code", "test", "log"]


def test_tenants_are_bounded_and_the_longest_quiet_is_forgotten() -> None:
    which = Which(max_tenants=2)
    for tenant in ("a", "b", "a", "c"):
        play(which, "x", tenant=tenant)
    assert list(which.tenants) == ["a", "c"]
    assert which.kind_of("s", "b") == ""


def test_asking_changes_nothing() -> None:
    which = Which()
    play(which, "a b c a b")
    before = repr((which.tenants.keys(), which.tenants["t"].sessions.keys(), which.now))
    for session, tenant in (("s", "t"), ("unknown", "t"), ("unknown", "nobody")):
        which.predictions(session, tenant, "u", 1e9)
        which.gap_s(session, tenant, 1e9)
        which.use_within(session, tenant, 1e9, 5.0)
    assert repr((which.tenants.keys(), which.tenants["t"].sessions.keys(), which.now)) == before
    assert which.predictions("unknown", "nobody", "u", 0.0) == []


@pytest.mark.parametrize("odd", [nan, inf, -inf, 49.0])
def test_a_time_that_tells_nothing_counts_as_the_latest(odd: float) -> None:
    which = Which()
    play(which, "a b c a b")
    which.used("s", "t", "u", "c", "read", odd)
    assert which.now == 50.0
    assert which.tenants["t"].sessions["s"].at == 50.0


def test_a_clock_that_was_set_back_holds() -> None:
    which = Which()
    which.used("s", "t", "u", "a", "read", 1e12)
    which.used("s", "t", "u", "b", "read", 1000.0)
    which.used("s", "t", "u", "c", "read", 1010.0)
    assert which.now == 1010.0
    assert which.gap_s("s", "t", 1010.0)[0] < inf


def test_a_very_long_name_is_not_remembered_but_its_use_counts() -> None:
    which = Which()
    play(which, "a b a")
    which.used("s", "t", "u", "x" * 1_000_000, "read", which.now + 10)
    assert which.kind_of("s", "t") == "read"
    assert "x" * 1_000_000 not in which.tenants["t"].known
    assert all(len(p.context) <= 512 for p in which.predictions("s", "t", "u", which.now, limit=1000))


def test_long_names_of_tenants_are_not_confused() -> None:
    which = Which()
    play(which, "secret other", tenant="x" * 2000 + "1")
    assert which.predictions("s", "x" * 2000 + "1", "u", which.now) != []
    assert which.predictions("s", "x" * 2000 + "2", "u", which.now) == []


def test_how_soon_is_known_after_some_gaps() -> None:
    which = Which()
    play(which, "a b " * 20)
    assert which.use_within("s", "t", which.now, 30.0) > 0.8
    assert which.use_within("s", "t", which.now, 1.0) < 0.3
    assert which.use_within("s", "t", which.now, nan) == 0.0
    assert which.use_within("unknown", "t", which.now, 30.0) == 0.0
