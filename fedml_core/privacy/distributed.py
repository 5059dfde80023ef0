"""Rényi curves of sums to which every client adds integer noise: the distributed discrete Gaussian and Skellam.

Kairouz, Liu and Steinke (2021), arXiv:2102.06387, Theorem 1; Agarwal, Kairouz and Liu (2021), arXiv:2110.04995,
Theorem 3.4. A sum of discrete Gaussians is not quite one, which costs `tau`; a sum of Skellam draws is one, and its
bound holds at integer orders. Reduction modulo the ring's size, and what the server does later, is post-processing.

Guarantees: a curve is never below the divergence of the sum with `clients` honest noises, whoever else is in it.
    The bound of a rounded update is that of conditional rounding, for every update within the clip.
Trust: `clients` must be the fewest honest clients whose noise is in the sum; whoever knows their own noise adds none.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from fedml_core.privacy.events import Mechanism
from fedml_core.privacy.renyi import Array, Curve, at_integers

__all__ = ["discrete_gaussian_sum", "rounded_l2", "skellam_sum"]

_MOST_TERMS = 10_000


def rounded_l2(l2: float, scale: float, dimension: int, beta: float) -> float:
    """Return the largest L2 norm, in integers, of an update of norm `l2` that was scaled and conditionally rounded."""
    norm, size = l2 * scale, float(dimension)
    likely = norm**2 + size / 4 + math.sqrt(2 * math.log(1 / beta)) * (norm + math.sqrt(size) / 2)
    return min(norm + math.sqrt(size), math.sqrt(likely))


def discrete_gaussian_sum(mechanism: Mechanism, times: float) -> Curve:
    """Return the curve of one sum. `times`: 1, or 2 where a unit is replaced by another."""
    dimension, clients = mechanism["dimension"], mechanism["clients"]
    noise = mechanism["local_noise"] * mechanism["scale"]
    l2, l1 = (times * norm / (math.sqrt(clients) * noise) for norm in _norms(mechanism))
    gap = _gap(noise, int(clients))
    slope = 0.5 * min(l2**2 + 2 * l1 * gap + gap**2 * dimension, (l2 + math.sqrt(dimension) * gap) ** 2)

    def curve(orders: Array) -> Array:
        return np.minimum(0.5 * orders * l2**2 + gap * dimension, orders * slope)

    return curve


def skellam_sum(mechanism: Mechanism, times: float) -> Curve:
    """Return the curve of one sum. `times`: 1, or 2 where a unit is replaced by another."""
    l2, l1 = (times * norm for norm in _norms(mechanism))
    variance = mechanism["clients"] * (mechanism["local_noise"] * mechanism["scale"]) ** 2

    def log_moments(orders: npt.NDArray[np.int64]) -> Array:
        extra = np.minimum(((2 * orders - 1) * l2**2 + 6 * l1) / (4 * variance**2), 1.5 * l1 / variance)
        return np.asarray((orders - 1) * (0.5 * orders * l2**2 / variance + extra), dtype=np.float64)

    return at_integers(log_moments)


def _norms(mechanism: Mechanism) -> tuple[float, float]:
    """Return the largest L2 and L1 norms of one unit's integers; a whole number is at most its square."""
    dimension = int(mechanism["dimension"])
    l2 = rounded_l2(mechanism["l2"], mechanism["scale"], dimension, mechanism["beta"])
    return l2, min(math.sqrt(dimension), l2) * l2


def _gap(noise: float, clients: int) -> float:
    """Return the bound on the log ratio between a sum of discrete Gaussians and one discrete Gaussian."""
    places = np.arange(1, min(clients, _MOST_TERMS))
    terms = np.exp(-2 * math.pi**2 * noise**2 * places / (places + 1))
    # The terms beyond those are each at most exp(-2 pi^2 noise^2 j/(j+1)) of the last kept one, which is the largest.
    rest = (clients - 1 - len(places)) * (float(terms[-1]) if len(terms) else 0.0)
    return 10 * (float(terms.sum()) + rest)
