"""The randomness that protects a private training: who is in a batch, dropout, and the noise; none can be seeded.

Samples and noise come from `fedml_core.privacy`: AES-256 under keys that the operating system draws and nobody keeps.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedml_core.privacy.entropy import NoiseStream
from fedml_core.privacy.lattice import Lattice
from fedml_core.randomness import Key

__all__ = ["CoarseGrid", "GradientNoise", "hidden_key", "noised_count", "poisson_rows"]

_WORDS = 1 << 64
_MOST_MOVED = 0.005
_CHUNK = 1 << 16  # coordinates: with more, numbers leave a core's cache; with fewer, calls cost more than they save
_EXACT = 2.0**51  # whole numbers below it, and with noise on them, are float64 without rounding


def hidden_key() -> tuple[Key, ...]:
    """Return a fresh key for what a model itself draws, such as dropout.

    Guarantees: nobody can tell who drew what. Masks go by place in a batch, and one example more or less moves those
        after it to other places: whoever knew the masks could see that in all the others' gradients.
    """
    return ("private training", secrets.randbits(256))


def poisson_rows(stream: NoiseStream, count: int, rate: float) -> Tensor:
    """Return which of `count` examples are in a batch: each on its own, with probability `rate`, to 2^-64."""
    if rate >= 1:
        return torch.arange(count)
    high, low = divmod(int(rate * _WORDS), 1 << 48)
    first = stream.words(-(-count // 4)).view("<u2")[:count]
    rows = np.flatnonzero(first <= high)
    # Where the first 16 bits are equal, 48 more decide.
    ties = first[rows] == high
    if ties.any():
        more = stream.words(int(ties.sum())) >> np.uint64(16)
        ties[ties] = more >= np.uint64(low)
        rows = rows[~ties]
    return torch.from_numpy(rows)


def noised_count(stream: NoiseStream, centred: float, deviation: float) -> float:
    """Return a sum of halves, plus or minus one for each example, with noise of a standard deviation in examples."""
    lattice = Lattice.of(2 * deviation, 0.5, 1)
    return lattice.noised(torch.tensor([centred], dtype=torch.float64), stream).item()


class GradientNoise:
    """The noise of one training's steps, from one stream that is drawn for it and forgotten with it."""

    def __init__(self, noise_multiplier: float, size: int) -> None:
        self._multiplier, self._size = noise_multiplier, size
        self._stream = NoiseStream.fresh()
        self._pool: ThreadPoolExecutor | None = None
        self._next: Future[NDArray[np.int32]] | None = None
        self._left = 0

    @contextmanager
    def ahead(self, steps: int) -> Iterator[None]:
        """Let a thread draw the noise of the next of `steps` steps while one is computed: it needs no data.

        Guarantees: on leaving, also by an exception, the thread has ended; no draw is used twice.
        """
        with ThreadPoolExecutor(1, thread_name_prefix="noise") as pool:
            self._pool, self._left = pool, steps
            self._begin()
            try:
                yield
            finally:
                self._pool, self._next, self._left = None, None, 0

    def added(self, total: Tensor, norm: float, denominator: int = 1) -> Tensor:
        """Return the sum (d,) of gradients cut to `norm`, with noise on each coordinate, over a public number, float32.

        Raises: PrivacyError: if the sum is not finite.
        """
        lattice = self.grid(norm)
        noise, found = self._drawn(), total.detach().to("cpu")
        if not float(torch.dot(found, found)) < (_EXACT * lattice.step) ** 2:  # NaN is not smaller, either
            # Beyond float64's whole numbers; or not finite, which is refused.
            return lattice.values(lattice.whole(found) + noise, total).div_(denominator)
        noised = _noised(found.numpy(), noise, lattice.step, lattice.step / denominator)
        return torch.from_numpy(noised).to(total.device)

    def grid(self, norm: float) -> Lattice:
        """Return the grid of what is released when gradients were cut to `norm`."""
        return CoarseGrid.of(self._multiplier, norm, self._size)

    def _drawn(self) -> NDArray[np.int32]:
        if self._next is None:
            return self._draw()
        noise, self._next = self._next.result(), None
        self._begin()
        return noise

    def _begin(self) -> None:
        if self._pool is not None and self._left > 0:
            self._left -= 1
            self._next = self._pool.submit(self._draw)

    def _draw(self) -> NDArray[np.int32]:
        # Counted in steps, noise is the same for every norm; it is below 2^30, as three tables' values are.
        drawn, grid = np.empty(self._size, dtype=np.int32), self.grid(1.0)
        for start in range(0, self._size, _CHUNK):
            part = drawn[start : start + _CHUNK]
            part[:] = grid.noise(self._stream, len(part))
        return drawn


def _noised(total: NDArray[Any], noise: NDArray[np.int32], step: float, scale: float) -> NDArray[np.float32]:
    """Return the points of the grid nearest to the total, plus noise, each times `scale`; part by part, in cache."""
    released = np.empty(len(total), dtype=np.float32)
    points = np.empty(min(len(total), _CHUNK), dtype=np.float64)
    for start in range(0, len(total), _CHUNK):
        part = slice(start, start + _CHUNK)
        at = points[: len(total[part])]
        np.divide(total[part], step, out=at, dtype=np.float64)
        np.rint(at, out=at)
        np.add(at, noise[part], out=at)
        np.multiply(at, scale, out=released[part], casting="same_kind")
    return released


@dataclass(frozen=True)
class CoarseGrid(Lattice):
    """A coarser grid, whose noise takes two tables instead of three, where rounding to it moves a sum by 0.5 % or less.

    The excess that `Lattice` adds to its noise pays for the rounding here, too.
    """

    steps: ClassVar[float] = 600.0 * math.sqrt(1.0 + 2.0**16)
    """Steps to one standard deviation: two levels of the sampler's finest table."""

    @classmethod
    def of(cls, noise_multiplier: float, bound: float, size: int) -> Lattice:
        """Return the grid; a fine one for many parameters.

        Raises: PrivacyError: if they are too many for that one, too.
        """
        if noise_multiplier * math.sqrt(size) / cls.steps > _MOST_MOVED:
            return Lattice.of(noise_multiplier, bound, size)
        return super().of(noise_multiplier, bound, size)
