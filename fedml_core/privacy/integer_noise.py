"""Which integer noise a client adds to its part of a sum: discrete Gaussian, or Skellam.

Kairouz, Liu and Steinke (2021), arXiv:2102.06387; Agarwal, Kairouz and Liu (2021), arXiv:2110.04995. The Gaussian can
be as wide as any ring and costs a little less. Sums of Skellam noise are exactly Skellam, which sums of discrete
Gaussians only nearly are: whoever wants to do without that bound takes it.

Guarantees: a noise and the event that is reported for it have the same distribution.
Trust: the noise protects from whoever does not know the stream's key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fedml_core.errors import ConfigError
from fedml_core.named import Named

if TYPE_CHECKING:
    from fedml_core.privacy.discrete import DiscreteGaussian, Skellam

__all__ = ["GaussianIntegers", "IntegerNoise", "SkellamIntegers"]


@dataclass(frozen=True)
class IntegerNoise(Named):
    """The base of both. `event`: the name of the event of a sum to which every client adds it."""

    event: ClassVar[str] = ""

    def sampler(self, deviation: float) -> DiscreteGaussian | Skellam:
        """Return what draws independent integers of this standard deviation.

        Raises: ConfigError: if there is no such noise.
        """
        raise ConfigError(f"{type(self).__name__} must define sampler(deviation)")


@dataclass(frozen=True)
class GaussianIntegers(IntegerNoise):
    """The discrete Gaussian distribution."""

    event: ClassVar[str] = "discrete-gaussian-sum"

    def sampler(self, deviation: float) -> DiscreteGaussian:
        """Return discrete Gaussians of parameter `deviation`, which from 1 on is their standard deviation."""
        from fedml_core.privacy.discrete import DiscreteGaussian  # loads cryptography, which naming a noise needs not

        return DiscreteGaussian(deviation)


@dataclass(frozen=True)
class SkellamIntegers(IntegerNoise):
    """The Skellam distribution: the difference of two Poisson numbers; at most about 32,000 steps wide."""

    event: ClassVar[str] = "skellam-sum"

    def sampler(self, deviation: float) -> Skellam:
        """Return Skellam numbers of variance `deviation` squared."""
        from fedml_core.privacy.discrete import Skellam  # as above

        try:
            return Skellam(deviation * deviation)
        except ConfigError as error:
            raise ConfigError(
                f"Skellam noise is at most 32,768 steps wide, and {deviation:.3g} are asked for; use fewer bits, or "
                "GaussianIntegers()"
            ) from error
