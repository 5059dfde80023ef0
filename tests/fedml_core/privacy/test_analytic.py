from __future__ import annotations

import math

import pytest
from dp_accounting import gaussian_mechanism

from fedml_core.errors import ConfigError
from fedml_core.privacy.analytic import (
    analytic_gaussian_delta,
    analytic_gaussian_epsilon,
    analytic_gaussian_sigma,
)

# Trust: nobody is trusted here; these are functions of public numbers.
RATIOS = (0.05, 0.3, 1.0, 3.0, 20.0)
DELTAS = (1e-2, 1e-5, 1e-9)
# What the oracle is solved to, over what ours may lie above.
SLACK = 1e-8


# an epsilon is never below the exact one, and above it by at most one part in 10^8.
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("delta", DELTAS)
def test_epsilon_is_the_exact_one(ratio: float, delta: float) -> None:
    exact = gaussian_mechanism.get_epsilon_gaussian(ratio, delta, 1e-14)
    assert exact * (1 - 1e-12) <= analytic_gaussian_epsilon(ratio, delta) <= exact * (1 + SLACK)


# A sigma is never below the exact one, and above it by at most one part in 10^8.
@pytest.mark.parametrize("epsilon", [0.01, 0.5, 4.0, 100.0])
@pytest.mark.parametrize("delta", DELTAS)
def test_sigma_is_the_exact_one(epsilon: float, delta: float) -> None:
    exact = gaussian_mechanism.get_sigma_gaussian(epsilon, delta, 1e-14)
    assert exact * (1 - 1e-12) <= analytic_gaussian_sigma(epsilon, delta) <= exact * (1 + SLACK)
    assert analytic_gaussian_sigma(epsilon, delta, 2.5) == pytest.approx(2.5 * exact, rel=SLACK)


def test_sigma_and_epsilon_undo_each_other() -> None:
    for epsilon in (0.1, 1.0, 10.0):
        sigma = analytic_gaussian_sigma(epsilon, 1e-6)
        assert analytic_gaussian_epsilon(sigma, 1e-6) <= epsilon * (1 + SLACK)
        assert analytic_gaussian_delta(epsilon, sigma) <= 1e-6
        assert analytic_gaussian_delta(epsilon, sigma * (1 - 1e-6)) > 1e-6


def test_what_a_delta_alone_covers_has_epsilon_zero() -> None:
    # Without epsilon, delta is the total variation, 2 F(1/2r) - 1.
    variation = math.erf(0.5 / 100 / math.sqrt(2))
    assert analytic_gaussian_delta(0.0, 100.0) == pytest.approx(variation, rel=1e-9)
    assert analytic_gaussian_epsilon(100.0, variation * 1.01) == 0.0
    assert analytic_gaussian_epsilon(100.0, variation * 0.99) > 0.0


def test_tail_bound_of_the_textbook_would_be_wrong_for_a_large_epsilon() -> None:
    textbook = math.sqrt(2 * math.log(1.25 / 1e-5)) / 50
    assert analytic_gaussian_epsilon(textbook, 1e-5) == pytest.approx(96.43, abs=0.01)


def test_tiny_and_huge_noise_have_finite_answers() -> None:
    # Far from the middle, epsilon is about 1 / 2r^2 + z(delta) / r.
    assert analytic_gaussian_epsilon(1e-3, 1e-5) == pytest.approx(0.5e6 + 4.2649e3, rel=1e-5)
    assert analytic_gaussian_epsilon(1e6, 1e-9) > 0.0


@pytest.mark.parametrize("delta", [0.0, 1.0, -1.0, math.nan])
def test_a_delta_out_of_range_is_refused(delta: float) -> None:
    for ask in (analytic_gaussian_epsilon, analytic_gaussian_sigma):
        with pytest.raises(ConfigError, match="delta must be > 0 and < 1"):
            ask(1.0, delta)
