"""Who is in a batch, and the noise of a step: distributions, and that wrong ones would be seen."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from clients.per_example import AdaptiveClipping
from clients.private_noise import GradientNoise, noised_count, poisson_rows
from fedml_core.errors import ConfigError, PrivacyError
from fedml_core.privacy.entropy import NoiseStream
from tests.clients.private_cases import private_of

COUNT, RATE, BATCHES = 40, 0.2, 4000


def stream(number: int) -> NoiseStream:
    return NoiseStream(bytes([number]) * 32)


def p_value(sizes: NDArray[np.int64], rate: float) -> float:
    """Return the probability of sizes that are as far from Binomial(COUNT, rate), by chi-square."""
    from scipy import stats

    expected = stats.binom.pmf(np.arange(COUNT + 1), COUNT, rate) * len(sizes)
    common = expected >= 5
    seen = np.bincount(sizes, minlength=COUNT + 1)
    observed = np.append(seen[common], seen[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum())
    return float(stats.chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue)


def test_batch_sizes_are_binomial_and_other_schemes_would_be_seen() -> None:
    drawn = stream(1)
    sizes = np.array([len(poisson_rows(drawn, COUNT, RATE)) for _ in range(BATCHES)])
    assert p_value(sizes, RATE) > 1e-3
    assert p_value(np.full(BATCHES, int(COUNT * RATE)), RATE) < 1e-6  # shuffled batches of a fixed size
    assert p_value(sizes, 0.22) < 1e-6


def test_examples_are_drawn_independently_and_alike() -> None:
    drawn = stream(2)
    chosen = np.zeros((BATCHES, COUNT))
    for batch in range(BATCHES):
        chosen[batch, poisson_rows(drawn, COUNT, RATE).numpy()] = 1
    deviation = math.sqrt(RATE * (1 - RATE) / BATCHES)
    assert np.abs(chosen.mean(axis=0) - RATE).max() < 4.5 * deviation
    correlation = np.corrcoef(chosen.T) - np.eye(COUNT)
    assert np.abs(correlation).max() < 5.5 / math.sqrt(BATCHES)


def test_a_rate_of_one_takes_everybody_and_a_tiny_one_nobody() -> None:
    assert poisson_rows(stream(3), 5, 1.0).tolist() == [0, 1, 2, 3, 4]
    assert poisson_rows(stream(3), 1000, 1e-15).tolist() == []
    assert poisson_rows(stream(3), 0, 0.5).tolist() == []


@pytest.mark.parametrize("multiplier", [0.5, 3.0])
@pytest.mark.parametrize("norm", [0.01, 20.0])
def test_noise_has_the_deviation_that_is_paid_for(multiplier: float, norm: float) -> None:
    size = 200_000
    values = GradientNoise(multiplier, size).added(torch.zeros(size), norm).double()
    ratio = float(values.std()) / (multiplier * norm)
    # The estimate is within 0.16 % in two of three cases; the grid adds up to 1 % and never takes away.
    assert 1 - 0.008 < ratio < 1 + 0.018
    assert float((values.abs() > 2 * multiplier * norm).double().mean()) == pytest.approx(0.0455, rel=0.08)


@pytest.mark.parametrize("size", [10, 100_000, 1_000_000])
def test_everything_that_is_released_is_on_a_grid_that_the_values_do_not_move(size: int) -> None:
    noise = GradientNoise(1.0, size)
    values = noise.added(torch.full((size,), 0.25), 1.0)
    assert values.dtype == torch.float32 and float(values.double().mean()) == pytest.approx(0.25, abs=5 / size**0.5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_sum_that_is_not_finite_is_not_released(value: float) -> None:
    with pytest.raises(PrivacyError, match="not finite"):
        GradientNoise(1.0, 3).added(torch.tensor([0.0, value, 0.0]), 1.0)


def test_a_noised_count_has_the_deviation_that_is_named() -> None:
    drawn = stream(4)
    counts = np.array([noised_count(drawn, 3.5, 10.0) for _ in range(4000)])
    assert counts.mean() == pytest.approx(3.5, abs=4 * 10 / 4000**0.5)
    assert counts.std() == pytest.approx(10.0, rel=0.05)


@pytest.mark.parametrize("start", [0.01, 0.1, 1.0, 10.0, 100.0])
def test_adaptive_clipping_finds_the_quantile_from_anywhere(start: float) -> None:
    norms = np.exp(np.linspace(-1, 1, 401)) * 3
    clipping, norm, drawn = AdaptiveClipping(start, quantile=0.5, count_noise=20.0), start, stream(5)
    for _ in range(150):
        within = int((norms <= norm).sum())
        norm = clipping.next_norm(norm, noised_count(drawn, within - len(norms) / 2, 20.0) / len(norms) + 0.5)
    assert (norms <= norm).mean() == pytest.approx(0.5, abs=0.05)


def test_the_count_is_paid_for_by_the_same_multiplier() -> None:
    private = private_of(noise_multiplier=1.0, clipping=AdaptiveClipping(1.0, count_noise=5.0))
    # z^-2 = z_gradients^-2 + (2 count_noise)^-2: m = 100 clients' count in Andrew et al. is 1.005038.
    assert private.gradient_noise == pytest.approx(1.005038, abs=1e-6)
    assert private_of(noise_multiplier=0.3).gradient_noise == 0.3


def test_a_norm_stays_within_its_limits_and_a_wild_count_moves_it_little() -> None:
    clipping = AdaptiveClipping(1.0, least=0.5, most=2.0, learning_rate=10.0)
    assert (clipping.next_norm(1.0, 1e9), clipping.next_norm(1.0, -1e9)) == (0.5, 2.0)
    calm = AdaptiveClipping(1.0)
    assert calm.next_norm(1.0, 1e9) == pytest.approx(math.exp(-0.1))
    with pytest.raises(ConfigError, match="clip_norm must be"):
        AdaptiveClipping(5.0, most=2.0)
