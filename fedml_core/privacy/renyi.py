"""Rényi curves of what has no privacy loss distribution, their amplification by sampling, and epsilon from them.

A curve is the Rényi divergence at each of a grid of orders; curves of what is released one after the other add up.
Mironov (2017), arXiv:1702.07476; Poisson sampling: Mironov, Talwar and Zhang (2019), arXiv:1908.10530, and for any
mechanism Zhu and Wang (2019), ICML, Theorem 5; a sample of fixed size: Wang, Balle and Kasiviswanathan (2019),
arXiv:1808.00087, Theorems 9 and 27; epsilon: Canonne, Kamath and Steinke (2020), arXiv:2004.00010, Proposition 12.

Guarantees: a curve is never below the divergence of its mechanism, up to rounding.
    Between integer orders a curve that holds at integers alone is interpolated upwards.
Trust: nobody is trusted here; these are functions of public numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Curve = Callable[[Array], Array]

__all__ = [
    "ORDERS",
    "Array",
    "Curve",
    "at_integers",
    "epsilon_from",
    "fixed_size",
    "fixed_size_gaussian",
    "gaussian",
    "laplace",
    "poisson",
    "poisson_gaussian",
]

_MOST_POINTS = 20_000
_EDGE = 12.0  # beyond 12 standard deviations a normal density holds less than 10^-32


def _orders() -> Array:
    low = 1 + np.geomspace(0.011, 1, 40)
    middle, high = np.arange(2.05, 12, 0.05), np.arange(12, 64, 0.5)
    return np.concatenate([low, middle, high, np.unique(np.geomspace(64, 1024, 40).round())])


ORDERS: Array = _orders()
"""The orders that epsilon is minimised over, all > 1.01; dense where the best one usually lies."""


def epsilon_from(orders: Array, divergences: Array, delta: float) -> float:
    """Return the smallest epsilon that the curve allows at `delta`; infinity where it allows none."""
    with np.errstate(invalid="ignore", over="ignore"):
        every = divergences + np.log1p(-1 / orders) - np.log(delta * orders) / (orders - 1)
        # Bretagnolle and Huber: the total variation is at most sqrt(1 - exp(-KL)), and KL at most any of these.
        every = np.where(delta**2 + np.expm1(-divergences) >= 0, 0.0, every)
    return max(0.0, float(np.min(np.where(np.isnan(every), np.inf, every))))


def gaussian(ratio: float) -> Curve:
    """Return the curve of Gaussian noise of `ratio` times the L2 sensitivity."""
    return lambda orders: orders / (2 * ratio**2)


def laplace(ratio: float) -> Curve:
    """Return the curve of Laplace noise whose scale is `ratio` times the L1 sensitivity."""

    def curve(orders: Array) -> Array:
        up = np.log(orders / (2 * orders - 1)) + (orders - 1) / ratio
        down = np.log((orders - 1) / (2 * orders - 1)) - orders / ratio
        found: Array = np.maximum(np.logaddexp(up, down) / (orders - 1), 0.0)
        return found

    return curve


def poisson_gaussian(rate: float, ratio: float) -> Curve:
    """Return the curve of Gaussian noise on a Poisson sample, add-or-remove-one; exact at every order."""

    def log_moment(order: float) -> float:
        if order > _MOST_POINTS * ratio**2:
            # By convexity; with noise this small the two hardly differ, and the grid below would be long.
            return float(np.logaddexp(np.log1p(-rate), np.log(rate) + order * (order - 1) / (2 * ratio**2)))
        # The trapezoid of an analytic density is exact to all digits with steps of half its width.
        points, log_weights = _grid(order / ratio, min(0.5, ratio / 2))
        log_ratio = np.logaddexp(np.log1p(-rate), np.log(rate) + points / ratio - 0.5 / ratio**2)
        return float(_log_sum(log_weights + order * log_ratio))

    def curve(orders: Array) -> Array:
        if rate == 1:
            return gaussian(ratio)(orders)
        moments = np.array([log_moment(float(order)) for order in orders])
        found: Array = np.maximum(moments, 0.0) / (orders - 1)
        return found

    return curve


def poisson(rate: float, inner: Curve) -> Curve:
    """Return the curve of any mechanism on a Poisson sample, add-or-remove-one."""

    def log_moments(orders: npt.NDArray[np.int64]) -> Array:
        if rate == 1:
            return (orders - 1) * inner(orders.astype(float))
        most = int(orders.max())
        weights = np.arange(most + 1, dtype=float)
        cost = np.zeros(most + 1)
        cost[2:] = weights[1:-1] * inner(weights[2:])
        return np.array([_poisson_moment(int(order), rate, cost) for order in orders])

    return at_integers(log_moments)


def _poisson_moment(order: int, rate: float, cost: Array) -> float:
    taken = np.arange(2, order + 1)
    terms = _log_binomial(order, taken) + (order - taken) * np.log1p(-rate) + taken * np.log(rate) + cost[2 : order + 1]
    terms[1:] += np.log(3)
    rest = (order - 1) * np.log1p(-rate) + np.log(order * rate - rate + 1)
    return float(_log_sum(np.concatenate([[rest], terms])))


def fixed_size(rate: float, inner: Curve) -> Curve:
    """Return the curve of any mechanism on a sample of fixed size without replacement, replace-one."""

    def log_moments(orders: npt.NDArray[np.int64]) -> Array:
        if rate == 1:
            return (orders - 1) * inner(orders.astype(float))
        most = int(orders.max())
        places = np.arange(most + 1, dtype=float)
        cost = np.full(most + 1, -np.inf)
        cost[2:] = np.log(2) + places[1:-1] * inner(places[2:])
        cost[2] = min(_four_minus(float(inner(np.array([2.0]))[0])), cost[2])
        return np.array([_fixed_moment(int(order), rate, cost) for order in orders])

    return at_integers(log_moments)


def fixed_size_gaussian(rate: float, ratio: float) -> Curve:
    """Return the curve of Gaussian noise on a sample of fixed size, replace-one; `ratio`: over twice one bound."""

    def log_moments(orders: npt.NDArray[np.int64]) -> Array:
        if rate == 1:
            return (orders - 1) * gaussian(ratio)(orders.astype(float))
        most = int(orders.max())
        places = np.arange(most + 1, dtype=float)
        cost = np.log(2) + places * (places - 1) / (2 * ratio**2)
        cost[2] = min(_four_minus(1 / ratio**2), cost[2])
        # The second bound is for noise that is not tiny, where its grid is short.
        refined = min(most, int(_MOST_POINTS * ratio**2))
        if refined > 2:
            even = _log_even_moments(ratio, refined + refined % 2)
            taken = np.arange(3, refined + 1)
            mixed = np.log(4) + 0.5 * (even[taken // 2] + even[(taken + 1) // 2])
            cost[3 : refined + 1] = np.minimum(mixed, cost[3 : refined + 1])
        return np.array([_fixed_moment(int(order), rate, cost) for order in orders])

    return at_integers(log_moments)


def _fixed_moment(order: int, rate: float, cost: Array) -> float:
    taken = np.arange(2, order + 1)
    terms = _log_binomial(order, taken) + taken * np.log(rate) + cost[2 : order + 1]
    return float(_log_sum(np.concatenate([[0.0], terms])))


def _four_minus(second: float) -> float:
    """Return log(4 (e^second - 1))."""
    return float(np.log(4) + second + np.log(-np.expm1(-second)))


def _log_even_moments(ratio: float, most: int) -> Array:
    """Return log E[(P/Q - 1)^l] for l = 0, 2, ..., most, under Q = N(0, 1), P = N(1/ratio, 1)."""
    points, log_weights = _grid(most / ratio, min(0.1, ratio / 10))
    with np.errstate(divide="ignore"):
        # |e^u - 1| without overflow: for u > 0 it is e^u (1 - e^-u).
        exponent = points / ratio - 0.5 / ratio**2
        log_gap = np.maximum(exponent, 0.0) + np.log(-np.expm1(-np.abs(exponent)))
    return np.array([_log_sum(log_weights + power * log_gap) for power in range(0, most + 1, 2)])


def at_integers(log_moments: Callable[[npt.NDArray[np.int64]], Array]) -> Curve:
    """Return a curve from (order - 1) x divergence at integer orders, which is convex in the order and 0 at order 1."""

    def curve(orders: Array) -> Array:
        below, above = np.floor(orders).astype(np.int64), np.ceil(orders).astype(np.int64)
        needed = np.unique(np.concatenate([below, above, [2]]))
        moments = np.zeros(int(needed.max()) + 1)
        asked = needed[needed >= 2]
        moments[asked] = np.maximum(log_moments(asked), 0.0)
        share = orders - below
        return ((1 - share) * moments[below] + share * moments[above]) / (orders - 1)

    return curve


def _grid(highest: float, step: float) -> tuple[Array, Array]:
    """Return points that cover N(0, 1) and N(`highest`, 1), and the logarithm of the first one's mass at each."""
    points = np.arange(-_EDGE, _EDGE + highest, step)
    return points, np.log(step) - 0.5 * np.log(2 * np.pi) - 0.5 * points**2


def _log_sum(terms: Array) -> Any:
    most = terms.max()
    return most + np.log(np.exp(terms - most).sum()) if np.isfinite(most) else most


def _log_binomial(whole: int, taken: npt.NDArray[np.int64]) -> Array:
    factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, whole + 1)))])
    found: Array = factorials[whole] - factorials[taken] - factorials[whole - taken]
    return found
