"""Noise at the server: how much there is, where it must stand, and what it hides.

The noise is fresh in every run, so each tolerance is at least six standard deviations, or a p-value of 10^-9.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from fedml_core.compression import StochasticQuantize, TopK
from fedml_core.errors import ConfigError, PrivacyError
from fedml_core.model import ModelSpec
from fedml_core.privacy.clipping import ClipByNorm
from fedml_core.privacy.entropy import NoiseStream
from fedml_core.privacy.gaussian import ServerGaussian
from fedml_core.privacy.lattice import Lattice
from fedml_core.transform import Chain, Draws, Transform, chain
from fedml_core.update import Total
from fedml_core.weighting import ByExamples, Uniform, Weigh
from strategies.server_optimizers import ServerStep

MANY = 1 << 20


def total_of(values: torch.Tensor, count: int = 10) -> Total:
    return Total(values, float(count), count, {"examples": 3.0 * count}, {"clipped": 1.0})


@pytest.mark.parametrize("came", [0, 3, 10])
@pytest.mark.parametrize(("multiplier", "clip_norm"), [(1.0, 0.5), (0.3, 20.0), (10.0, 1e-3)])
def test_the_noise_is_as_configured_whoever_came(multiplier: float, clip_norm: float, came: int) -> None:
    # "decode(sum(encode(u_i))) is the sum plus noise of standard deviation noise_multiplier x bound on every
    # coordinate, up to 1 %; the noise is there for an empty cohort, too."
    # "the mean is divided by a number that is fixed beforehand, and the noise is the same whoever stays away."
    # "the noise's standard deviation is at least noise_multiplier x bound, and at most 1 % above it."
    pipeline = chain(Weigh(Uniform()), ClipByNorm(clip_norm), ServerGaussian(multiplier, 10.0))
    summed = torch.linspace(-1, 1, MANY)
    decoded, _ = pipeline.decode(total_of(summed, came), pipeline.init(ModelSpec.of_size(MANY)), Draws.of(1))
    residual = (decoded.values.double() - summed.double() / 10) * 10
    sd = multiplier * clip_norm
    # The sample deviation of 2^20 draws is off by 0.07 %.
    assert float(residual.std()) == pytest.approx(sd, rel=0.01)
    assert abs(float(residual.mean())) < 7 * sd / 1024
    assert stats.kstest(residual.numpy()[::16] / sd, "norm").pvalue > 1e-9
    assert stats.kstest(residual.numpy()[::16] / (sd / 2), "norm").pvalue < 1e-10
    lattice = Lattice.of(multiplier, clip_norm, MANY)
    assert sd <= lattice.sigma <= 1.01 * sd


def test_noise_is_fresh_in_every_round_and_reproduced_by_no_draws() -> None:
    # "the noise protects from whoever does not know the stream's key."
    noise, total = ServerGaussian(1.0, 2.0, bound=1.0), total_of(torch.zeros(1000))
    first, second = (noise.decode(total, {}, Draws.of(0))[0].values for _ in range(2))
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 0.2
    assert len(set(first.tolist())) > 990


def test_what_is_released_keeps_no_exact_number_of_the_clients() -> None:
    # "the server sees every update, and is trusted to add the noise and to forget the sum."
    noised, _ = ServerGaussian(1.0, 7.0, bound=1.0).decode(total_of(torch.zeros(4), 3), {}, Draws.of(0))
    assert (noised.weight, dict(noised.sums), dict(noised.facts)) == (7.0, {}, {})


def test_noise_is_calibrated_to_what_is_left_of_it_and_not_to_what_was_typed() -> None:
    # "the bound is that of `left` for any update, and replaces a number that somebody typed."
    pipeline = chain(ClipByNorm(3.0), ClipByNorm(0.25), ServerGaussian(1.0, 10.0, bound=1e-9))
    assert isinstance(pipeline, Chain)
    assert pipeline.parts[-1] == ServerGaussian(1.0, 10.0, bound=0.25)
    assert chain(chain(ClipByNorm(3.0), ServerGaussian(1.0, 10.0))) == chain(ClipByNorm(3.0), ServerGaussian(1.0, 10.0))
    assert pipeline.event() == {"name": "composed", "events": [{"name": "gaussian", "noise_multiplier": 1.0}]}


@pytest.mark.parametrize(
    ("left", "right", "message"),
    [
        ((), (), "ServerGaussian has no finite bound to calibrate to; put ClipByNorm before it"),
        ((ClipByNorm(1.0), Weigh(ByExamples())), (), "no finite bound"),
        ((ClipByNorm(1.0), TopK(0.1)), (), "no finite bound"),
        ((ClipByNorm(1.0),), (TopK(0.1),), "must come last: TopK after it would change"),
        ((ClipByNorm(1.0),), (StochasticQuantize(8),), "must come last: StochasticQuantize"),
        ((ClipByNorm(1.0),), (ServerStep(10.0),), "must come last: ServerStep"),
        ((ClipByNorm(1.0),), (ServerGaussian(1.0, 1.0),), "must come last: ServerGaussian"),
    ],
)
def test_noise_in_the_wrong_place_is_refused(
    left: tuple[Transform, ...], right: tuple[Transform, ...], message: str
) -> None:
    # "noise that finds no finite bound to its left, or what changes a sum to its right, raises PrivacyError."
    with pytest.raises(PrivacyError, match=message):
        chain(*left, ServerGaussian(1.0, 10.0), *right)


def test_noise_outside_a_chain_refuses_to_release_anything() -> None:
    with pytest.raises(PrivacyError, match="has no finite bound to calibrate to; chain it after ClipByNorm"):
        ServerGaussian(1.0, 10.0).decode(total_of(torch.zeros(3)), {}, Draws.of(0))


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, 1e30])
def test_a_sum_that_no_noise_could_hide_is_not_released(wrong: float) -> None:
    # "what is not finite, or beyond 2^61 steps, raises PrivacyError and is not released."
    values = torch.zeros(5)
    values[2] = wrong
    with pytest.raises(PrivacyError, match="nothing was released"):
        ServerGaussian(1.0, 10.0, bound=1.0).decode(total_of(values), {}, Draws.of(0))


def test_rounding_is_paid_for_by_more_noise() -> None:
    # "that excess pays for rounding coordinates to the grid, and for rounding in a float64 sum of 2^16 updates."
    for size in (1, 10**6, 10**9):
        lattice = Lattice.of(1.0, 1.0, size)
        moved = lattice.step * math.sqrt(size)  # the most that rounding both of two sums adds to their distance
        summed = (2**16) ** 2 * 2.0**-53
        assert lattice.sigma >= 1.0 + moved + summed
    with pytest.raises(PrivacyError, match="coordinates are too many for noise_multiplier 100"):
        Lattice.of(100.0, 1.0, 10**9)


def test_all_that_is_released_lies_on_the_grid_whatever_the_sum() -> None:
    lattice = Lattice.of(1.0, 1.0, 1000)
    sums = [torch.zeros(1000, dtype=torch.float64), torch.full((1000,), math.pi, dtype=torch.float64)]
    for summed in sums:
        steps = lattice.whole(summed) + lattice.noise(NoiseStream.fresh(), 1000)
        released = lattice.values(steps, summed)
        assert torch.equal(released, torch.from_numpy(steps * lattice.step).float())
        # The noise reaches every remainder: no low bit tells the sum.
        assert stats.chisquare(np.bincount(steps & 7, minlength=8)).pvalue > 1e-9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0, 1.0), "noise_multiplier must be > 0, got 0.0"),
        ((math.nan, 1.0), "noise_multiplier must be > 0, got nan"),
        ((1.0, 0.0), "expected_cohort must be > 0, got 0.0"),
    ],
)
def test_impossible_noise_is_refused(arguments: tuple[float, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServerGaussian(*arguments)
