"""The Gaussian mechanism, exactly: Balle and Wang (2018), arXiv:1805.06530, Theorem 8, instead of a tail bound.

Guarantees: an epsilon is never below the exact one, and above it by at most one part in 10^8.
    A sigma is never below the exact one, and above it by at most one part in 10^8.
Trust: nobody is trusted here; these are functions of public numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from fedml_core.checks import require_number

__all__ = ["analytic_gaussian_delta", "analytic_gaussian_epsilon", "analytic_gaussian_sigma"]

_RELATIVE = 1e-10
_UPWARD = 1 + 1e-9  # more than rounding takes off where delta is the difference of two nearly equal numbers
_MOST_STEPS = 400
_FAR_BELOW = -36.0


def analytic_gaussian_delta(epsilon: float, ratio: float) -> float:
    """Return the smallest delta of one release. `ratio`: the noise's standard deviation over the L2 sensitivity.

    Raises: ConfigError: unless `epsilon` >= 0 and `ratio` > 0.
    """
    require_number("epsilon", epsilon, at_least=0)
    require_number("ratio", ratio, above=0)
    return math.exp(_log_delta(epsilon, ratio))


def analytic_gaussian_epsilon(ratio: float, delta: float) -> float:
    """Return the smallest epsilon of one release. `ratio`: the noise's standard deviation over the L2 sensitivity.

    T releases with the same ratio are one with ratio / sqrt(T).

    Raises: ConfigError: unless `ratio` > 0 and 0 < `delta` < 1.
    Example:
        >>> round(analytic_gaussian_epsilon(1.0, 1e-5), 6)
        4.377178
    """
    require_number("ratio", ratio, above=0)
    require_number("delta", delta, above=0, below=1)
    target = math.log(delta)
    if _log_delta(0.0, ratio) <= target:
        return 0.0
    return _first_below(lambda epsilon: _log_delta(epsilon, ratio) <= target)


def analytic_gaussian_sigma(epsilon: float, delta: float, sensitivity: float = 1.0) -> float:
    """Return the smallest standard deviation, in sensitivity's units, that makes one release private.

    Under replace-one the sensitivity of a clipped update is twice its clip norm.

    Raises: ConfigError: unless `epsilon` > 0, 0 < `delta` < 1 and `sensitivity` > 0.
    """
    require_number("epsilon", epsilon, above=0)
    require_number("delta", delta, above=0, below=1)
    require_number("sensitivity", sensitivity, above=0)
    target = math.log(delta)
    return sensitivity * _first_below(lambda ratio: _log_delta(epsilon, ratio) <= target)


def _log_delta(epsilon: float, ratio: float) -> float:
    """Return the logarithm of delta = F(1/2r - r eps) - e^eps F(-1/2r - r eps), F the normal distribution function."""
    half = 0.5 / ratio
    with_unit = _log_normal(half - ratio * epsilon)
    without = epsilon + _log_normal(-half - ratio * epsilon)
    # Rounding can lift the second over the first when both are next to nothing.
    return with_unit + math.log1p(-math.exp(without - with_unit)) if without < with_unit else -math.inf


def _log_normal(place: float) -> float:
    """Return the logarithm of the normal distribution function."""
    if place > _FAR_BELOW:
        tail = 0.5 * math.erfc(abs(place) / math.sqrt(2))
        return math.log(tail) if place < 0 else math.log1p(-tail)
    # Where the function is next to what a float can hold; the first term left out is below 10^-12.
    square = place**-2
    series = 1 - square * (1 - 3 * square * (1 - 5 * square * (1 - 7 * square)))
    return -0.5 * place**2 - math.log(-place * math.sqrt(2 * math.pi)) + math.log(series)


def _first_below(holds: Callable[[float], bool]) -> float:
    """Return a point where `holds`, a little above the first one; it must hold from there on."""
    low, high = 0.5, 1.0
    while not holds(high):
        low, high = high, 2 * high
    while holds(low):
        low, high = low / 2, low
    for _ in range(_MOST_STEPS):
        middle = 0.5 * (low + high)
        if high - low <= _RELATIVE * high:
            break
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high * _UPWARD
