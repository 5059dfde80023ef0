"""From real coordinates to whole ring elements: clip, scale, and round at random, in chunks that stay in the cache.

Guarantees: a coordinate that is not finite is refused, before or after others were written.
Guarantees: the scaled coordinate is rounded up with a probability equal to its fraction, up to 2^-32, and else down.
Guarantees: no result is larger in absolute value than `limit`, rounded up; one of at least `clip` gives `limit` itself.
Trust: runs at the client; its result hides nothing until a mask is on it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedml_core.errors import SecureAggregationError
from fedml_core.secagg.keystream import Keystream

__all__ = ["Rounder"]

_CHUNK = 64 * 1024  # coordinates: fewer cost calls, more leave the cache; at most what one keystream chunk serves
_FRACTION_BITS = 32
_FIXED_BELOW = 2.0**31
"""Below it, a coordinate with 32 bits after the point fits 64 bits."""


class Rounder:
    """Rounds vectors of one type (float32 or float64) whose coordinates `clip` bounds; holds a chunk's scratch."""

    def __init__(self, dtype: np.dtype[Any], clip: float) -> None:
        self._clip = clip
        self._bound = _at_most(clip, dtype)
        self._size = np.empty(_CHUNK, dtype)
        self._over = np.empty(_CHUNK, np.bool_)
        self._real = np.empty(_CHUNK, np.float64)
        self._whole = np.empty(_CHUNK, np.int64)

    def round(self, values: NDArray[Any], limit: float, stream: Keystream, out: NDArray[Any]) -> int:
        """Write round(values * limit / clip) into `out`, modulo its ring, and return how many were clipped.

        Args: limit: what `clip` becomes: 0 to 2^52.
        Raises: SecureAggregationError: if a coordinate is NaN or infinite; `out` is then half written.
        """
        scale = _at_least(limit, self._clip)
        clipped = 0
        for start in range(0, len(values), _CHUNK):
            part = values[start : start + _CHUNK]
            clipped += self._clipped(part)
            self._round_chunk(part, limit, scale, stream, out[start : start + _CHUNK])
        return clipped

    def _clipped(self, part: NDArray[Any]) -> int:
        # The same work whatever is clipped: time would tell.
        size, over = self._size[: len(part)], self._over[: len(part)]
        np.abs(part, out=size)
        if not math.isfinite(size.max()):
            raise SecureAggregationError("the update holds NaN or infinite coordinates; nothing was sent")
        np.greater(size, self._bound, out=over)
        return int(np.count_nonzero(over))

    def _round_chunk(
        self, part: NDArray[Any], limit: float, scale: float, stream: Keystream, out: NDArray[Any]
    ) -> None:
        real, words = self._real[: len(part)], self._size.view("<u4")[: len(part)]  # sizes have been counted by now
        fixed = limit < _FIXED_BELOW
        shift = 2.0**_FRACTION_BITS if fixed else 1.0
        np.copyto(real, part)
        with np.errstate(over="ignore", under="ignore"):  # infinity is clipped next
            np.multiply(real, scale * shift, out=real)
        np.clip(real, -limit * shift, limit * shift, out=real)
        stream.into(words)
        (self._fixed if fixed else self._wide)(real, words, out)

    def _fixed(self, real: NDArray[Any], words: NDArray[Any], out: NDArray[Any]) -> None:
        """Add 32 random bits to 32 bits after the point, and cut them off."""
        whole = self._whole[: len(real)]
        np.copyto(whole, real, casting="unsafe")
        addend = real.view(np.int64)  # what was there is in `whole`
        np.copyto(addend, words)
        np.add(whole, addend, out=whole)
        np.right_shift(whole, _FRACTION_BITS, out=whole)
        np.copyto(out, whole, casting="unsafe")

    def _wide(self, real: NDArray[Any], words: NDArray[Any], out: NDArray[Any]) -> None:
        """Compare 32 random bits with what is after the point, which float64 subtracts exactly."""
        whole, up = self._whole[: len(real)], self._over[: len(real)]
        below = np.floor(real)
        np.subtract(real, below, out=real)
        np.multiply(real, 2.0**_FRACTION_BITS, out=real)
        np.less(words.astype(np.float64), real, out=up)
        np.copyto(whole, below, casting="unsafe")
        np.add(whole, up, out=whole)
        np.copyto(out, whole, casting="unsafe")


def _at_most(bound: float, dtype: np.dtype[Any]) -> Any:
    """Return the largest number of `dtype` that is not above `bound`."""
    with np.errstate(under="ignore"):
        nearest = dtype.type(bound)
    return nearest if float(nearest) <= bound else np.nextafter(nearest, dtype.type(0))


def _at_least(limit: float, clip: float) -> float:
    """Return limit / clip, rounded up as far as it takes for `clip` to reach `limit`."""
    scale = limit / clip
    while scale * clip < limit:
        scale = math.nextafter(scale, math.inf)
    return scale
