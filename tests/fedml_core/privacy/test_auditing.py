"""What scores prove: the values of the papers, and the property that an audit bites (A10).

The mechanisms are synthetic and their noise is drawn from fixed keys, so that every number here reproduces.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from fedml_core.errors import ConfigError, PrivacyError
from fedml_core.privacy.analytic import analytic_gaussian_epsilon
from fedml_core.privacy.auditing import (
    canary_estimate,
    compared_estimate,
    epsilon_many_runs,
    epsilon_one_run,
    gaussian_tpr,
    one_run_bound,
    two_gaussians_epsilon,
)
from fedml_core.randomness import seeded

DELTA = 1e-6
SIGMA = {1.0: 4.2247, 3.0: 1.5439, 10.0: 0.5411}
"""Noise over the clip norm of one release, by its epsilon at delta = 10^-6."""


@dataclass(frozen=True)
class Released:
    """Canaries of norm 1 in a sum over d coordinates, reduced to the products that cosines are made of."""

    dimension: int
    own: NDArray[np.float64]
    noise: NDArray[np.float64]
    norms: tuple[float, float, float]

    @classmethod
    def drawn(cls, count: int, dimension: int, seed: int) -> Released:
        rows = seeded("canaries", seed).standard_normal((count, dimension), dtype=np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        total, noise = rows.sum(axis=0, dtype=np.float64), seeded("noise", seed).standard_normal(dimension)
        norms = float(total @ total), float(total @ noise), float(noise @ noise)
        own, noised = rows @ total.astype(np.float32), rows @ noise.astype(np.float32)
        return cls(dimension, own.astype(np.float64), noised.astype(np.float64), norms)

    def cosines(self, sigma: float, length: float = 1.0) -> NDArray[np.float64]:
        aa, ab, bb = self.norms
        norm = (length**2 * aa + 2 * length * sigma * ab + sigma**2 * bb) ** 0.5
        return np.asarray((length * self.own + sigma * self.noise) / norm, dtype=np.float64)


@pytest.fixture(scope="module")
def released() -> Released:
    return Released.drawn(1000, 50_000, seed=1)


@pytest.mark.parametrize(("epsilon", "said", "sd"), [(1.0, 1.02, 0.10), (3.0, 2.99, 0.10), (10.0, 9.51, 0.13)])
def test_canaries_of_a_gaussian_release_tell_its_epsilon(
    released: Released, epsilon: float, said: float, sd: float
) -> None:
    # "canaries of a Gaussian release give its epsilon, less what the other canaries' random directions hide."
    # "an estimate is no bound; it comes with its standard deviation."
    assert analytic_gaussian_epsilon(SIGMA[epsilon], DELTA) == pytest.approx(epsilon, rel=1e-3)
    found = canary_estimate(released.cosines(SIGMA[epsilon])[:999], released.dimension, DELTA)
    assert found.epsilon == pytest.approx(said, abs=3.5 * sd)
    assert found.canaries == 999
    assert 0.5 * sd < found.sd < 3 * sd
    assert found.lower < found.epsilon


def test_an_honest_gaussian_of_epsilon_3_is_estimated_within_a_half(released: Released) -> None:
    # A10. With 999 canaries the spread is known; from 1,000 on it is fitted, which errs upwards by some tenths.
    assert 2.5 <= canary_estimate(released.cosines(SIGMA[3.0])[:999], released.dimension, DELTA).epsilon <= 3.5
    fitted = canary_estimate(released.cosines(SIGMA[3.0]), released.dimension, DELTA)
    assert 2.5 <= fitted.epsilon <= 4.0
    assert fitted.sd > canary_estimate(released.cosines(SIGMA[3.0])[:999], released.dimension, DELTA).sd


@pytest.mark.parametrize(
    ("sigma", "length"),
    [(SIGMA[3.0] / 2, 1.0), (SIGMA[3.0], 10.0), (0.0, 1.0)],
    ids=["half the noise", "no clipping", "noise after the release"],
)
def test_a_mechanism_that_gives_more_away_is_over_its_claim(released: Released, sigma: float, length: float) -> None:
    # A10. Canaries send updates that are ten times longer than the clip norm, so they show whether they are clipped.
    found = canary_estimate(released.cosines(sigma, length)[:999], released.dimension, DELTA)
    assert found.lower > 3.0


def test_fewer_canaries_on_a_smaller_model_agree_with_the_reference() -> None:
    small = Released.drawn(141, 20_000, seed=3)
    for epsilon, said, sd in ((1.0, 1.01, 0.42), (3.0, 3.01, 0.46), (10.0, 9.78, 0.57)):
        found = canary_estimate(small.cosines(SIGMA[epsilon]), small.dimension, DELTA)
        assert found.epsilon == pytest.approx(said, abs=2.5 * sd)


def test_scores_of_absent_canaries_tell_nothing() -> None:
    absent = seeded("absent").standard_normal(500) / 100
    found = canary_estimate(absent, 10_000, DELTA)
    assert found.epsilon < 0.3
    assert found.lower == 0.0


@pytest.mark.parametrize(
    ("guesses", "correct", "bound"),
    [(1000, 1000, 5.8091), (100, 100, 3.4930), (200, 180, 1.7989), (1000, 600, 0.2975), (1000, 520, 0.0)],
)
def test_guesses_of_coins_prove_what_the_closed_form_says(guesses: int, correct: int, bound: float) -> None:
    # "at delta = 0 it is the closed form: the epsilon at which P[Bin(guesses, 1/(1+e^-epsilon)) >= correct]
    # equals the significance."
    assert epsilon_one_run(guesses, correct, coins=guesses) == pytest.approx(bound, abs=1e-4)


def test_a_delta_lowers_the_bound_and_more_coins_lower_it_further() -> None:
    exact = epsilon_one_run(1000, 900, coins=1000)
    slack = epsilon_one_run(1000, 900, coins=1000, delta=1e-3)
    assert epsilon_one_run(1000, 900, coins=1000, delta=1e-9) == pytest.approx(exact, abs=1e-4)
    assert slack < exact
    assert epsilon_one_run(1000, 900, coins=10_000, delta=1e-3) < slack


@pytest.mark.parametrize("batch", [1, 2])
def test_the_bound_of_one_run_is_below_the_truth_in_95_of_100_audits(batch: int) -> None:
    # "a lower bound exceeds the true epsilon in at most the stated share of audits, if coins were fair."
    # "the significance is shared out over the numbers that are tried."
    # A10: a Gaussian release of epsilon 3 to 1,000 coins; the others' canaries count as noise, as in d = 20,000.
    below = 0
    for seed in range(100):
        coins = seeded("coins", seed, batch).random(1000) < 0.5
        scores = coins / SIGMA[3.0] + seeded("scores", seed, batch).standard_normal(1000)
        below += one_run_bound(scores[coins], scores[~coins], delta=DELTA)[0] <= 3.0
    assert below >= 95


def test_the_bound_of_one_run_catches_a_release_without_noise() -> None:
    bound, guesses, correct = one_run_bound(np.full(500, 9.0), np.zeros(500), delta=DELTA)
    assert guesses == correct == 1000
    assert 3.0 < bound < epsilon_one_run(1000, 1000, coins=1000)


def test_many_runs_prove_what_clopper_and_pearson_say() -> None:
    # "both rates are bounded at half the significance each."
    assert epsilon_many_runs(1000, 1000, 0, 1000) == pytest.approx(5.6006, abs=1e-4)
    assert epsilon_many_runs(500, 1000, 500, 1000) == 0.0
    # An attack that is always silent with the unit says as much as one that is never silent.
    assert epsilon_many_runs(0, 1000, 1000, 1000) == 0.0
    assert epsilon_many_runs(1000, 1000, 500, 1000) > 3.0
    assert epsilon_many_runs(1000, 1000, 0, 1000, delta=0.5) < 5.6006


@pytest.mark.parametrize(
    ("mu", "rates"), [(1.0, (0.389, 0.092, 0.018)), (0.5, (0.217, 0.034, 0.0048))], ids=["mu=1", "mu=0.5"]
)
def test_no_attack_beats_a_gaussian_release(mu: float, rates: tuple[float, ...]) -> None:
    for rate, most in zip((0.1, 0.01, 0.001), rates, strict=True):
        assert gaussian_tpr(rate, mu) == pytest.approx(most, rel=0.02)


@pytest.mark.parametrize("ratio", [0.5, 1.0, 4.0])
def test_equal_spreads_cost_what_the_mechanism_costs(ratio: float) -> None:
    # "equal deviations give the exact epsilon of the Gaussian mechanism."
    assert two_gaussians_epsilon(1 / ratio, 1.0, 1e-5) == pytest.approx(
        analytic_gaussian_epsilon(ratio, 1e-5), rel=1e-4
    )


@pytest.mark.parametrize(("mean", "deviation"), [(0.5, 1.2), (0.5, 0.8), (0.0, 1.5)])
def test_unequal_spreads_cost_what_integration_says(mean: float, deviation: float) -> None:
    epsilon = two_gaussians_epsilon(mean, deviation, 1e-4)
    x = np.linspace(-60, 60, 2_000_001)
    p = np.exp(-0.5 * ((x - mean) / deviation) ** 2) / deviation
    q = np.exp(-0.5 * x**2)
    scale = (x[1] - x[0]) / np.sqrt(2 * np.pi)
    spent = max(np.maximum(a - np.exp(epsilon) * b, 0).sum() * scale for a, b in ((p, q), (q, p)))
    assert spent == pytest.approx(1e-4, rel=1e-3)


def test_scores_that_are_none_are_refused() -> None:
    # "these are functions of scores; whoever makes scores up gets any answer."
    with pytest.raises(PrivacyError, match="at least 2 scores, got 1"):
        canary_estimate([0.1], 10, DELTA)
    with pytest.raises(PrivacyError, match="finite"):
        one_run_bound([1.0, float("nan")], [0.0, 0.0], delta=DELTA)
    with pytest.raises(ConfigError, match="correct"):
        epsilon_one_run(10, 11, coins=20)
    with pytest.raises(ConfigError, match="delta"):
        canary_estimate([0.1, 0.2], 10, 1.0)


@pytest.mark.parametrize("ratio", [4.0, 1.5, 0.6])
def test_scores_of_any_scale_tell_a_gaussian_releases_epsilon(ratio: float) -> None:
    # "canaries that differ from absent ones by a Gaussian release give its epsilon."
    draws = seeded("compared", round(10 * ratio))
    outside = 50.0 + 7.0 * draws.standard_normal(4000)
    inside = 50.0 + 7.0 * (draws.standard_normal(4000) + 1 / ratio)
    found = compared_estimate(inside, outside, 1e-5)
    true = analytic_gaussian_epsilon(ratio, 1e-5)
    assert abs(found.epsilon - true) < 3 * found.sd
    assert found.sd < 0.2


def test_the_deviation_of_a_compared_estimate_is_that_of_repeated_ones() -> None:
    found = []
    for seed in range(200):
        draws = seeded("repeated", seed)
        found.append(compared_estimate(draws.standard_normal(300) + 0.8, draws.standard_normal(300), 1e-5))
    spread = float(np.std([one.epsilon for one in found]))
    assert float(np.mean([one.sd for one in found])) == pytest.approx(spread, rel=0.15)


def test_scores_that_do_not_differ_estimate_nothing_and_those_all_alike_are_refused() -> None:
    draws = seeded("alike")
    assert compared_estimate(draws.standard_normal(300) - 1.0, draws.standard_normal(300), 1e-5).epsilon == 0.0
    with pytest.raises(PrivacyError, match="excluded scores must differ"):
        compared_estimate([1.0, 2.0], [0.0, 0.0], 1e-5)
    with pytest.raises(PrivacyError, match="at least 2 scores"):
        compared_estimate([1.0], [0.0, 1.0], 1e-5)
