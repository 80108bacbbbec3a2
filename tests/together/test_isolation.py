"""What one tenant can learn of another's prompts: nothing, on any surface; and what it can learn besides.

The attacks are those of `bench/isolation.py`, on a real worker and service. Each is run a second time where isolation
is taken out: an attack that finds nothing there either would prove nothing here.
"""

import random
from collections.abc import Callable
from hashlib import sha256

import pytest
from isolation import attacked, auc_of, coins, figures, is_good
from isolation_auc import of_scores, of_sights
from isolation_probes import (
    SECONDS,
    Probe,
    ask,
    ask_later,
    busy,
    busy_within_guarantee,
    errors,
    hint,
    member,
    public_use,
    stats,
)

from kvprefetch.cache.commons import Commons, Owner
from kvprefetch.cache.evict import Demand
from kvprefetch.cache.keys import BlockKey, Scope
from kvprefetch.cache.misses import explain
from kvprefetch.cache.pool import BlockPool
from kvprefetch.cache.sequence import PagedSequence
from kvprefetch.cache.shares import OPERATOR

BLOCK = 4


# -- on a worker -------------------------------------------------------------------------------------------
EXACT = {"tokens", "arena_tokens", "errors"}
"""Surfaces that do not depend on time at all: every probe looks the same."""


@pytest.mark.parametrize("attack", [ask, ask_later, hint, stats, errors])
def test_an_attacker_learns_nothing_of_what_another_has_sent_and_would_without_isolation(attack: Probe) -> None:
    isolated = attacked(attack, 80, seed=1)
    for surface, auc in isolated.items():
        if surface in EXACT:
            assert (auc.low, auc.area, auc.high) == (0.5, 0.5, 0.5), surface
        elif not surface.endswith(SECONDS):
            assert abs(auc.area - 0.5) < 0.25, surface
    broken = attacked(attack, 40, seed=1, broken=True)
    assert all(auc.low > 0.6 for surface, auc in broken.items() if not surface.endswith((SECONDS, "steps"))), broken


@pytest.mark.parametrize(
    ("attack", "shows"),
    [(busy, True), (busy_within_guarantee, False), (member, True), (public_use, False)],
)
def test_what_the_readme_says_is_shown_is_shown_and_no_more(attack: Probe, shows: bool) -> None:
    ((_, auc),) = attacked(attack, 20, seed=1).items()
    assert auc.area == (1.0 if shows else 0.5)


# -- in a pool, as often as the figures ask for ------------------------------------------------------------
def private(tenant: str) -> BlockKey:
    return sha256(tenant.encode()).digest()


def one_for_all(tenant: str) -> BlockKey:
    return b"one root"


