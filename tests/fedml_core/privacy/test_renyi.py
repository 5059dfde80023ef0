from __future__ import annotations

import numpy as np
import pytest
from dp_accounting.rdp import rdp_privacy_accountant

from fedml_core.privacy import renyi
from tests.fedml_core.privacy.accounting_cases import divergence, normal

# Trust: nobody is trusted here; these are functions of public numbers.
ORDERS = np.array([1.05, 1.5, 2.0, 2.5, 3.0, 7.0, 7.3, 16.0])
INTEGERS = np.array([2.0, 3.0, 4.0, 9.0, 16.0])
# A density is 0 for a float beyond 38, and the moments of order 16 lie below 16 / 0.7 + 12.
POINTS = np.arange(-15.0, 37.0, 1e-3)


# a curve is never below the divergence of its mechanism, up to rounding.
@pytest.mark.parametrize(("rate", "ratio"), [(0.01, 0.7), (0.1, 1.0), (0.5, 3.0), (0.004, 1.1)])
def test_poisson_gaussian_curve_is_the_exact_divergence(rate: float, ratio: float) -> None:
    without = normal(POINTS, 0.0)
    mixture = (1 - rate) * without + rate * normal(POINTS, 1 / ratio)
    both = [max(divergence(mixture, without, a), divergence(without, mixture, a)) for a in ORDERS]
    assert renyi.poisson_gaussian(rate, ratio)(ORDERS) == pytest.approx(both, rel=1e-8)


def test_poisson_gaussian_curve_of_tiny_noise_is_an_upper_bound() -> None:
    # Order 3 at ratio 0.01 is beyond the grid; ratio 0.02 costs less and is within it.
    orders = np.array([3.0])
    assert renyi.poisson_gaussian(0.1, 0.01)(orders) > renyi.poisson_gaussian(0.1, 0.02)(orders)
    assert renyi.poisson_gaussian(0.1, 0.01)(orders) <= renyi.gaussian(0.01)(orders)


@pytest.mark.parametrize("ratio", [0.3, 1.0, 5.0])
def test_laplace_curve_is_the_exact_divergence(ratio: float) -> None:
    points = np.arange(-150.0, 151.0, 1e-3)
    spread = np.exp(-np.abs(points) / ratio) / (2 * ratio) * 1e-3
    moved = np.exp(-np.abs(points - 1) / ratio) / (2 * ratio) * 1e-3
    exact = [divergence(spread, moved, a) for a in (1.5, 2.0, 7.3)]
    assert renyi.laplace(ratio)(np.array([1.5, 2.0, 7.3])) == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize(("rate", "ratio"), [(0.01, 0.5), (0.1, 1.0), (0.3, 3.0)])
def test_fixed_size_gaussian_curve_agrees_with_dp_accounting(rate: float, ratio: float) -> None:
    theirs = rdp_privacy_accountant._compute_rdp_sample_wor_gaussian(rate, ratio, ORDERS)
    assert renyi.fixed_size_gaussian(rate, ratio)(ORDERS) == pytest.approx(theirs, rel=1e-9)


@pytest.mark.parametrize(("rate", "ratio"), [(0.01, 1.0), (0.3, 2.0)])
def test_generic_amplification_is_never_below_the_exact_one_of_gaussian_noise(rate: float, ratio: float) -> None:
    inner = renyi.gaussian(ratio)
    assert np.all(renyi.poisson(rate, inner)(INTEGERS) >= renyi.poisson_gaussian(rate, ratio)(INTEGERS) * (1 - 1e-12))
    assert np.all(renyi.fixed_size(rate, inner)(INTEGERS) >= renyi.fixed_size_gaussian(rate, ratio)(INTEGERS))
    # Only terms of order 3 and more carry the generic factor of 3.
    assert renyi.poisson(rate, inner)(INTEGERS[:1]) == pytest.approx(renyi.poisson_gaussian(rate, ratio)(INTEGERS[:1]))
    assert np.all(renyi.poisson(rate, inner)(INTEGERS) < inner(INTEGERS))


def test_fixed_size_bounds_cover_a_replaced_unit_in_the_sample() -> None:
    rate, ratio = 0.2, 1.5
    apart = 0.5 / ratio
    first = (1 - rate) * normal(POINTS, 0.0) + rate * normal(POINTS, apart)
    second = (1 - rate) * normal(POINTS, 0.0) + rate * normal(POINTS, -apart)
    exact = np.array([divergence(first, second, a) for a in INTEGERS[:4]])
    assert np.all(renyi.fixed_size_gaussian(rate, ratio)(INTEGERS[:4]) >= exact)


def test_a_whole_sample_is_not_amplified() -> None:
    inner = renyi.gaussian(1.3)
    for whole in (renyi.poisson(1.0, inner), renyi.fixed_size(1.0, inner), renyi.fixed_size_gaussian(1.0, 1.3)):
        assert whole(INTEGERS) == pytest.approx(inner(INTEGERS))
    assert renyi.poisson_gaussian(1.0, 1.3)(ORDERS) == pytest.approx(inner(ORDERS))


# Between integer orders a curve that holds at integers alone is interpolated upwards.
def test_curves_at_integers_are_interpolated_from_above() -> None:
    inner = renyi.gaussian(0.8)
    known = renyi.at_integers(lambda orders: (orders - 1) * inner(orders.astype(float)))
    between = np.array([1.2, 2.5, 7.3])
    assert known(INTEGERS) == pytest.approx(inner(INTEGERS))
    assert np.all(known(between) > inner(between))


@pytest.mark.parametrize("delta", [1e-2, 1e-5, 1e-12])
@pytest.mark.parametrize("ratio", [0.1, 1.0, 10.0, 1000.0])
def test_epsilon_from_a_curve_agrees_with_dp_accounting(ratio: float, delta: float) -> None:
    curve = renyi.gaussian(ratio)(renyi.ORDERS)
    theirs, _ = rdp_privacy_accountant.compute_epsilon(renyi.ORDERS, curve, delta)
    assert renyi.epsilon_from(renyi.ORDERS, curve, delta) == pytest.approx(theirs, rel=1e-12)


def test_a_curve_that_is_nowhere_finite_has_no_epsilon() -> None:
    assert renyi.epsilon_from(ORDERS, np.full(len(ORDERS), np.inf), 1e-5) == np.inf
    assert renyi.epsilon_from(ORDERS, np.full(len(ORDERS), np.nan), 1e-5) == np.inf


def test_every_order_can_be_converted() -> None:
    assert np.all(np.diff(renyi.ORDERS) > 0) and renyi.ORDERS[0] > 1.01
