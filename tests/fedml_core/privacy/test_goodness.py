"""Noise and samples against their claims: each test accepts what is right and rejects each sabotage (A10)."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from fedml_core.errors import PrivacyError
from fedml_core.privacy.goodness import (
    adds_up_p,
    binomial_sizes,
    even_p,
    noise_against,
    overlap_p,
    spread_p,
    unrelated_p,
)
from fedml_core.randomness import seeded

REJECT = 1e-6


def normal(*key: int | str, shape: tuple[int, int] = (4, 5000)) -> NDArray[np.float64]:
    return seeded(*key).standard_normal(shape)


def test_right_noise_is_accepted_two_hundred_times() -> None:
    # "a p-value below a level comes with at most that probability, up to the tests' large-sample forms, if the
    # claim is true."
    # "a p-value is that of the worst of its parts times their number, so that looking at many is paid for."
    # "a test that passes has found nothing; it does not prove the claim."
    p_values = [
        noise_against(normal("a", seed, shape=(3, 600)), normal("b", seed, shape=(3, 600))).p_value
        for seed in range(200)
    ]
    assert min(p_values) > 1e-4
    assert sum(p < 0.05 for p in p_values) <= 20  # 10 are expected, 3.1 is the standard deviation


@pytest.mark.parametrize("factor", [0.5, 0.9])
def test_too_little_noise_is_rejected(factor: float) -> None:
    # "half the noise, no noise, and noise that is used twice are rejected, in a few thousand numbers."
    test = noise_against(factor * normal("a"), normal("b"))
    assert test.p_value < REJECT
    assert test.ratio == pytest.approx(factor, rel=0.05)


def test_no_noise_is_rejected() -> None:
    assert noise_against(np.zeros((2, 500)), normal("b", shape=(2, 500))).p_value == 0.0


def test_more_noise_than_claimed_is_no_finding() -> None:
    assert noise_against(1.5 * normal("a"), normal("b")).p_value > REJECT


def test_noise_of_another_shape_is_rejected() -> None:
    assert noise_against(np.sign(normal("a")), normal("b")).shape < REJECT
    assert noise_against(seeded("a").laplace(size=(4, 5000)) / 2**0.5, normal("b")).p_value < REJECT


def test_noise_that_is_not_refreshed_is_rejected() -> None:
    once = normal("a", shape=(1, 500))
    assert noise_against(np.repeat(once, 2, axis=0), normal("b", shape=(2, 500))).between < REJECT


def test_the_same_seed_for_each_layer_is_rejected() -> None:
    # Layers of 4096, 640, 64 and 10 parameters, as of a small network: the second repeats the first one's beginning.
    drawn = normal("a", shape=(3, 4096))
    layers = np.concatenate([drawn, drawn[:, :640], drawn[:, :64], drawn[:, :10]], axis=1)
    test = noise_against(layers, normal("b", shape=layers.shape))
    assert test.within < REJECT
    assert test.too_little > 1e-3


def test_noise_that_is_none_is_refused() -> None:
    with pytest.raises(PrivacyError, match="at least 2 draws"):
        noise_against(np.zeros((1, 5)), np.zeros((2, 5)))
    with pytest.raises(PrivacyError, match="finite"):
        noise_against(np.full((2, 5), np.nan), np.ones((2, 5)))


def test_cohorts_of_coins_are_accepted_and_cohorts_of_one_size_are_not() -> None:
    # "sizes that are all alike are rejected, in a few dozen rounds of a cohort of ten or more."
    sizes = [int(size) for size in seeded("sizes").binomial(200, 0.1, size=400)]
    assert binomial_sizes(sizes, 200, 0.1).p_value > 1e-3
    assert binomial_sizes(sizes, 200, 0.13).p_value < REJECT
    assert binomial_sizes([20] * 40, 200, 0.1).p_value < REJECT
    assert binomial_sizes([201, 20], 200, 0.1).p_value == 0.0
    test = binomial_sizes(sizes, 200, 0.1)
    assert sum(test.observed) == 400
    assert sum(test.expected) == pytest.approx(400)
    with pytest.raises(PrivacyError, match="at least 2 cohort sizes"):
        binomial_sizes([20], 200, 0.1)


def test_a_shuffled_order_is_seen_in_who_comes_back() -> None:
    # "a shuffled order, in which nobody comes twice in an epoch, is rejected as soon as a few dozen returns
    # should have been seen."
    rows = seeded("coins").random((400, 200)) < 0.1
    honest = (rows[1:] & rows[:-1]).sum(axis=1)
    assert overlap_p(honest.tolist(), 200, 0.1) > 1e-3
    assert overlap_p([0] * 399, 200, 0.1) < REJECT
    assert overlap_p([10, 10], 10, 1.0) == 1.0
    assert overlap_p([10, 9], 10, 1.0) == 0.0


def test_rows_that_share_something_or_differ_in_strength_are_rejected() -> None:
    # "rows of which one is in part another, and rows of unequal strength, are rejected, in a few thousand
    # numbers; their common strength is not judged."
    honest = normal("rows", shape=(12, 1500))
    assert unrelated_p(honest) > 1e-3
    assert unrelated_p(7.0 * honest) == pytest.approx(unrelated_p(honest))
    shared = honest.copy()
    shared[9] = 0.5 * honest[2] + 0.75**0.5 * honest[9]
    assert unrelated_p(shared) < REJECT
    assert unrelated_p(honest * np.where(np.arange(12) == 5, 0.7, 1.0)[:, None]) < REJECT
    assert unrelated_p(np.cumsum(honest, axis=0)) < REJECT
    with pytest.raises(PrivacyError, match="at least 2 rows"):
        unrelated_p(honest[:1])
    with pytest.raises(PrivacyError, match="not all zero"):
        unrelated_p(np.zeros((3, 50)))


def test_unrelated_rows_are_accepted_two_hundred_times() -> None:
    p_values = [unrelated_p(normal("rows", seed, shape=(6, 500))) for seed in range(200)]
    assert min(p_values) > 1e-4
    assert sum(p < 0.05 for p in p_values) <= 20


def test_sums_of_one_draw_used_over_and_over_are_rejected() -> None:
    # "sums of one draw that is used over and over are rejected, in a few hundred numbers."
    single, fresh = normal("a", shape=(1, 300)), normal("b", shape=(4, 300)).sum(axis=0)
    assert adds_up_p(single, fresh, 4) > 1e-3
    assert adds_up_p(single, 4 * normal("c", shape=(1, 300)), 4) < REJECT
    p_values = [adds_up_p(normal("a", seed), normal("b", seed) * 2, 4) for seed in range(200)]
    assert min(p_values) > 1e-4
    with pytest.raises(PrivacyError, match="not all zero"):
        adds_up_p(single, np.zeros(5), 4)


def test_members_that_come_more_often_or_in_turn_are_rejected() -> None:
    # "some that come more often are rejected, and so is dealing out in turn, by which all come alike."
    came = seeded("even").binomial(200, 0.1, size=100)
    assert even_p(came, 200, 0.1) > 1e-3
    assert even_p(np.full(100, 20), 200, 0.1) < REJECT
    assert even_p(came + 30 * (np.arange(100) < 10), 200, 0.1) < REJECT
    with pytest.raises(PrivacyError, match="at least 2 members"):
        even_p([3], 200, 0.1)


def test_numbers_of_another_mean_or_spread_are_rejected() -> None:
    # "numbers of half or twice the variance, or a mean that is off by a deviation, are rejected, in a hundred."
    drawn = 5.0 + 3.0 * normal("spread", shape=(1, 200))
    assert spread_p(drawn, 5.0, 9.0) > 1e-3
    assert spread_p(drawn, 5.0, 4.5) < REJECT
    assert spread_p(drawn, 5.0, 18.0) < REJECT
    assert spread_p(drawn, 8.0, 9.0) < REJECT
    with pytest.raises(PrivacyError, match="at least 2 finite numbers"):
        spread_p([1.0], 0.0, 1.0)
