"""Tail probabilities that tests and bounds need: binomial, normal, chi-square, Kolmogorov.

Guarantees: agree with their textbook definitions to 10^-9 of a probability, or 10^-6 of a tail below it.
Trust: nobody is trusted here; these are functions of public numbers.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "binomial",
    "chi_square_tail",
    "kolmogorov_tail",
    "largest_rate",
    "normal_quantile",
    "normal_tail",
    "same_distribution",
]


def binomial(trials: int, rate: float) -> NDArray[np.float64]:
    """Return the probabilities of 0 to `trials` successes."""
    if rate <= 0 or rate >= 1:
        certain = np.zeros(trials + 1)
        certain[0 if rate <= 0 else trials] = 1.0
        return certain
    logs = torch.lgamma(torch.arange(trials + 1, dtype=torch.float64) + 1).numpy()
    successes = np.arange(trials + 1)
    ways = logs[-1] - logs - logs[::-1]
    return np.asarray(np.exp(ways + successes * math.log(rate) + successes[::-1] * math.log1p(-rate)))


def largest_rate(successes: int, trials: int, significance: float) -> float:
    """Return the rate at which so few successes are as improbable as `significance`: Clopper and Pearson's upper end.

    Example:
        >>> round(largest_rate(0, 1000, 0.05), 6)
        0.002991
    """
    if successes >= trials:
        return 1.0
    low, high = successes / trials, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        few = float(binomial(trials, middle)[: successes + 1].sum())
        low, high = (middle, high) if few > significance else (low, middle)
    return high


def normal_tail(place: float) -> float:
    """Return the probability of a standard normal above `place`."""
    return 0.5 * math.erfc(place / math.sqrt(2))


def chi_square_tail(statistic: float, freedom: float) -> float:
    """Return the probability of a chi-square with so many degrees of freedom above `statistic`."""
    half = torch.tensor([freedom / 2, max(0.0, statistic) / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def kolmogorov_tail(statistic: float) -> float:
    """Return the probability of Kolmogorov's distribution above `statistic`."""
    if statistic < 0.2:  # below it the series does not converge; the probability is 1 to 12 digits
        return 1.0
    terms = [math.copysign(math.exp(-2 * (k * statistic) ** 2), k % 2 - 0.5) for k in range(1, 101)]
    return min(1.0, max(0.0, 2 * math.fsum(terms)))


def same_distribution(first: ArrayLike, second: ArrayLike) -> float:
    """Return the p-value of Kolmogorov and Smirnov's test of two samples, in its form for large ones."""
    one, two = np.sort(np.ravel(np.asarray(first))), np.sort(np.ravel(np.asarray(second)))
    places = np.concatenate([one, two])
    steps = np.searchsorted(one, places, "right") / len(one) - np.searchsorted(two, places, "right") / len(two)
    size = len(one) * len(two) / (len(one) + len(two))
    return kolmogorov_tail(float(np.abs(steps).max()) * math.sqrt(size))


def normal_quantile(probability: float) -> float:
    """Return the place below which a standard normal is with this probability, in (0, 1)."""
    return float(NormalDist().inv_cdf(probability))
