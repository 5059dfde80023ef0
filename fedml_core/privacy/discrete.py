"""Exact samplers of integer noise: the discrete Gaussian and the Skellam distribution.

Canonne, Kamath and Steinke (2020), arXiv:2004.00010, for what the discrete Gaussian protects; Agarwal, Kairouz and Liu
(2021), arXiv:2110.04995, for Skellam. Probabilities are computed in whole numbers and drawn from 128-bit tables; wide
Gaussians are sums of a fine and a stretched coarse one (Micciancio and Walter 2017, eprint 2017/259).

Guarantees: the distribution that is drawn is at most 2^-107 from the one that is named, in total variation.
Guarantees: a draw uses no floating-point number.
Trust: the noise protects from whoever does not know the stream's key.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Context, Decimal
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fedml_core.checks import require_number
from fedml_core.privacy.cells import CellTable, exact_table
from fedml_core.privacy.entropy import NoiseStream
from fedml_core.privacy.tables import AliasTable, symmetric_weights

__all__ = ["DiscreteGaussian", "Skellam"]

_FRACTION_BITS = 320
_NEGLIGIBLE_BITS = 150  # a tail below 2^-150 is no part of a 128-bit table
_WIDEST_TABLE = 2.0**12
_WIDEST_SKELLAM = 2.0**15
_WIDEST = 2.0**48
_FINE_SIGMA, _FINE_BITS = 600.0, 8
"""A coarse Gaussian on multiples of 2^8 is smoothed by a fine one of 600: exp(-2 pi^2 (600 / 2^8)^2) is 2^-156."""


@dataclass(frozen=True)
class DiscreteGaussian:
    """Integers k with probability proportional to exp(-k^2 / (2 sigma^2)).

    Args: sigma: 0.01 to 2^48; the standard deviation, up to 10^-8 where it is at least 1.
    Raises: ConfigError: if it is out of range.
    """

    sigma: float

    def __post_init__(self) -> None:
        """Check the range."""
        require_number("sigma", self.sigma, at_least=0.01, at_most=_WIDEST)

    def draw(self, stream: NoiseStream, count: int) -> NDArray[np.int64]:
        """Return `count` independent draws."""
        drawn = np.empty(count, dtype=np.int64)
        if self.sigma <= _WIDEST_TABLE:
            _gaussian_table(float(self.sigma)).draw_into(stream, drawn)
            return drawn
        _gaussian_table(_FINE_SIGMA).draw_into(stream, drawn)
        coarse = math.sqrt(self.sigma**2 - _FINE_SIGMA**2) / (1 << _FINE_BITS)
        stretched = DiscreteGaussian(coarse).draw(stream, count)
        np.left_shift(stretched, _FINE_BITS, out=stretched)
        return np.add(drawn, stretched, out=drawn)


@dataclass(frozen=True)
class Skellam:
    """The difference of two independent Poisson numbers of equal mean.

    Sums of Skellam noise are Skellam: n clients with variance v each add up to one with n v.
    Args: variance: 0.0001 to 2^30; each Poisson number's mean is half of it.
    Raises: ConfigError: if it is out of range; a discrete Gaussian can be wider.
    """

    variance: float

    def __post_init__(self) -> None:
        """Check the range."""
        require_number("variance", self.variance, at_least=1e-4, at_most=_WIDEST_SKELLAM**2)

    def draw(self, stream: NoiseStream, count: int) -> NDArray[np.int64]:
        """Return `count` independent draws."""
        drawn = np.empty(count, dtype=np.int64)
        _skellam_table(float(self.variance)).draw_into(stream, drawn)
        return drawn


@lru_cache(maxsize=16)
def _gaussian_table(sigma: float) -> AliasTable | CellTable:
    return _table(_gaussian_relative(sigma))


@lru_cache(maxsize=4)
def _skellam_table(variance: float) -> AliasTable | CellTable:
    return _table(_skellam_relative(variance))


def _table(relative: list[int]) -> AliasTable | CellTable:
    weights = symmetric_weights(relative)
    return exact_table(-(len(weights) // 2), weights)


def _gaussian_relative(sigma: float) -> list[int]:
    """Return exp(-k^2 / (2 sigma^2)) for k = 0, 1, ... as far as it counts, in units of 2^-320."""
    context = Context(prec=130)
    square = context.multiply(Decimal(sigma), Decimal(sigma))
    step = _fixed(context.exp(context.divide(Decimal("-0.5"), square)), context)
    change = _fixed(context.exp(context.divide(Decimal(-1), square)), context)
    weight, relative = 1 << _FRACTION_BITS, []
    while weight >> (_FRACTION_BITS - _NEGLIGIBLE_BITS):
        relative.append(weight)
        weight = weight * step >> _FRACTION_BITS
        step = step * change >> _FRACTION_BITS
    return relative


def _fixed(number: Decimal, context: Context) -> int:
    return int(context.multiply(number, Decimal(1 << _FRACTION_BITS)))


def _skellam_relative(variance: float) -> list[int]:
    """Return the Bessel numbers I_k(variance) for k = 0, 1, ... as far as they count, in some unit.

    Miller's downward recurrence I_(k-1) = I_(k+1) + (2k / variance) I_k, which forgets how it began.
    """
    over, under = float(variance).as_integer_ratio()
    above, here, relative = 0, 1 << 200, []
    for k in range(_skellam_end(variance), 0, -1):
        relative.append(here)
        above, here = here, above + 2 * k * under * here // over
    relative.append(here)
    return relative[::-1]


def _skellam_end(variance: float) -> int:
    """Return a number that a Skellam number passes with a probability of next to nothing (Chernoff's bound)."""
    wanted = (_NEGLIGIBLE_BITS + 20) * math.log(2)
    end = 8
    while end * math.asinh(end / variance) - math.hypot(end, variance) + variance < wanted:
        end = math.ceil(end * 1.05) + 1
    return end
