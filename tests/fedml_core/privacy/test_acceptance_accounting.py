"""The accountant against exact answers that it did not make: A8 of the plan, and points that are in no paper.

Each point is computed by a method of the tests' own, see `exact_losses` and `exact_integrals`; the claim may be above
it, by 1 % where there is a privacy loss distribution, and never below it.
"""

from __future__ import annotations

import itertools
import math
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy.special import ive

from fedml_core.errors import PrivacyError
from fedml_core.privacy.accounting import Claim, epsilon_of
from fedml_core.privacy.analytic import analytic_gaussian_epsilon
from fedml_core.privacy.correlated import BandedNoise, TreeNoise
from fedml_core.privacy.distributed import discrete_gaussian_sum, rounded_l2
from fedml_core.privacy.events import fold
from tests.fedml_core.privacy import exact_integrals, exact_losses
from tests.fedml_core.privacy.accounting_cases import (
    composed,
    divergence,
    fixed_size,
    gaussian,
    integer_sum,
    laplace,
    matrix,
    poisson,
    repeated,
    tree,
)

ADD, ONE, SPECIAL = "add-or-remove-one", "replace-one", "replace-special"
Event = dict[str, Any]
BELOW = 1 - 1e-6  # what the tests' own numbers may be wrong by


def claim(*events: Event, adjacency: str = ADD, delta: float = 1e-5) -> Claim:
    return epsilon_of(events, delta=delta, unit="client", adjacency=adjacency)


# (rate, noise, count, delta)
SAMPLED = [
    (0.1, 1.0, 100, 1e-5),
    (0.01, 1.0, 1000, 1e-5),
    (0.001, 0.5, 1000, 1e-5),
    (0.001, 0.3, 10, 1e-5),
    (0.5, 3.0, 50, 1e-6),
    (0.9, 10.0, 100, 1e-5),
    (0.01, 4.0, 20_000, 1e-6),
    (0.02, 0.8, 3000, 1e-9),
    (0.1, 50.0, 100, 1e-3),
    (0.05, 5.0, 10, 1e-5),
    (0.3, 1.0, 3, 1e-2),
    (0.2, 0.4, 20, 1e-5),
    (0.005, 0.6, 200, 1e-6),
]


@pytest.mark.parametrize(("rate", "noise", "count", "delta"), SAMPLED)
def test_sampled_gaussian_noise_costs_what_the_exact_convolution_says(
    rate: float, noise: float, count: int, delta: float
) -> None:
    exact = exact_losses.epsilon([exact_losses.gaussian(rate, noise, count=count)], delta)
    found = claim(repeated(count, poisson(rate, gaussian(noise))), delta=delta)
    assert found.accountant == "pld"
    assert exact * BELOW <= found.epsilon <= exact * 1.01


@pytest.mark.parametrize(
    ("rate", "noise", "count", "delta"),
    [
        (0.1, 1.0, 100, 1e-5),
        (0.01, 0.8, 500, 1e-6),
        (0.5, 5.0, 20, 1e-4),
        (1.0, 4.0, 10, 1e-5),
        (0.01, 2.0, 2000, 1e-6),
    ],
)
def test_a_replaced_unit_costs_what_the_exact_convolution_says(
    rate: float, noise: float, count: int, delta: float
) -> None:
    exact = exact_losses.epsilon([exact_losses.gaussian(rate, noise, replaced=True, count=count)], delta)
    found = claim(repeated(count, poisson(rate, gaussian(noise))), adjacency=ONE, delta=delta)
    assert exact * BELOW <= found.epsilon <= exact * 1.01


@pytest.mark.parametrize("rate", [1e-3, 0.01, 0.7])
@pytest.mark.parametrize("noise", [0.4, 1.0, 8.0])
def test_one_sampled_release_has_the_closed_form_of_its_mixture(rate: float, noise: float) -> None:
    # delta(eps) is q times that of the whole release, at log(1 + (e^eps - 1) / q).
    delta = rate * 1e-3
    inner = analytic_gaussian_epsilon(noise, 1e-3)
    exact = math.log1p(rate * math.expm1(inner))
    found = claim(poisson(rate, gaussian(noise)), delta=delta).epsilon
    assert exact * BELOW <= found <= exact * 1.01 + 1e-12


def test_different_events_compose_to_their_exact_convolution() -> None:
    parts = [(0.1, 1.0, 100), (0.01, 0.7, 50), (1.0, 5.0, 1)]
    exact = exact_losses.epsilon([exact_losses.gaussian(q, z, count=t) for q, z, t in parts], 1e-5)
    found = claim(*(repeated(t, poisson(q, gaussian(z))) for q, z, t in parts))
    assert exact * BELOW <= found.epsilon <= exact * 1.01
    both = exact_losses.epsilon([exact_losses.gaussian(0.2, (1 / 4 + 1 / 9) ** -0.5, count=20)], 1e-5)
    shared = claim(repeated(20, poisson(0.2, composed(gaussian(2.0), gaussian(3.0)))))
    assert both * BELOW <= shared.epsilon <= both * 1.01


