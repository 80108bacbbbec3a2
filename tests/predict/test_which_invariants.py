"""Whatever happens in whatever order: probabilities are ones, tables are bounded, tenants are apart."""

from math import inf, isfinite, nan

from hypothesis import given, settings
from hypothesis import strategies as st

from kvprefetch.predict.memory import RECENT, Tenant
from kvprefetch.predict.names import LONGEST
from kvprefetch.predict.which import Which

NAMES = st.sampled_from(["a.py", "b.py", "src/a.py", "test/test_a.py", "src/", "/", "", "x" * 600]) | st.text(
    max_size=8
)
TIMES = st.sampled_from([nan, inf, -inf, 0.0, -5.0, 1e300]) | st.floats(0, 1e5)
WHO = st.tuples(st.sampled_from("st"), st.sampled_from("tuv"), st.sampled_from("xy"))  # session, tenant, user
EVENTS = st.lists(st.tuples(st.booleans(), WHO, NAMES, st.sampled_from(["read", "edit", ""]), TIMES), max_size=40)


def happen(which: Which, event: tuple[bool, tuple[str, str, str], str, str, float]) -> None:
    is_use, (session, tenant, user), name, kind, at = event
    if is_use:
        which.used(session, tenant, user, name, kind, at)
    else:
        which.signalled(session, tenant, user, kind, name, at)


def is_bounded(tenant: Tenant, contexts: int) -> bool:
    tables = (tenant.after_one, tenant.after_two, tenant.user_after, tenant.together, tenant.signals, tenant.analogies)
    return (
        len(tenant.known) == len(tenant.names.ordered) <= contexts
        and all(len(table.rows) <= contexts for table in tables)
        and all(len(row.counts) <= table.width for table in tables for row in table.rows.values())
        and all(len(s.recent.order) <= RECENT and len(s.burst) <= RECENT for s in tenant.sessions.values())
        and all(len(s.named) <= 12 and len(s.stems.counts) <= 12 for s in tenant.sessions.values())
    )


@settings(max_examples=60, deadline=None)
@given(EVENTS, TIMES)
def test_any_events_in_any_order(
    events: list[tuple[bool, tuple[str, str, str], str, str, float]], asked: float
) -> None:
    which = Which(max_tenants=2, max_contexts=5)
    for event in events:
        for _ in range(1 + (event[2] == "a.py")):  # some come twice
            happen(which, event)
        session, tenant, user = event[1]
        said = which.predictions(session, tenant, user, asked, limit=1000)
        assert all(0 <= p.probability <= 1 and len(p.context) <= LONGEST for p in said)
        assert sum(p.probability for p in said) <= 1 + 1e-9
        assert len({p.context for p in said}) == len(said)
        assert all(0 <= low <= middle <= high for low, middle, high in (p.gap_s for p in said))
        assert said[:5] == which.predictions(session, tenant, user, asked)
        assert 0 <= which.use_within(session, tenant, asked, asked) <= 1
    assert isfinite(which.now)
    assert len(which.tenants) <= 2
    assert all(is_bounded(tenant, 5) for tenant in which.tenants.values())


@settings(max_examples=40, deadline=None)
@given(EVENTS)
def test_nothing_of_one_tenant_is_read_in_another(
    events: list[tuple[bool, tuple[str, str, str], str, str, float]],
) -> None:
    """With other names for all that the other tenants do, this one's predictions stay the same to the last digit."""

    def foreseen(prefix: str) -> list[object]:
        which, said = Which(max_contexts=5), list[object]()
        for is_use, (session, tenant, user), name, kind, at in events:
            hidden = name if tenant == "t" or not name or len(name) > LONGEST else prefix + name
            happen(which, (is_use, (session, tenant, user), hidden, kind, at))
            said += which.predictions("s", "t", "x", at, limit=1000)
        return said

    one, other = foreseen("secret/"), foreseen("hidden/")
    assert one == other
    assert "secret" not in repr(one)


def test_a_million_contexts_in_one_session_are_within_bounds() -> None:
    """Hundreds of times the tables' size; a million are the same, only longer."""
    which = Which(max_contexts=20)
    for i in range(6_000):
        which.used("s", "t", "u", f"folder{i % 91}/file{i}.py", "read", float(i))
    assert is_bounded(which.tenants["t"], 20)
    assert len(which.truth.cells) <= which.truth.max_cells
    assert len(which.mixture.gates) <= which.mixture.max_gates
