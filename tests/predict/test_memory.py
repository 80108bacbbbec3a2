"""What is remembered of a tenant is bounded and in order."""

import tracemalloc

from kvprefetch.predict.memory import RECENT, TRAIL, Tenant


def test_a_session_remembers_its_latest_contexts_in_order() -> None:
    tenant = Tenant()
    session = tenant.session("s", "user")
    for i in range(RECENT + 5):
        tenant.used(session, f"f{i}", "read", 10.0 * i)
    tenant.used(session, "f10", "read", 1000.0)
    assert session.recent.order[-2:] == ["f28", "f10"]
    assert len(session.recent.order) == RECENT
    assert list(session.trail) == ["f25", "f26", "f27", "f28", "f10"][-TRAIL:]


def test_an_act_ends_with_a_pause() -> None:
    tenant = Tenant()
    session = tenant.session("s", "user")
    for name, at in (("a", 10.0), ("b", 10.5), ("c", 60.0)):
        tenant.used(session, name, "read", at)
    assert session.burst == {"c"}


def test_a_mention_is_remembered_until_it_is_used() -> None:
    tenant = Tenant()
    session = tenant.session("s", "user")
    for i, name in enumerate(("src/a.py", "src/b.py")):
        tenant.used(session, name, "read", float(i))
    tenant.observed(session, "grep", "src/a.py src/b.py", 3.0)
    tenant.observed(session, "edit", "", 4.0)
    assert session.named == ["src/a.py", "src/b.py"]
    tenant.used(session, "src/b.py", "read", 5.0)
    assert session.named == ["src/a.py"]


def test_the_context_longest_unused_is_forgotten_with_its_name() -> None:
    tenant = Tenant(max_contexts=3)
    session = tenant.session("s", "user")
    for i, name in enumerate(("a", "b", "c", "a", "d")):
        tenant.used(session, name, "read", float(i))
    assert list(tenant.known) == ["c", "a", "d"]
    assert tenant.names.ordered == ["a", "c", "d"]


def test_sessions_and_users_are_bounded() -> None:
    tenant = Tenant(max_contexts=10, max_sessions=3)
    for i in range(9):
        tenant.used(tenant.session(f"s{i}", f"u{i}"), "a", "read", float(i))
    assert list(tenant.sessions) == ["s6", "s7", "s8"]
    assert list(tenant.users) == ["u6", "u7", "u8"]


def test_what_follows_one_context_is_bounded() -> None:
    tenant = Tenant(max_contexts=100)
    session = tenant.session("s", "user")
    for i in range(3_000):
        tenant.used(session, "hub" if i % 2 else f"f{i % 83}", "read", float(i))
    assert {len(tenant.after_one.rows["hub"].counts), len(tenant.together.rows["hub"].counts)} == {16}


def test_bytes_stay_within_what_is_promised() -> None:
    contexts, sessions = 200, 40
    tracemalloc.start()
    tenant = Tenant(contexts, sessions)
    for i in range(20_000):
        who = i * 7 % 60
        session = tenant.session(f"session {who}", f"user {who}")
        if i % 3 == 0:
            tenant.observed(session, "grep", f"package/module/file_{i * 31 % 5000}.py", float(i))
        tenant.used(session, f"package/module/file_{i * i % 997}.py", "read", float(i))
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(tenant.known) == contexts
    assert taken < contexts * 6_000 + sessions * 14_000 + 50_000