# A delta too small, an epsilon too large or too many releases for a grid give infinity, never a guess.
@pytest.mark.parametrize(
    ("rate", "noise", "count", "delta"),
    [(0.02, 0.8, 3000, 1.1e-11), (0.05, 2.0, 20_000, 1.1e-11), (0.1, 1.0, 300, 1e-10)],
)
def test_deltas_as_small_as_the_ffts_own_errors_are_not_undercut(
    rate: float, noise: float, count: int, delta: float
) -> None:
    # In the second row the bare grid was 0.015 % below the exact value: 20,000 powers of a spectrum had taken it off.
    found = claim(repeated(count, poisson(rate, gaussian(noise))), delta=delta)
    assert found.accountant == "pld"
    pair = exact_integrals.poisson_gaussian(rate, noise)
    assert exact_integrals.log_delta([(pair, count)], found.epsilon) <= math.log(delta)
    assert exact_integrals.log_delta([(pair, count)], found.epsilon / 1.01) > math.log(delta)


def test_the_two_exact_methods_agree_with_each_other_and_with_the_closed_form() -> None:
    closed = analytic_gaussian_epsilon(1.0, 1e-5)
    assert exact_losses.epsilon([exact_losses.gaussian(1.0, 10.0, count=100)], 1e-5) == pytest.approx(closed, rel=1e-6)
    whole = exact_integrals.poisson_gaussian(1.0, 10.0)
    assert exact_integrals.log_delta([(whole, 100)], closed) == pytest.approx(math.log(1e-5), abs=1e-6)
    sampled = exact_losses.epsilon([exact_losses.gaussian(0.1, 1.0, count=100)], 1e-5)
    both = [exact_integrals.poisson_gaussian(0.1, 1.0), exact_integrals.poisson_gaussian(0.1, 1.0).swapped]
    found = max(exact_integrals.log_delta([(pair, 100)], sampled) for pair in both)
    assert found == pytest.approx(math.log(1e-5), abs=1e-4)


@pytest.mark.parametrize(("scale", "count", "delta"), [(1.0, 2, 1e-5), (5.0, 3, 1e-4), (0.7, 1, 1e-2)])
def test_laplace_noise_costs_what_its_own_convolution_says(scale: float, count: int, delta: float) -> None:
    # The loss is 1/b, -1/b, or even in between with density e^(-(1/b - l)/2) / 4: as masses on a fine grid.
    points = np.linspace(-1 / scale, 1 / scale, 20_001)
    masses = 0.25 * np.exp((points - 1 / scale) / 2) * (points[1] - points[0])
    masses[[0, -1]] *= 0.5
    masses[-1] += 0.5
    masses[0] += 0.5 * math.exp(-1 / scale)
    one = exact_losses.Losses(points, masses)
    assert masses.sum() == pytest.approx(1.0, abs=1e-8)
    exact = exact_losses.epsilon([(one, one, count)], delta)
    found = claim(repeated(count, laplace(scale)), delta=delta).epsilon
    assert exact * (1 - 1e-4) <= found <= exact * 1.01


def test_a_sample_of_fixed_size_costs_at_least_what_a_known_pair_of_data_sets_tells_apart() -> None:
    # Renyi bounds: up to 3 times the cost of this pair, and nobody knows a better one for every pair.
    for rate, noise, count in ((0.1, 2.0, 100), (0.5, 4.0, 10), (0.02, 1.5, 300)):
        exact = exact_losses.epsilon([exact_losses.gaussian(rate, noise, replaced=True, count=count)], 1e-5)
        sample = round(rate * 1000)
        assert claim(repeated(count, fixed_size(sample, 1000, gaussian(noise))), adjacency=ONE).epsilon >= exact


def noises(name: str, noise: float, clients: int) -> npt.NDArray[np.float64]:
    reach = np.arange(-int(14 * noise) - 30, int(14 * noise) + 31)
    one = np.exp(-0.5 * (reach / noise) ** 2) if name == "discrete-gaussian-sum" else ive(np.abs(reach), noise**2)
    return reduce(np.convolve, [one / one.sum()] * clients)


@pytest.mark.parametrize("name", ["discrete-gaussian-sum", "skellam-sum"])
@pytest.mark.parametrize("noise", [0.25, 0.6, 1.0, 3.0])
@pytest.mark.parametrize(("clients", "dimension"), [(1, 1), (2, 2), (5, 3)])
def test_no_integer_update_within_the_bound_tells_more_than_is_claimed(
    name: str, noise: float, clients: int, dimension: int
) -> None:
    event = integer_sum(name, clients=clients, dimension=dimension, l2=1.0, local_noise=noise, scale=1.0)
    bound = rounded_l2(1.0, 1.0, dimension, event["beta"])
    pmf = noises(name, noise, clients)
    moves = [
        move
        for move in itertools.combinations_with_replacement(range(int(bound), -1, -1), dimension)
        if 0 < math.hypot(*move) <= bound
    ]
    assert moves
    worst = max(exact_losses.epsilon([exact_losses.integers(pmf, one) for one in move if one], 1e-4) for move in moves)
    assert claim(event, adjacency=SPECIAL, delta=1e-4).epsilon >= worst


