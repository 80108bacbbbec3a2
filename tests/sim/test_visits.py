"""Who opens what and when, and which text a file has then."""

from itertools import pairwise

import pytest

from kvprefetch.sim.arrivals import Signals
from kvprefetch.sim.events import Event
from kvprefetch.sim.trace import shared_blocks
from kvprefetch.sim.visits import BLOCK, CHARS_PER_TOKEN, Visit, cold, draw_openings, place_visits

FILE = 10 * BLOCK * CHARS_PER_TOKEN


def used(context: str, kind: str = "M", session: str = "s", tenant: str = "ann", at: float = 0.0) -> Event:
    return Event(tenant, "u", session, kind, at, context, chars=FILE)


def visits(*events: Event, seed: int = 0) -> list[Visit]:
    return place_visits(events, 4.0, seed)


def test_a_file_is_opened_at_least_two_seconds_before_the_question() -> None:
    placed = visits(*(used(f"f{n}") for n in range(5000)))
    assert min(v.request.at - v.opened for v in placed) >= 2.0 - 1e-9
    dwells = sorted(v.request.at - v.opened for v in placed)
    assert dwells[2500] == pytest.approx(20, rel=0.1)
    assert all(later.opened > earlier.request.at for earlier, later in pairwise(placed))


@pytest.mark.parametrize("seed", range(5))
def test_an_edit_keeps_what_lies_before_it(seed: int) -> None:
    first, second = visits(used("f", "A"), used("f", "M"), seed=seed)
    kept = shared_blocks(first.request.path, second.request.path)
    assert 0 <= kept < 10
    assert second.request.blocks == 10
    assert first.after == second.request.path
    assert (first.is_new, second.is_new) == (True, False)


def test_what_is_only_read_stays_as_it_is() -> None:
    first, second = visits(used("f", "Read"), used("f", "Read"))
    assert first.request.path == first.after == second.request.path


def test_what_follows_on_a_deletion_is_another_file() -> None:
    _, deleted, again = visits(used("f", "A"), used("f", "D"), used("f", "A"))
    assert deleted.after == ()
    assert again.is_new
    assert shared_blocks(deleted.request.path, again.request.path) == 0


def test_tenants_share_no_text() -> None:
    one, other = visits(used("f", "A"), used("f", "A", session="t", tenant="bob"))
    assert shared_blocks(one.request.path, other.request.path) == 0


def test_a_tenants_sessions_keep_their_order() -> None:
    events = [used("f", session=f"s{n}", tenant=tenant, at=n) for n in range(50) for tenant in ("ann", "bob")]
    starts: dict[str, list[float]] = {}
    for visit in sorted(visits(*events, seed=3), key=lambda v: int(v.request.session.partition("|s")[2])):
        starts.setdefault(visit.request.tenant, []).append(visit.opened)
    assert all(times == sorted(times) and len(times) == 50 for times in starts.values())


def test_the_same_seed_draws_the_same() -> None:
    events = [used(f"f{n % 7}", session=f"s{n % 5}", at=n) for n in range(50)]
    assert visits(*events, seed=1) == visits(*events, seed=1)
    assert visits(*events, seed=1) != visits(*events, seed=2)


def test_openings_are_as_good_as_asked() -> None:
    placed = visits(*(used(f"f{n % 9}", session=f"s{n % 40}", at=n) for n in range(2000)))
    openings = draw_openings(placed, Signals(recall=0.5, precision=0.25), seed=0)
    true = {(v.request.session, v.context, v.opened) for v in placed}
    hits = sum((o.session, o.context, o.at) in true for o in openings)
    assert hits == pytest.approx(1000, rel=0.1)
    assert hits / len(openings) == pytest.approx(0.25, abs=0.01)
    nothing_true = draw_openings(placed, Signals(recall=1, precision=0), seed=0)
    assert nothing_true
    assert not any((o.session, o.context, o.at) in true for o in nothing_true)


def test_cold_visits_share_nothing() -> None:
    found = cold(visits(used("f", "Read"), used("f", "Read")))
    assert shared_blocks(found[0].request.path, found[1].request.path) == 0
    assert [v.request.blocks for v in found] == [10, 10]