def probed(probes: int, root: Callable[[str], BlockKey]) -> tuple[list[bool], list[object]]:
    """A victim sends what the attacker looks for or another text, behind a public beginning or not."""
    source, pool, commons = random.Random(3), BlockPool(40), Commons()
    pool.on_evict = lambda block, rule: commons.forget([block.key])
    public = (b"public root",)

    def serve(tenant: str, tokens: list[int], now: float) -> object:
        owner = Owner(root(tenant), tenant, Scope.PRIVATE, public, commons)
        sequence = PagedSequence(pool, owner, tokens, BLOCK)
        sequence.settle()
        found = explain(pool, sequence.keys, len(pool.match(sequence.keys)), BLOCK, borrowed=sequence.borrowed)
        sequence.open(len(tokens), Demand(tenant, speculative=False, now=now))
        sight = sequence.written, sorted((reason.value, blocks) for reason, blocks in found.misses.items())
        sequence.complete(len(tokens))
        pool.touch(sequence.blocks[: sequence.shared], now, "", tenant)
        sequence.close()
        return str(sight)

    def warm(tokens: list[int], now: float) -> None:
        operator = Owner(public[0], OPERATOR, Scope.PUBLIC, (), commons)
        sequence = PagedSequence(pool, operator, tokens, BLOCK)
        sequence.open(len(tokens), Demand(OPERATOR, speculative=True, now=now))
        sequence.complete(len(tokens), speculative_until=now + 1e9)
        sequence.close()

    bits, sights = coins(probes, source), []
    handbook = [source.randrange(500) for _ in range(2 * BLOCK)]
    for at, bit in enumerate(bits):
        now = float(at)
        if at % 50 == 0:
            warm(handbook, now)
        beginning = handbook if source.random() < 0.5 else []
        wanted, other = ([*beginning, *(source.randrange(500) for _ in range(3 * BLOCK))] for _ in range(2))
        serve("victim", wanted if bit else other, now)
        kept = source.randint(1, len(wanted) // BLOCK) * BLOCK
        sights.append(serve("attacker", [*wanted[:kept], 501, 501, 501, 501], now))
    pool.check()
    return bits, sights


def test_ten_thousand_probes_of_a_pool_tell_what_another_has_sent_no_better_than_a_coin() -> None:
    bits, sights = probed(10_000, private)
    auc = of_sights(bits, sights)
    assert auc.low <= 0.5 <= auc.high
    assert auc.half_width <= 0.02
    broken = of_sights(*probed(1_000, one_for_all))
    assert broken.low > 0.9


# -- the area ----------------------------------------------------------------------------------------------
def test_the_area_of_separate_of_equal_and_of_mixed_scores() -> None:
    bits = [True, True, False, False]
    assert of_scores(bits, [3, 4, 1, 2]).area == 1.0
    assert of_scores(bits, [1, 1, 2, 2]).area == 0.0
    assert of_scores(bits, [5, 5, 5, 5]) == of_scores(bits, [0, 0, 0, 0])
    assert of_scores(bits, [5, 5, 5, 5]).area == 0.5
    assert of_scores(bits, [1, 3, 2, 0]).area == 0.75


def test_its_variance_is_delongs() -> None:
    """Worked by hand: placements of the ones 1, 0.5; of the zeros 0.5, 1."""
    auc = of_scores([True, True, False, False] * 50, [3, 1, 2, 0] * 50)
    variance = 2 * 0.25**2 * (100 / 99) / 100
    assert (auc.area, auc.half_width) == (0.75, pytest.approx(2.5758 * variance**0.5, 1e-3))


def test_ninety_nine_of_a_hundred_intervals_of_a_coin_hold_a_half() -> None:
    source, held = random.Random(5), 0
    for _ in range(400):
        bits = coins(200, source)
        auc = of_scores(bits, [source.random() for _ in bits])
        held += auc.low <= 0.5 <= auc.high
    assert held >= 386


def test_sights_are_not_judged_by_what_was_learnt_from_themselves() -> None:
    bits = coins(400, random.Random(6))
    assert of_sights(bits, list(range(400))).area == 0.5, "each is seen once"
    assert of_sights(bits, [bit if at % 2 else None for at, bit in enumerate(bits)]).area > 0.7


def test_coins_are_balanced_in_both_halves_and_shuffled() -> None:
    bits = coins(1_000, random.Random(7))
    assert (sum(bits[:500]), sum(bits[500:])) == (250, 250)
    assert bits != coins(1_000, random.Random(8))


def test_the_figures_are_the_widest_ends_and_a_control_that_fails_is_told() -> None:
    def row(kind: str, surface: str, low: float, high: float) -> dict[str, object]:
        return {"kind": kind, "surface": surface, "auc": (low + high) / 2, "low": low, "high": high}

    rows = [row("content", "a", 0.5, 0.5), row("content", "b_seconds", 0.49, 0.515), row("control", "a", 0.9, 1.0)]
    assert figures(rows) == {"attack_auc_interval_low": 0.49, "attack_auc_interval_high": 0.515}
    assert is_good(rows)
    assert not is_good([*rows, row("content", "c", 0.51, 0.53)])
    assert not is_good([*rows, row("content", "c", 0.47, 0.53)])
    assert not is_good([*rows, row("control", "c", 0.4, 0.6)])
    assert auc_of("x_seconds", [True, True, False, False], [1, 2, 3, 4]).area == 1.0
