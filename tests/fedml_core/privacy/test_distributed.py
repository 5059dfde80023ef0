from __future__ import annotations

import math
from functools import reduce
from typing import Any

import numpy as np
import pytest

from fedml_core.errors import PrivacyError
from fedml_core.privacy import renyi
from fedml_core.privacy.accounting import epsilon_of
from fedml_core.privacy.distributed import discrete_gaussian_sum, rounded_l2, skellam_sum
from fedml_core.privacy.events import Mechanism, fold
from tests.fedml_core.privacy.accounting_cases import (
    Pmf,
    divergence,
    fixed_size,
    gaussian,
    integer_sum,
    poisson,
    repeated,
)

# Trust: `clients` must be the fewest honest clients whose noise is in the sum; whoever knows their own noise adds none.
KINDS = ("discrete-gaussian-sum", "skellam-sum")
CURVES = {"discrete-gaussian-sum": discrete_gaussian_sum, "skellam-sum": skellam_sum}
INTEGERS = np.array([2.0, 3.0, 5.0, 8.0])


def mechanism(event: dict[str, Any]) -> Mechanism:
    ((term, _),) = fold([event]).items()
    return term.parts[0][0]


def epsilon(event: dict[str, Any], adjacency: str = "add-or-remove-one") -> float:
    return epsilon_of([event], delta=1e-5, unit="client", adjacency=adjacency).epsilon


def exact_sum(name: str, noise: float, clients: int) -> Pmf:
    """Return the distribution of the sum of `clients` integer noises of deviation `noise`."""
    points = np.arange(-200, 201)
    if name == "discrete-gaussian-sum":
        one = np.exp(-0.5 * (points / noise) ** 2)
    else:
        half = np.array([math.exp(k * math.log(noise**2 / 2) - noise**2 / 2 - math.lgamma(k + 1)) for k in range(201)])
        one = np.convolve(half, half[::-1])
    return reduce(np.convolve, [one / one.sum()] * clients)


# a curve is never below the divergence of the sum with `clients` honest noises, whoever else is in it.
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("noise", "clients"), [(0.7, 3), (1.0, 2), (3.0, 4)])
def test_curve_is_never_below_the_exact_divergence_of_a_moved_sum(name: str, noise: float, clients: int) -> None:
    # One coordinate, one integer per unit: the rounded norm of 1.0 is at least 1, so a move by 1 is covered.
    event = integer_sum(name, clients=clients, dimension=1, l2=1.0, local_noise=noise, scale=1.0)
    total = exact_sum(name, noise, clients)
    exact = [divergence(total[1:], total[:-1], order) for order in INTEGERS]
    assert rounded_l2(1.0, 1.0, 1, math.exp(-0.5)) >= 1.0
    assert np.all(CURVES[name](mechanism(event), 1)(INTEGERS) >= exact)


# The bound of a rounded update is that of conditional rounding, for every update within the clip.
def test_rounded_norm_is_the_smaller_of_two_bounds() -> None:
    assert rounded_l2(1.0, 100.0, 16, 0.5) == pytest.approx(
        math.sqrt(100**2 + 4 + math.sqrt(2 * math.log(2)) * (100 + 2)), rel=1e-12
    )
    # With next to no probability of another draw, the bound is that of rounding every coordinate away from zero.
    assert rounded_l2(1.0, 100.0, 16, 1e-300) == 104.0


def test_any_rounding_that_is_accepted_is_within_the_bound() -> None:
    bound = rounded_l2(1.0, 10.0, 64, math.exp(-0.5))
    away = np.ceil(np.full(64, 10 / 8))
    assert float(np.linalg.norm(away)) <= 10.0 + 8.0 and bound < 10.0 + 8.0
    assert bound > 10.0


@pytest.mark.parametrize("name", KINDS)
def test_sixteen_bits_reproduce_the_reference_at_integer_orders(name: str) -> None:
    orders = np.arange(2.0, 100.0)
    curve = CURVES[name](mechanism(integer_sum(name)), 1)(orders)
    assert renyi.epsilon_from(orders, curve, 1e-5) == pytest.approx(4.7548, abs=5e-5)


@pytest.mark.parametrize("name", KINDS)
def test_sixteen_bits_cost_hardly_more_than_central_gaussian_noise(name: str) -> None:
    central = renyi.epsilon_from(renyi.ORDERS, renyi.gaussian(1.0)(renyi.ORDERS), 1e-5)
    # Finer orders than the reference's give 0.5 % less to the discrete Gaussian; Skellam is known at integers alone.
    assert central < epsilon(integer_sum(name)) <= 4.7549
    assert epsilon(integer_sum(name)) == pytest.approx(4.7548, rel=1e-2)


@pytest.mark.parametrize("name", KINDS)
def test_lost_noise_costs_what_less_noise_costs(name: str) -> None:
    costs = [epsilon(integer_sum(name, clients=clients)) for clients in (100, 90, 70, 50)]
    for cost, share in zip(costs, (1.0, 0.9, 0.7, 0.5), strict=True):
        at = math.sqrt(share)
        central = renyi.epsilon_from(renyi.ORDERS, renyi.gaussian(at)(renyi.ORDERS), 1e-5)
        assert central < cost == pytest.approx(central, rel=1e-2)


@pytest.mark.parametrize("name", KINDS)
def test_a_replaced_client_moves_the_sum_twice_as_far(name: str) -> None:
    fine = integer_sum(name, scale=1e6, ring_bits=32)
    doubled = renyi.epsilon_from(renyi.ORDERS, renyi.gaussian(0.5)(renyi.ORDERS), 1e-5)
    assert epsilon(fine, "replace-one") == pytest.approx(doubled, rel=1e-2)
    assert epsilon(fine, "replace-special") == epsilon(fine)


@pytest.mark.parametrize("name", KINDS)
def test_a_coarse_grid_costs_more(name: str) -> None:
    assert epsilon(integer_sum(name, scale=50.0)) > 1.05 * epsilon(integer_sum(name))


@pytest.mark.parametrize("name", KINDS)
def test_sampled_sums_cost_less_than_whole_ones_and_more_than_sampled_gaussian_noise(name: str) -> None:
    sampled = repeated(10, poisson(0.1, integer_sum(name)))
    central = epsilon(repeated(10, poisson(0.1, gaussian(1.0))))
    assert central < epsilon(sampled) < 0.5 * epsilon(repeated(10, integer_sum(name)))
    fixed = repeated(10, fixed_size(100, 10_000, integer_sum(name)))
    assert epsilon(fixed, "replace-one") < 0.5 * epsilon(repeated(10, integer_sum(name)), "replace-one")


def test_a_sampled_sum_under_replace_one_is_refused() -> None:
    with pytest.raises(PrivacyError, match="no Rényi curve is known for poisson sampling under replace-one"):
        epsilon(poisson(0.1, integer_sum(KINDS[0])), "replace-one")
