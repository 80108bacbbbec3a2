"""Sessions dealt to tenants, and a tenant that floods."""

import json
from collections import Counter
from pathlib import Path

import pytest

from kvprefetch.errors import TraceError
from kvprefetch.sim.tenants import LEAD_S, WINDOW_S, Dealing, Flood, deal, read_profiles, working_set
from kvprefetch.sim.trace import Request, Trace

STEADY = (1.0,) * 300
TOOLS = -5_000


def session(name: str, first: int, turns: int = 4) -> tuple[Request, ...]:
    """A session of ten minutes between turns, which begins with the same tools as all others."""
    return tuple(
        Request(name, "nobody", 600.0 * n, 64 * (n + 3), 10, 1.0, ((TOOLS, 2), (first, n + 1))) for n in range(turns)
    )


TRACE = Trace(64, tuple(session(f"s{n}", n << 32) for n in range(20)), is_placed=False)


def blocks_of(trace: Trace) -> dict[str, set[int]]:
    """By tenant, the names of all first blocks of runs."""
    found: dict[str, set[int]] = {}
    for request in trace.requests():
        found.setdefault(request.tenant, set()).update(first for first, _ in request.path)
    return found


def test_everyone_has_sessions_and_nobody_has_anothers_blocks() -> None:
    dealt = deal(TRACE, [STEADY] * 5, Dealing(tenants=5, concurrency=4.0, horizon_s=6 * 3600))
    mine = blocks_of(dealt)
    assert len(mine) == 5
    assert sum(map(len, mine.values())) == len(set().union(*mine.values()))


def test_a_tenants_sessions_share_its_tools_alone() -> None:
    dealt = deal(TRACE, [STEADY], Dealing(tenants=1, concurrency=4.0, horizon_s=6 * 3600))
    firsts = [tuple(run[0] for run in session[0].path) for session in dealt.sessions]
    assert len(firsts) > len(TRACE.sessions)  # some have come twice
    assert len({tools for tools, _ in firsts}) == 1
    assert len({own for _, own in firsts}) == len(firsts)


def test_about_so_many_are_alive() -> None:
    horizon = 48 * 3600.0
    dealt = deal(TRACE, [STEADY] * 3, Dealing(tenants=3, concurrency=8.0, horizon_s=horizon))
    alive = sum(session[-1].at - session[0].at for session in dealt.sessions) / horizon
    assert alive == pytest.approx(8.0, rel=0.1)
    assert all(0 <= request.at < horizon for request in dealt.requests())


def test_sessions_start_when_the_client_sends() -> None:
    windows = int((LEAD_S + 4 * 3600) / WINDOW_S)
    profile = (0.0,) * (windows - 6) + (1.0,) * 6
    dealt = deal(TRACE, [profile], Dealing(tenants=1, concurrency=4.0, horizon_s=4 * 3600))
    assert dealt.sessions
    assert all(session[0].at >= 3 * 3600 for session in dealt.sessions)


def test_tenants_come_as_often_as_their_clients() -> None:
    dealt = deal(TRACE, [STEADY, tuple(9 * rate for rate in STEADY)], Dealing(2, 40.0, 24 * 3600))
    few, many = sorted(Counter(session[0].tenant for session in dealt.sessions).values())
    assert many / few == pytest.approx(9, rel=0.3)


def test_the_same_seed_deals_the_same() -> None:
    profiles = [STEADY, (0.0, 5.0) * 150]
    assert deal(TRACE, profiles, Dealing(seed=3)) == deal(TRACE, profiles, Dealing(seed=3))
    assert deal(TRACE, profiles, Dealing(seed=3)) != deal(TRACE, profiles, Dealing(seed=4))


def test_a_trace_on_one_clock_keeps_its_times() -> None:
    placed = Trace(64, TRACE.sessions, is_placed=True)
    dealt = deal(placed, [STEADY] * 4, Dealing(tenants=4, horizon_s=1500.0))
    assert [request.at for request in dealt.requests()] == sorted([0.0, 600.0, 1200.0] * 20)
    assert len(blocks_of(dealt)) == 4
    thinned = deal(placed, [STEADY] * 4, Dealing(tenants=4, horizon_s=1500.0, kept=0.5))
    assert 0 < len(thinned.sessions) < len(placed.sessions)


def test_a_flood_asks_for_nothing_twice() -> None:
    flood = Flood(rate=0.5, start_s=100.0, end_s=1100.0, tokens=640)
    requests = flood.requests(64, seed=0)
    assert 400 < len(requests) < 600
    assert all(100.0 <= request.at < 1100.0 and request.blocks == 10 for request in requests)
    names = {first + n for request in requests for first, count in request.path for n in range(count)}
    assert len(names) == 10 * len(requests)


def test_the_working_set_is_what_sessions_under_way_have() -> None:
    one = Trace(1, (session("a", 0, turns=2),), is_placed=True)  # 3 blocks for 600 s, then 4 for a second
    assert working_set(one) == pytest.approx(64 * (3 * 600 + 4 * 1) / 601)
    assert working_set(Trace(1, (), is_placed=True)) == 0.0


@pytest.mark.parametrize(
    "row", [{"client": 1}, {"windows": [[0]]}, {"windows": [["a", "b", 0]]}, {"windows": [[0, 0]]}]
)
def test_what_holds_no_rates_is_refused(row: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "rates.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(TraceError, match="rates"):
        read_profiles(path)
