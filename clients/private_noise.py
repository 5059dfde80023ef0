"""The randomness that protects a private training: who is in a batch, and the noise; neither can be seeded.

Samples and noise come from `fedml_core.privacy`: AES-256 under keys that the operating system draws and nobody keeps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedml_core.privacy.discrete import DiscreteGaussian
from fedml_core.privacy.entropy import NoiseStream
from fedml_core.privacy.lattice import Lattice

__all__ = ["GradientNoise", "noised_count", "poisson_rows"]

_WORDS = 1 << 64
_STEPS = 600.0 * math.sqrt(1.0 + 2.0**16)
"""Steps to one standard deviation: two levels of the sampler's finest table."""
_MOST_MOVED, _SUM_EXCESS = 0.005, 2.0**-20


def poisson_rows(stream: NoiseStream, count: int, rate: float) -> Tensor:
    """Return which of `count` examples are in a batch: each on its own, with probability `rate`, to 2^-64."""
    if rate >= 1:
        return torch.arange(count)
    threshold = np.uint64(int(rate * _WORDS))
    return torch.from_numpy(np.flatnonzero(stream.words(count) < threshold))


def noised_count(stream: NoiseStream, centred: float, deviation: float) -> float:
    """Return a sum of halves, plus or minus one for each example, with noise of a standard deviation in examples."""
    lattice = Lattice.of(2 * deviation, 0.5, 1)
    return lattice.noised(torch.tensor([centred], dtype=torch.float64), stream).item()


class GradientNoise:
    """The noise of one training's steps, from one stream that is drawn for it and forgotten with it."""

    def __init__(self, noise_multiplier: float, size: int) -> None:
        self._multiplier, self._size = noise_multiplier, size
        self._stream = NoiseStream.fresh()

    def added(self, total: Tensor, norm: float) -> Tensor:
        """Return the sum (d,) of gradients that were cut to `norm`, with noise on each coordinate, float32.

        Raises: PrivacyError: if the sum is not finite.
        """
        lattice = _Coarse.of(self._multiplier, norm, self._size)
        return lattice.noised(total, self._stream)


@dataclass(frozen=True)
class _Coarse(Lattice):
    """A coarser grid, whose noise takes two tables instead of three, where rounding to it moves a sum by 0.5 % or less.

    The excess that `Lattice` adds to its noise pays for the rounding here, too.
    """

    @classmethod
    def of(cls, noise_multiplier: float, bound: float, size: int) -> Lattice:
        """Return the grid; a fine one for many parameters."""
        moved = noise_multiplier * math.sqrt(size) / _STEPS
        if moved > _MOST_MOVED:
            return Lattice.of(noise_multiplier, bound, size)
        return cls(noise_multiplier * bound * (1 + _SUM_EXCESS) / (1 - moved) / _STEPS)

    @property
    def sigma(self) -> float:
        """The standard deviation of the noise, in units of the gradients."""
        return self.step * _STEPS

    def noise(self, stream: NoiseStream, count: int) -> NDArray[np.int64]:
        """Return `count` independent draws, in steps."""
        return DiscreteGaussian(_STEPS).draw(stream, count)
