"""Exact costs by another road than the accountant's: every outcome's privacy loss on a fine grid, convolved.

An outcome's mass comes from normal distribution functions, and is split between two neighbouring points of the grid so
that its loss keeps its mean; the error is then of second order in the spacing, which is 10^-6 of the whole range. There
is neither a pessimistic rounding nor a choice of grid by Renyi curves, which are the accountant's. Good for delta from
10^-9 on: below, the FFT's own rounding shows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr

Array = npt.NDArray[np.float64]
_SIZE, _CELLS = 1 << 18, 100_001


@dataclass(frozen=True)
class Losses:
    """The losses of a release's outcomes, and the outcomes' probabilities where the unit took part."""

    losses: Array
    masses: Array

    @property
    def kept(self) -> Losses:
        counted = self.masses > 1e-17
        return Losses(self.losses[counted], self.masses[counted])


Release = tuple[Losses, Losses, int]
"""What one release loses, seen from either of two neighbours, and how often it is made."""


def gaussian(rate: float, ratio: float, *, replaced: bool = False, count: int = 1) -> Release:
    """Return noise of `ratio` over one unit's bound on a Poisson sample, of which another unit pulls the other way."""
    reach = max(12 * ratio, 40 * min(ratio, 2.0)) + 1
    edges = np.linspace(-reach, reach, _CELLS)
    middles = (edges[1:] + edges[:-1]) / 2

    def cells(mean: float) -> Array:
        below, above = ndtr((edges - mean) / ratio), ndtr((mean - edges) / ratio)
        found: Array = np.where(middles > mean, above[:-1] - above[1:], below[1:] - below[:-1])
        return found

    def log_density(mean: float) -> Array:
        inside, outside = -0.5 * ((middles - mean) / ratio) ** 2, -0.5 * (middles / ratio) ** 2
        return inside if rate == 1 else np.logaddexp(math.log1p(-rate) + outside, math.log(rate) + inside)

    other = -1.0 if replaced else 0.0
    first = (1 - rate) * cells(0.0) + rate * cells(1.0)
    second = (1 - rate) * cells(0.0) + rate * cells(other)
    loss = log_density(1.0) - log_density(other)
    return Losses(loss, first).kept, Losses(-loss, second).kept, count


def integers(pmf: Array, moved: int, *, count: int = 1) -> Release:
    """Return integer noise of this distribution, and one unit that moves it by so many steps."""
    here, there = pmf[moved:], pmf[:-moved]
    with np.errstate(divide="ignore", invalid="ignore"):
        loss = np.log(here) - np.log(there)
    known = (here > 1e-200) & (there > 1e-200)
    return Losses(loss[known], here[known]).kept, Losses(-loss[known], there[known]).kept, count


def epsilon(releases: Sequence[Release], delta: float) -> float:
    """Return the exact epsilon at `delta` of all releases together: the larger of both directions."""
    return max(_one_way([(one[side], one[2]) for one in releases], delta) for side in (0, 1))  # type: ignore[misc]  # 0 and 1 are both Losses


def _one_way(releases: Sequence[tuple[Losses, int]], delta: float) -> float:
    losses, masses = _convolved(releases)
    low, high = 0.0, float(losses[-1])
    for _ in range(50):
        middle = 0.5 * (low + high)
        beyond = losses > middle
        found = float((masses[beyond] * -np.expm1(middle - losses[beyond])).sum())
        low, high = (middle, high) if found > delta else (low, middle)
    return high


def _convolved(releases: Sequence[tuple[Losses, int]]) -> tuple[Array, Array]:
    means = [float((one.masses * one.losses).sum()) for one, _ in releases]
    spreads = [
        float((one.masses * (one.losses - mean) ** 2).sum()) for (one, _), mean in zip(releases, means, strict=True)
    ]
    counts = [count for _, count in releases]
    mean = float(np.dot(means, counts))
    span = 24 * math.sqrt(np.dot(spreads, counts)) + 4 * max(float(np.ptp(one.losses)) for one, _ in releases)
    step = span / _SIZE
    spectrum, moved = np.ones(_SIZE // 2 + 1, dtype=np.complex128), 0
    for one, count in releases:
        first = math.floor(float(one.losses.min()) / step)
        places = one.losses / step - first
        whole = np.floor(places).astype(np.int64)
        share = places - whole
        grid = np.bincount(whole, one.masses * (1 - share), _SIZE) + np.bincount(whole + 1, one.masses * share, _SIZE)
        spectrum *= np.fft.rfft(grid) ** count
        moved += first * count
    points = np.arange(_SIZE) + math.floor((mean - span / 2) / step)
    return np.asarray(points * step, dtype=np.float64), np.fft.irfft(spectrum, _SIZE)[(points - moved) % _SIZE]
