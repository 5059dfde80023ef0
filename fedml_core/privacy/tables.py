"""Tables that draw from a distribution over the integers with 128-bit probabilities: Walker's alias method, exactly.

Walker (1977), doi:10.1145/355744.355749, built as Vose (1991) does, in whole numbers: every value's slots add up to its
128-bit weight. A draw looks at one slot and compares, where a search in a cumulative table takes a step for each bit.

Guarantees: the weights of a table add up to 2^128, and each value is drawn with its weight / 2^128, exactly.
Guarantees: no value without a weight is ever drawn.
Trust: weights are public; what is drawn is as secret as the stream's key.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from fedml_core.errors import PrivacyError
from fedml_core.privacy.entropy import NoiseStream

__all__ = ["TOTAL_BITS", "AliasTable", "symmetric_weights"]

TOTAL_BITS = 128
"""What all weights add up to is 2 to this power."""

_CHUNK = 1 << 14  # draws: their words and scratch stay in a core's cache beside the table
_LOW = (1 << 64) - 1


class AliasTable:
    """Draws `first`, `first` + 1, ... with probabilities `weights` / 2^128.

    Args: weights: whole numbers >= 0 that add up to 2^128; there may be 2^24 of them.
    Raises: PrivacyError: if they do not add up.
    """

    def __init__(self, first: int, weights: Sequence[int]) -> None:
        if sum(weights) != 1 << TOTAL_BITS or min(weights) < 0 or len(weights) > 1 << 24:
            raise PrivacyError(f"weights must be >= 0 and add up to 2^{TOTAL_BITS}; these would draw something else")
        self._first = first
        # At least 2 slots: a shift by all 64 bits is none.
        self._slot_bits = max(1, (len(weights) - 1).bit_length())
        cuts, aliases = _slots(list(weights), self._slot_bits)
        size = len(cuts)
        shift = 64 - self._slot_bits
        self._high = np.fromiter(((slot << shift) + (cut >> 64) for slot, cut in enumerate(cuts)), np.uint64, size)
        self._low = np.fromiter((cut & _LOW for cut in cuts), np.uint64, size)
        own = np.arange(size, dtype=np.int64)
        # Slot s gives entry 2s below its cut, and entry 2s + 1 from there on.
        self._values = np.stack([own, np.asarray(aliases, dtype=np.int64)], axis=1).reshape(-1) + first

    def weights(self) -> Iterator[tuple[int, int]]:
        """Yield each value with a part of its weight, slot by slot: what `draw_into` really does."""
        capacity, shift = 1 << (TOTAL_BITS - self._slot_bits), 64 - self._slot_bits
        for slot, (high, low) in enumerate(zip(self._high.tolist(), self._low.tolist(), strict=True)):
            cut = ((high - (slot << shift)) << 64) + low
            yield int(self._values[2 * slot]), cut
            yield int(self._values[2 * slot + 1]), capacity - cut

    def draw_into(self, stream: NoiseStream, out: NDArray[np.int64]) -> None:
        """Overwrite the contiguous one-dimensional array with independent draws."""
        words = np.empty(min(_CHUNK, len(out)), dtype="<u8")
        slots, cuts = np.empty_like(words), np.empty_like(words)
        over = np.empty(len(words), dtype=np.bool_)
        shift = np.uint64(64 - self._slot_bits)
        for start in range(0, len(out), _CHUNK):
            part = out[start : start + _CHUNK]
            word, slot, cut, beyond = words[: len(part)], slots[: len(part)], cuts[: len(part)], over[: len(part)]
            stream.into(word)
            np.right_shift(word, shift, out=slot)
            np.take(self._high, slot.view(np.int64), out=cut, mode="clip")
            np.greater_equal(word, cut, out=beyond)
            np.equal(word, cut, out=(ties := part.view(np.bool_)[: len(part)]))
            if ties.any():
                self._settle(np.flatnonzero(ties), slot, beyond, stream)
            np.left_shift(slot, np.uint64(1), out=slot)
            np.add(slot, beyond, out=slot, casting="unsafe")
            np.take(self._values, slot.view(np.int64), out=part, mode="clip")

    def _settle(
        self, places: NDArray[np.intp], slot: NDArray[np.uint64], beyond: NDArray[np.bool_], stream: NoiseStream
    ) -> None:
        """Decide draws whose first word equals the cut's by a second word."""
        beyond[places] = stream.words(len(places)) >= self._low[slot[places].astype(np.intp)]


def symmetric_weights(relative: Sequence[int]) -> list[int]:
    """Return 128-bit weights of -n, ..., n for the relative weights of 0, ..., n, without those that round to nothing.

    Guarantees: each is at most 2^-128 from its share, except that of 0, which takes what rounding left over.
    """
    total = relative[0] + 2 * sum(relative[1:])
    half = [(weight << TOTAL_BITS) // total for weight in relative[1:]]
    while half and half[-1] == 0:
        half.pop()
    return [*reversed(half), (1 << TOTAL_BITS) - 2 * sum(half), *half]


def _slots(weights: list[int], slot_bits: int) -> tuple[list[int], list[int]]:
    """Return each slot's cut and alias: below the cut a slot gives its own number, and from there on its alias."""
    size, capacity = 1 << slot_bits, 1 << (TOTAL_BITS - slot_bits)
    left = weights + [0] * (size - len(weights))
    cuts, aliases = [0] * size, list(range(size))
    poor = [slot for slot, weight in enumerate(left) if weight < capacity]
    rich = [slot for slot, weight in enumerate(left) if weight > capacity]
    while poor:
        slot, giver = poor.pop(), rich[-1]
        cuts[slot], aliases[slot] = left[slot], giver
        left[giver] -= capacity - left[slot]
        if left[giver] <= capacity:
            rich.pop()
            if left[giver] < capacity:
                poor.append(giver)
    return cuts, aliases
