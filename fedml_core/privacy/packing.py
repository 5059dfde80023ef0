"""How sums of 16, 20 or 32 bits travel in the rings of secure aggregation, whose words have 16, 32 or 64 bits.

16 and 32 bits are a ring's own word. Of 20 bits, three share a word of 64: the word is a + 2^21 b + 2^42 c, which adds
up as its parts do, borrows and all, so that the sum of words tells the sums of the parts and no more. That is 21 1/3
bits for each coordinate, where 32 would be the next ring; the spare bit of each part is room that sums do not use.

Guarantees: unpacked, a sum of packed vectors is the sum of the vectors, where each coordinate's fits the bits.
Guarantees: a packed sum is a function of the sums of the coordinates, whatever they are.
Trust: packing hides nothing; masks do.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedml_core.errors import ConfigError
from fedml_core.secagg.masks import ring_type

__all__ = ["SUM_BITS", "pack", "packed_length", "unpack", "word_bits"]

SUM_BITS = (16, 20, 32)
"""How many bits a coordinate's sum may have."""

_WORDS = {16: 16, 20: 64, 32: 32}
_PART_BITS, _PARTS = 21, 3


def word_bits(sum_bits: int) -> int:
    """Return the bits of the ring that sums of `sum_bits` travel in.

    Raises: ConfigError: unless there are 16, 20 or 32.
    """
    if isinstance(sum_bits, bool) or sum_bits not in _WORDS:
        raise ConfigError(f"bits must be 16, 20 or 32, got {sum_bits!r:.40}")
    return _WORDS[sum_bits]


def packed_length(size: int, sum_bits: int) -> int:
    """Return how many words `size` coordinates take."""
    return -(-size // _PARTS) if word_bits(sum_bits) == 64 else size


def pack(whole: NDArray[np.int64], sum_bits: int) -> NDArray[Any]:
    """Return the words of one vector, modulo their ring."""
    bits = word_bits(sum_bits)
    if bits != 64:
        return whole.astype(ring_type(bits))  # the low bits: reduced modulo the ring
    words = np.zeros(packed_length(len(whole), sum_bits), dtype="<i8")
    for place in reversed(range(_PARTS)):
        part = whole[place::_PARTS]
        np.left_shift(words, _PART_BITS, out=words)
        np.add(words[: len(part)], part, out=words[: len(part)])
    return words.view("<u8")


def unpack(words: NDArray[Any], size: int, sum_bits: int) -> NDArray[np.int64]:
    """Return the coordinates of a sum of packed vectors, centred around 0."""
    bits = word_bits(sum_bits)
    if bits != 64:
        return words.view(np.dtype(f"<i{bits // 8}")).astype(np.int64)
    rest, whole = words.view("<i8").copy(), np.empty(len(words) * _PARTS, dtype=np.int64)
    for place in range(_PARTS - 1):
        part = (rest << (64 - _PART_BITS)) >> (64 - _PART_BITS)  # its lowest bits, with their sign
        whole[place::_PARTS] = part
        rest = (rest - part) >> _PART_BITS
    whole[_PARTS - 1 :: _PARTS] = rest
    return whole[:size]
