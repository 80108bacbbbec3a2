"""Drawing tokens: each request for itself, within the limits that it set."""

from collections import Counter

import pytest
import torch

from kvprefetch.contexts import Sampling
from kvprefetch.engines.sampling import Sampler

LOGITS = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 4.5, -1.0, -2.0])


def draws(sampler: Sampler, count: int, logits: torch.Tensor = LOGITS) -> list[int]:
    return [sampler.draw(logits) for _ in range(count)]


def test_the_same_seed_draws_the_same_whatever_others_draw() -> None:
    alone = draws(Sampler(Sampling(temperature=1.0, seed=11)), 50)
    first, second = (Sampler(Sampling(temperature=1.0, seed=seed)) for seed in (11, 12))
    mixed = []
    for step in range(50):
        draws(second, step % 3)
        torch.rand(7)
        mixed.append(first.draw(LOGITS))
    assert mixed == alone
    assert draws(Sampler(Sampling(temperature=1.0, seed=12)), 50) != alone


def test_without_a_seed_two_requests_draw_differently_and_torchs_own_state_stays() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    flat = torch.zeros(512)
    first, second = (draws(Sampler(Sampling(temperature=1.0)), 20, flat) for _ in range(2))
    assert first != second
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(seed=3), Sampling(top_k=4, top_p=0.5)])
def test_temperature_zero_is_greedy(sampling: Sampling) -> None:
    assert draws(Sampler(sampling), 20) == [5] * 20


def test_draws_follow_the_probabilities() -> None:
    counts = Counter(draws(Sampler(Sampling(temperature=1.0, seed=1)), 4000))
    for token, share in enumerate(LOGITS.softmax(-1).tolist()):
        assert abs(counts[token] / 4000 - share) < 0.03


def test_top_k_keeps_the_k_likeliest() -> None:
    assert set(draws(Sampler(Sampling(temperature=5.0, top_k=3, seed=1)), 300)) == {3, 4, 5}
    assert set(draws(Sampler(Sampling(temperature=5.0, top_k=1, seed=1)), 30)) == {5}


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    """The three likeliest have 0.55, 0.33 and 0.12 of the whole, nearly."""
    assert set(draws(Sampler(Sampling(temperature=1.0, top_p=0.8, seed=1)), 300)) == {4, 5}
    assert set(draws(Sampler(Sampling(temperature=1.0, top_p=0.4, seed=1)), 30)) == {5}


def test_temperature_sharpens_and_flattens() -> None:
    cool, plain, hot = (Counter(draws(Sampler(Sampling(temperature=t, seed=1)), 1000))[5] for t in (0.2, 1.0, 10.0))
    assert cool > plain + 100 > hot + 200


def test_a_whole_number_is_a_temperature_too() -> None:
    drawn = draws(Sampler(Sampling(temperature=1, seed=1)), 50)
    assert drawn == draws(Sampler(Sampling(temperature=1.0, seed=1)), 50)


@pytest.mark.parametrize("seed", [0, -1, 2**63, 2**64, 10**30])
def test_any_whole_number_is_a_seed(seed: int) -> None:
    drawn = draws(Sampler(Sampling(temperature=1.0, seed=seed)), 20)
    assert drawn == draws(Sampler(Sampling(temperature=1.0, seed=seed)), 20)


def test_a_temperature_next_to_nothing_is_greedy_and_breaks_no_batch() -> None:
    logits = torch.tensor([1.0, 80.0, 2.0])
    assert Sampler(Sampling(temperature=1e-300)).draw(logits) == 1
