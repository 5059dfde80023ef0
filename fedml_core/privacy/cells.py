"""Tables of 2^16 cells that draw from 128-bit probabilities with 16 random bits for nearly every draw, exactly.

Marsaglia, Tsang and Wang (2004), doi:10.18637/jss.v011.i03: every value owns as many whole cells as fit into its
probability, and a few cells send the draw on to a table of what was left over. There the table is Walker's, with all of
its 128 bits, so that nothing is rounded: most draws cost 2 bytes of keystream and one look at memory.

Guarantees: each value is drawn with its weight / 2^128, exactly, and no value without a weight is ever drawn.
Trust: weights are public; what is drawn is as secret as the stream's key.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from fedml_core.errors import PrivacyError
from fedml_core.privacy.entropy import NoiseStream
from fedml_core.privacy.tables import TOTAL_BITS, AliasTable

__all__ = ["CellTable", "exact_table", "left_over"]

_BITS = 16
_CELLS = 1 << _BITS
_UNIT_BITS = TOTAL_BITS - _BITS
_CHUNK = 1 << 14  # draws: their keystream and indices stay in a core's cache beside the table
_PER_WORD = 4
_MOST_LEFT_OVER = _CELLS // 4
"""Cells without a value above which so many draws are sent on that `AliasTable` alone is as fast."""


class CellTable:
    """Draws `first`, `first` + 1, ... with probabilities `weights` / 2^128.

    Args: weights: as `AliasTable`.
    Raises: PrivacyError: if they do not add up.
    """

    def __init__(self, first: int, weights: Sequence[int]) -> None:
        if min(weights) < 0 or sum(weights) != 1 << TOTAL_BITS:
            raise PrivacyError(f"weights must be >= 0 and add up to 2^{TOTAL_BITS}; these would draw something else")
        over = left_over(weights)
        owned = _owned(weights, _CELLS - over)
        rest = [weight - (cells << _UNIT_BITS) for weight, cells in zip(weights, owned, strict=True)]
        self._over = over
        self._rest = AliasTable(first, [weight << _BITS - over.bit_length() + 1 for weight in rest])
        values = np.repeat(np.arange(first, first + len(owned), dtype=np.int32), owned)
        self._taken = len(values)
        # The cells that are left over come last: what they give is overwritten.
        cells = np.concatenate([values, np.zeros(over, dtype=np.int32)])
        self._values = cells.astype(np.int16) if np.abs(cells).max() < 1 << 15 else cells

    def weights(self) -> Iterator[tuple[int, int]]:
        """Yield each value with a part of its weight, in units of 2^-144: what `draw_into` really does."""
        for value in self._values[: self._taken].tolist():
            yield value, 1 << TOTAL_BITS
        for value, weight in self._rest.weights():
            yield value, weight * self._over

    def draw_into(self, stream: NoiseStream, out: NDArray[np.int64]) -> None:
        """Overwrite the contiguous one-dimensional array with independent draws."""
        words = np.empty(-(-min(_CHUNK, len(out)) // _PER_WORD), dtype="<u8")
        cells = words.view("<u2")
        index, found = np.empty(len(cells), dtype=np.intp), np.empty(len(cells), dtype=self._values.dtype)
        over = np.empty(len(out), dtype=np.bool_)
        for start in range(0, len(out), _CHUNK):
            part = out[start : start + _CHUNK]
            count = len(part)
            stream.into(words[: -(-count // _PER_WORD)])
            np.copyto(index[:count], cells[:count])
            # Every index is a cell; "wrap" is the quickest of take's modes.
            np.take(self._values, index[:count], out=found[:count], mode="wrap")
            np.copyto(part, found[:count])
            np.greater_equal(cells[:count], self._taken, out=over[start : start + count])
        places = np.flatnonzero(over)
        rest = np.empty(len(places), dtype=np.int64)
        self._rest.draw_into(stream, rest)
        out[places] = rest


def _owned(weights: Sequence[int], most: int) -> list[int]:
    """Return how many cells each value owns: all that fit into its weight, and `most` altogether.

    The rest must be a power of two, which scales to 2^128 without rounding; so the likeliest values give some back.
    """
    owned = [weight >> _UNIT_BITS for weight in weights]
    back = sum(owned) - most
    richest = sorted(range(len(owned)), key=owned.__getitem__, reverse=True)
    while back > 0:
        for value in richest[:back]:
            given = min(owned[value], 1)
            owned[value] -= given
            back -= given
    return owned


def left_over(weights: Sequence[int]) -> int:
    """Return how many of the 2^16 cells a `CellTable` would leave to its second table: a power of two."""
    needed = _CELLS - sum(weight >> _UNIT_BITS for weight in weights)
    return 1 << max(0, needed - 1).bit_length()


def exact_table(first: int, weights: Sequence[int]) -> AliasTable | CellTable:
    """Return the faster table that draws `first`, `first` + 1, ... with probabilities `weights` / 2^128.

    Raises: PrivacyError: if the weights do not add up.
    """
    if left_over(weights) > _MOST_LEFT_OVER:
        return AliasTable(first, weights)
    return CellTable(first, weights)
