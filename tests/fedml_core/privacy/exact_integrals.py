"""Exact costs by another road than the accountant's: the privacy loss's moment generating function, inverted.

For densities p and q let M(s) be the integral of p^(1+s) q^(-s). Then for every c > 0 delta(epsilon) is the integral of
M(c+it) exp(-(c+it) epsilon) / ((c+it)(c+it+1)) over t, divided by 2 pi; independent releases multiply their M. At the
saddle point nothing cancels, so that the answer is right to ten digits whatever delta is. Grids, rounding and FFTs of
the accountant have no part in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Points = npt.NDArray[np.float64]
Complex = npt.NDArray[np.complex128]
Log = Callable[[Points], Points]


@dataclass(frozen=True)
class Pair:
    """Two log densities, sampled at points that are `step` apart and cover both."""

    points: Points
    first: Points
    second: Points

    @property
    def swapped(self) -> Pair:
        return Pair(self.points, self.second, self.first)

    def log_moment(self, s: Complex) -> Complex:
        """Return log M(s), by the trapezoid rule: exact to all digits for densities that are analytic."""
        step = math.log(self.points[1] - self.points[0])
        loss = self.first - self.second
        found = np.empty(len(s), dtype=np.complex128)
        for place, one in enumerate(s):
            exponent = self.first + one * loss
            most = exponent.real.max()
            found[place] = most + step + np.log(np.exp(exponent - most).sum())
        return found


def normal(points: Points, mean: float, deviation: float) -> Points:
    return -0.5 * ((points - mean) / deviation) ** 2 - 0.5 * math.log(2 * math.pi) - math.log(deviation)


def mixed(rate: float, inside: Points, outside: Points) -> Points:
    return (
        outside
        if rate == 0
        else inside
        if rate == 1
        else np.logaddexp(np.log1p(-rate) + outside, math.log(rate) + inside)
    )


def poisson_gaussian(rate: float, ratio: float) -> Pair:
    """Return one unit in a Poisson sample, and without it: `ratio` is noise over bound."""
    points = _points(ratio)
    nobody = normal(points, 0, ratio)
    return Pair(points, mixed(rate, normal(points, 1, ratio), nobody), nobody)


def _points(ratio: float) -> Points:
    reach = 40.0 * ratio + 2.0
    return np.linspace(-reach, reach, 4001 + 2 * int(8 / ratio))


def log_delta(releases: Sequence[tuple[Pair, int]], epsilon: float) -> float:
    """Return the logarithm of delta(epsilon) of all releases, each so many times, in this direction.

    For many releases: where one unit is in few samples, what is integrated falls off too slowly.
    """

    def log_terms(s: Complex) -> Complex:
        terms: Complex = -s * epsilon - np.log(s) - np.log1p(s)
        for pair, count in releases:
            terms = terms + count * pair.log_moment(s)
        return terms

    centre = _lowest(lambda c: float(log_terms(np.array([c + 0j]))[0].real))
    height = float(log_terms(np.array([centre + 0j]))[0].real)
    # The integrand falls off at first as a Gaussian does whose width is that of its curvature.
    apart = centre * 1e-3
    bend = (
        log_terms(np.array([centre + apart, centre - apart], dtype=np.complex128)).real.sum() - 2 * height
    ) / apart**2
    step, before = 0.5 / math.sqrt(max(bend, 1e-300)), math.nan
    while True:
        found = _trapezoid(lambda t: np.exp(log_terms((centre + 1j * t).astype(np.complex128)) - height).real, step)
        if abs(found - before) <= 1e-7 * abs(found):
            return height + math.log(found / math.pi)
        step, before = step / 2, found


def _trapezoid(integrand: Log, step: float) -> float:
    """Return the integral from 0 on, to where the integrand stays below 10^-10 of what it began with."""
    total, start = 0.0, 0
    while start < 1 << 17:
        values = integrand(np.arange(start, start + 128, dtype=np.float64) * step)
        total += float(values.sum()) - (0.5 * float(values[0]) if start == 0 else 0.0)
        if float(np.abs(values).max()) < 1e-10:
            break
        start += 128
    return total * step


def _lowest(convex: Callable[[float], float]) -> float:
    """Return a place near the minimum over c > 0; the integral is the same for every c, so near is good enough."""
    grid = np.geomspace(1e-3, 1e4, 71)
    values = [convex(float(c)) for c in grid]
    best = int(np.nanargmin(values))
    low, high = grid[max(0, best - 1)], grid[min(70, best + 1)]
    for _ in range(30):
        one, other = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, other) if convex(float(one)) < convex(float(other)) else (one, high)
    return float(0.5 * (low + high))
