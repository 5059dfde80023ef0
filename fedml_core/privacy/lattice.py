"""Gaussian noise on a grid: sums are rounded to whole steps, noise is whole steps, and the two add up without error.

Noise in floating-point numbers betrays what it hides by the numbers that it cannot reach (Mironov 2012,
doi:10.1145/2382196.2382264). Opacus adds four draws up (Holohan and Braghin 2021, arXiv:2107.10138), which leaves fewer
holes; here there is none: all that is released is a whole number of steps, and the noise is a discrete Gaussian, which
protects as the continuous one does (Canonne, Kamath and Steinke 2020, arXiv:2004.00010).

Guarantees: the noise's standard deviation is at least noise_multiplier x bound, and at most 1 % above it.
Guarantees: that excess pays for rounding coordinates to the grid, and for rounding in a float64 sum of 2^16 updates.
Guarantees: what is not finite, or beyond 2^61 steps, raises PrivacyError and is not released.
Trust: the noise protects from whoever does not know the stream's key.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedml_core.errors import PrivacyError
from fedml_core.privacy.discrete import DiscreteGaussian
from fedml_core.privacy.entropy import NoiseStream

__all__ = ["Lattice"]

_SUM_EXCESS = 2.0**-20  # n^2 2^-53 bounds what rounding adds to the influence of one of n summands
_MOST_EXCESS = 0.01
_MOST_STEPS = 2.0**61


@dataclass(frozen=True)
class Lattice:
    """A grid. `step`: the distance of its points, in units of the update."""

    steps: ClassVar[float] = 600.0 * math.sqrt(1.0 + 2.0**16 + 2.0**32)
    """Steps to one standard deviation: three levels of the sampler's finest table, about 2^25."""

    step: float

    @classmethod
    def of(cls, noise_multiplier: float, bound: float, size: int) -> Lattice:
        """Return the grid for vectors of `size` coordinates, to each of which one unit adds an L2 norm of `bound`.

        Raises: PrivacyError: if rounding alone would move so many coordinates by more than 1 % of the bound.
        """
        moved = noise_multiplier * math.sqrt(size) / cls.steps
        if moved + _SUM_EXCESS > _MOST_EXCESS * (1 - moved):
            raise PrivacyError(
                f"{size} coordinates are too many for noise_multiplier {noise_multiplier:g}: rounding them would move "
                "the sum too far; use a smaller model or less noise"
            )
        return cls(noise_multiplier * bound * (1 + _SUM_EXCESS) / (1 - moved) / cls.steps)

    @property
    def sigma(self) -> float:
        """The standard deviation of the noise, in units of the update."""
        return self.step * self.steps

    def noise(self, stream: NoiseStream, count: int) -> NDArray[np.int64]:
        """Return `count` independent draws, in steps."""
        return DiscreteGaussian(self.steps).draw(stream, count)

    def whole(self, values: Tensor) -> NDArray[np.int64]:
        """Return the nearest points of the grid, in steps, flattened."""
        steps = np.rint(values.detach().reshape(-1).to("cpu", torch.float64).numpy() / self.step)
        if steps.size and not float(np.abs(steps).max()) < _MOST_STEPS:  # NaN is not smaller, either
            raise PrivacyError(
                "the sum is not finite, or too large for its noise; nothing was released: "
                "is every update clipped to the norm that the noise is for?"
            )
        return steps.astype(np.int64)

    def values(self, steps: NDArray[np.int64], like: Tensor) -> Tensor:
        """Return points of the grid as a float32 tensor of the shape and on the device of `like`."""
        real = torch.from_numpy(steps * self.step)
        return real.to(torch.float32).reshape(like.shape).to(like.device)

    def noised(self, values: Tensor, stream: NoiseStream) -> Tensor:
        """Return the values with independent noise on each coordinate, float32."""
        steps = self.whole(values)
        np.add(steps, self.noise(stream, len(steps)), out=steps)
        return self.values(steps, values)
