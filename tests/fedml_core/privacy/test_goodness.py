"""Noise and samples against their claims: each test accepts what is right and rejects each sabotage (A10)."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from fedml_core.errors import PrivacyError
from fedml_core.privacy.goodness import binomial_sizes, noise_against, overlap_p
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