@pytest.mark.parametrize("clients", [2, 3, 6])
@pytest.mark.parametrize("noise", [0.3, 0.5, 1.0])
def test_what_a_sum_of_discrete_gaussians_lacks_to_be_one_is_paid_for(noise: float, clients: int) -> None:
    # Below one step the sum is far from a discrete Gaussian, and the gap's bound must carry all of it.
    orders = np.array([1.5, 2.0, 4.0, 16.0])
    event = integer_sum("discrete-gaussian-sum", clients=clients, dimension=1, l2=1.0, local_noise=noise, scale=1.0)
    ((term, _),) = fold([event]).items()
    pmf = noises("discrete-gaussian-sum", noise, clients)
    exact = [divergence(pmf[1:], pmf[:-1], order) for order in orders]
    assert np.all(discrete_gaussian_sum(term.parts[0][0], 1)(orders) >= np.array(exact) * (1 - 1e-12))


@pytest.mark.parametrize(("steps", "restarts"), [(1, 0), (7, 0), (8, 0), (13, 2), (16, 1)])
def test_a_tree_costs_at_least_the_gaussian_noise_on_its_nodes(steps: int, restarts: int) -> None:
    # Every node that is ever drawn, as a row of a matrix: the worst column is the sensitivity of one participation.
    rows = []
    for end in range(1, steps + 1):
        size = end & -end
        rows.append([1.0 if end - size < leaf <= end else 0.0 for leaf in range(1, steps + 1)])
    squares = float(np.square(rows).sum(axis=0).max()) * (restarts + 1)
    found = claim(tree(3.0, steps, restarts), adjacency=SPECIAL, delta=1e-6).epsilon
    assert found >= analytic_gaussian_epsilon(3.0 / math.sqrt(squares), 1e-6)
    event = TreeNoise(rounds=steps * (restarts + 1), restart_every=steps).transform(3.0, 10.0).event()
    assert event == tree(3.0, steps, restarts)


@pytest.mark.parametrize(("rounds", "bands", "apart"), [(9, 3, 3), (10, 2, 4), (12, 12, 12)])
def test_a_banded_matrix_costs_the_gaussian_noise_on_its_worst_schedule(rounds: int, bands: int, apart: int) -> None:
    index = np.arange(1, bands, dtype=float)
    coefficients = np.concatenate([[1.0], np.cumprod((2 * index - 1) / (2 * index))])
    factor = sum(coefficient * np.eye(rounds, k=-lag) for lag, coefficient in enumerate(coefficients))
    schedules = [
        list(chosen)
        for size in range(1, rounds + 1)
        for chosen in itertools.combinations(range(rounds), size)
        if all(later - earlier >= apart for earlier, later in itertools.pairwise(chosen))
    ]
    worst = max(float(np.linalg.norm(np.asarray(factor)[:, chosen].sum(axis=1))) for chosen in schedules)
    event = BandedNoise(rounds=rounds, bands=bands, separation=apart).transform(2.0, 10.0).event()
    assert event is not None
    exact = analytic_gaussian_epsilon(2.0 / worst, 1e-6)
    assert exact * BELOW <= claim(dict(event), adjacency=SPECIAL, delta=1e-6).epsilon <= exact * 1.01
    assert claim(matrix(2.0, worst), adjacency=SPECIAL, delta=1e-6).epsilon == pytest.approx(exact, rel=1e-6)


def test_more_releases_than_any_grid_holds_are_counted_by_renyi_curves_and_not_by_all_of_the_memory() -> None:
    # A thousand million of them took 41 GB; a million and one of them cost no less than a million.
    many = claim(repeated(10**9, poisson(0.01, gaussian(1000.0))))
    assert many.accountant == "rdp"
    exact = analytic_gaussian_epsilon(1000.0 / (0.01 * math.sqrt(10**9)), 1e-5)  # what so many small samples tend to
    assert exact * 0.99 <= many.epsilon <= exact * 1.3
    with pytest.raises(PrivacyError, match=r"no finite epsilon at delta 1e-05.*release less often"):
        claim(repeated(10**9, poisson(0.01, gaussian(1000.0))), adjacency=ONE)


def test_repetitions_of_repetitions_end_somewhere() -> None:
    event = gaussian(1e9)
    for _ in range(3):
        event = repeated(10**9, event)
    with pytest.raises(PrivacyError, match=r"repeated 1e\+18 times; 1e\+15 is the most"):
        claim(event)
    assert claim(repeated(10**6, repeated(10**9, gaussian(1e9)))).epsilon == pytest.approx(0.0, abs=0.2)
