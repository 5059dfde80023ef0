"""Whether noise and samples are what was claimed: tests that reject the wrong scale, reuse, and the wrong scheme.

Guarantees: a p-value below a level comes with at most that probability, up to the tests' large-sample forms, if the
    claim is true.
Guarantees: a p-value is that of the worst of its parts times their number, so that looking at many is paid for.
Trust: a test that passes has found nothing; it does not prove the claim.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedml_core.errors import PrivacyError
from fedml_core.privacy.tails import binomial, chi_square_tail, normal_tail, same_distribution

__all__ = [
    "NoiseTest",
    "SizeTest",
    "adds_up_p",
    "binomial_sizes",
    "even_p",
    "noise_against",
    "overlap_p",
    "spread_p",
    "unrelated_p",
]

Floats = NDArray[np.float64]
_FEW = 5.0  # expected counts below it make chi-square a bad judge


@dataclass(frozen=True)
class NoiseTest:
    """`ratio`: measured over reference standard deviation. The rest are p-values of: too little noise, another shape,
    noise that repeats within a draw, noise that repeats from one draw to another.
    """

    ratio: float
    too_little: float
    shape: float
    within: float
    between: float

    @property
    def p_value(self) -> float:
        """Return the worst, times the number of tests."""
        return min(1.0, 4 * min(self.too_little, self.shape, self.within, self.between))


def noise_against(measured: ArrayLike, reference: ArrayLike) -> NoiseTest:
    """Return how measured noise compares with a reference of the right scale.

    Guarantees: half the noise, no noise, and noise that is used twice are rejected, in a few thousand numbers.
    Args: measured: (J, d), J >= 2 draws of d coordinates. reference: (J', d), drawn independently as they should be.
    Raises: PrivacyError: for shapes that do not fit, or a number that is not finite.
    """
    found, wanted = np.atleast_2d(np.asarray(measured, float)), np.atleast_2d(np.asarray(reference, float))
    if len(found) < 2 or found.shape[1] != wanted.shape[1] or not np.isfinite(found).all():
        raise PrivacyError(
            f"noise must be finite and at least 2 draws of the reference's size, got {found.shape} and {wanted.shape}"
        )
    mine, theirs = float(np.sqrt((found**2).mean())), float(np.sqrt((wanted**2).mean()))
    ratio = mine / theirs
    if ratio < 1e-6:
        return NoiseTest(ratio, 0.0, 0.0, 1.0, 1.0)
    fourth = max(float((wanted**4).mean()) / theirs**4, 1.0)  # 3 for a Gaussian
    spread = math.sqrt((fourth - 1) / 4 * (1 / found.size + 1 / wanted.size))
    scaled = found / mine
    return NoiseTest(
        ratio,
        normal_tail(-math.log(ratio) / spread),
        same_distribution(scaled, wanted / theirs),  # the scale is judged by itself
        _worst_correlation([(row, row) for row in scaled], skip_zero=True),
        _worst_correlation(list(itertools.pairwise(scaled)), skip_zero=False),
    )


def unrelated_p(rows: ArrayLike) -> float:
    """Return whether rows are draws of equal strength that have nothing in common with one another: p.

    Guarantees: rows of which one is in part another, and rows of unequal strength, are rejected, in a few thousand
        numbers; their common strength is not judged.
    Args: rows: (n, d), n >= 2, Gaussian if the claim is true.
    Raises: PrivacyError: for fewer than two rows, or a number that is not finite.
    """
    found = np.atleast_2d(np.asarray(rows, float))
    count, size = found.shape
    if count < 2 or not np.isfinite(found).all() or not found.any():
        raise PrivacyError(f"at least 2 rows of finite numbers that are not all zero are needed, got {found.shape}")
    products = found @ found.T / size / float((found**2).mean())
    above = np.triu_indices(count, 1)
    together = float((products[above] ** 2).sum()) * size
    strengths = float(((products.diagonal() - 1) ** 2).sum()) * size / 2
    largest = float(np.abs(products[above]).max()) * math.sqrt(size)
    return min(
        1.0,
        3
        * min(
            chi_square_tail(together, len(above[0])),
            chi_square_tail(strengths, count - 1),
            len(above[0]) * 2 * normal_tail(largest),
        ),
    )


def adds_up_p(single: ArrayLike, several: ArrayLike, count: int) -> float:
    """Return whether sums of `count` draws are as strong as independent draws add up to: two-sided p.

    Guarantees: sums of one draw that is used over and over are rejected, in a few hundred numbers.
    Args: single: draws, several: sums of draws, both of any shape, Gaussian if the claim is true.
    Raises: PrivacyError: for draws or sums that are all zero or not finite.
    """
    one, many = np.asarray(single, float).ravel(), np.asarray(several, float).ravel()
    if not (one.any() and many.any() and np.isfinite(one).all() and np.isfinite(many).all()):
        raise PrivacyError("draws and sums must be finite and not all zero; there is nothing to compare")
    ratio = float(np.sqrt((many**2).mean() / (count * (one**2).mean())))
    spread = math.sqrt((1 / one.size + 1 / many.size) / 2)
    return 2 * normal_tail(abs(math.log(ratio)) / spread)


@dataclass(frozen=True)
class SizeTest:
    """`p_value`: of chi-square. `edges`: the bins' lower ends. `observed`, `expected`: their counts."""

    p_value: float
    edges: tuple[int, ...]
    observed: tuple[int, ...]
    expected: tuple[float, ...]


def binomial_sizes(sizes: Sequence[int], population: int, rate: float) -> SizeTest:
    """Return whether cohort sizes are those of independent coins: chi-square against Binomial(population, rate).

    Guarantees: sizes that are all alike are rejected, in a few dozen rounds of a cohort of ten or more.
    Raises: PrivacyError: for fewer than two sizes.
    """
    if len(sizes) < 2:
        raise PrivacyError(f"at least 2 cohort sizes are needed, got {len(sizes)}; run more rounds")
    count = len(sizes)
    bins = max(2, min(20, int(count / _FEW)))
    chances = np.concatenate([[0.0], np.cumsum(binomial(population, rate))])
    cuts = np.searchsorted(chances[1:], np.arange(1, bins) / bins)
    edges = np.unique(np.concatenate([[0], cuts + 1, [population + 1]]))
    observed = np.histogram(np.asarray(sizes), bins=edges)[0]
    expected = count * np.diff(chances[edges])
    keep = expected > 0
    statistic = float(((observed - expected)[keep] ** 2 / expected[keep]).sum())
    outside = bool(observed[~keep].any()) or not 0 <= min(sizes) <= max(sizes) <= population
    p_value = 0.0 if outside else chi_square_tail(statistic, max(1, int(keep.sum()) - 1))
    return SizeTest(p_value, tuple(edges[:-1].tolist()), tuple(observed.tolist()), tuple(expected.tolist()))


def overlap_p(overlaps: Sequence[int], population: int, rate: float) -> float:
    """Return whether cohorts that follow each other share as many clients as independent coins let them: two-sided p.

    Guarantees: a shuffled order, in which nobody comes twice in an epoch, is rejected as soon as a few dozen returns
        should have been seen.
    """
    expected = len(overlaps) * population * rate**2
    variance = expected * (1 - rate**2)
    # Neighbouring pairs share a cohort, which correlates them: 2 (N q^3 - N q^4) for each of the pairs of pairs.
    variance += 2 * max(0, len(overlaps) - 1) * population * (rate**3 - rate**4)
    if variance <= 0:
        return 1.0 if sum(overlaps) == expected else 0.0
    return 2 * normal_tail(max(0.0, abs(sum(overlaps) - expected) - 0.5) / math.sqrt(variance))


def even_p(counts: ArrayLike, draws: int, rate: float) -> float:
    """Return whether members came as often as independent coins let them: two-sided p of chi-square.

    Guarantees: some that come more often are rejected, and so is dealing out in turn, by which all come alike.
    Args: counts: of each member, in so many draws at `rate` in (0, 1).
    Raises: PrivacyError: for fewer than two members.
    """
    came = np.asarray(counts, float)
    if came.size < 2:
        raise PrivacyError(f"at least 2 members are needed, got {came.size}; ask for more")
    statistic = float(((came - came.mean()) ** 2).sum() / (draws * rate * (1 - rate)))
    above = chi_square_tail(statistic, came.size - 1)
    return min(1.0, 2 * min(above, 1 - above))


def spread_p(values: ArrayLike, mean: float, variance: float) -> float:
    """Return whether Gaussian numbers have a mean and a variance: two-sided p of both.

    Guarantees: numbers of half or twice the variance, or a mean that is off by a deviation, are rejected, in a hundred.
    Raises: PrivacyError: for fewer than two numbers, one that is not finite, or a variance that is not > 0.
    """
    found = np.asarray(values, float).ravel()
    if found.size < 2 or not np.isfinite(found).all() or not variance > 0:
        raise PrivacyError(f"at least 2 finite numbers and a variance > 0 are needed, got {found.size} and {variance}")
    above = chi_square_tail(float(((found - found.mean()) ** 2).sum()) / variance, found.size - 1)
    off = 2 * normal_tail(abs(float(found.mean()) - mean) * math.sqrt(found.size / variance))
    return min(1.0, 2 * min(off, 2 * min(above, 1 - above)))


def _worst_correlation(pairs: Sequence[tuple[Floats, Floats]], *, skip_zero: bool) -> float:
    """Return the p-value of the largest correlation over all shifts, of one pair and of all pairs taken together."""
    rows = [_correlations(left, right)[int(skip_zero) :] for left, right in pairs if len(left) >= 16]
    if not rows:
        return 1.0
    alone, together = np.stack(rows), np.sum(rows, axis=0) / math.sqrt(len(rows))
    p_values = [places.size * 2 * normal_tail(float(np.abs(places).max())) for places in (alone, together)]
    return min(1.0, 2 * min(p_values))


def _correlations(left: Floats, right: Floats) -> Floats:
    """Return the correlation at each shift, around the end, in its standard deviations, by the Fourier transform."""
    products = np.fft.irfft(np.fft.rfft(left) * np.conj(np.fft.rfft(right)), n=len(left))
    return np.asarray(products / math.sqrt(float((left**2).sum() * (right**2).sum()) / len(left)))
