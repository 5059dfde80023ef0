"""Vectorised arithmetic modulo the prime p = 2^31 - 1, for secret sharing.

A matrix product is done by the machine's float64 product on 16-bit halves, whose sums stay below 2^53 and so are exact
in whatever order, on however many threads, they are added up.

An element is *canonical* as a uint32 below p. Nothing here claims constant time: the running time of NumPy and BLAS may
depend on the values. So this belongs where a secret is made or opened once, never where others ask and time the answer.

Guarantees: every result is canonical and exact, the number that Python's integers give modulo p.
Guarantees: no argument is changed.
Trust: nothing here draws, keeps, prints or sends anything.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedml_core.errors import SecureAggregationError

__all__ = [
    "LIMBS",
    "PRIME",
    "SECRET_BYTES",
    "Elements",
    "LeftFactor",
    "add",
    "from_limbs",
    "inverse",
    "matmul",
    "multiply",
    "require_elements",
    "subtract",
    "to_limbs",
    "well_formed",
]

PRIME = 2**31 - 1
"""The modulus; its arithmetic needs no division, since 2^31 is 1."""
SECRET_BYTES = 32
"""The size of a secret."""
LIMBS = 9
"""How many elements hold one secret: 30 bits each, 16 in the last, which holds every 256-bit secret and no more."""

Elements = NDArray[np.uint32]
"""Canonical elements, of any shape."""

_LIMB_BITS, _LAST_LIMB_BITS = 30, 16
_HALF_BITS = 16
_LOW_HALF = np.uint64(2**_HALF_BITS - 1)
_P = np.uint64(PRIME)
_P_BITS = np.uint64(31)
_INNER = 2**53 // 2**32  # so many products below 2^32 add up below 2^53, where float64 still counts exactly
_BLOCK_ELEMENTS = 2**18  # of the right factor at a time: its halves then stay in the cache
_Words = NDArray[np.uint64]
_Operand = Elements | np.uint32


def add(a: _Operand, b: _Operand) -> Elements:
    """Return a + b, broadcast; at least one has a dimension, here and below."""
    return _reduced(_words(a) + _words(b))


def subtract(a: _Operand, b: _Operand) -> Elements:
    """Return a - b, broadcast."""
    return _reduced(_words(a) + (_P - _words(b)))


def multiply(a: _Operand, b: _Operand) -> Elements:
    """Return a b, element by element, broadcast."""
    return _reduced(_words(a) * _words(b))


def inverse(a: Elements) -> Elements:
    """Return 1 / a, element by element, for all at once: a^(p - 2).

    Raises: SecureAggregationError: if an element is 0.
    """
    if not np.all(a):
        raise SecureAggregationError("0 has no inverse; points must differ from each other and from 0")
    power, result = a, np.ones_like(a)
    for bit in range((PRIME - 2).bit_length()):
        if (PRIME - 2) >> bit & 1:
            result = multiply(result, power)
        power = multiply(power, power)
    return result


class LeftFactor:
    """A matrix of shape (r, K), made ready to be multiplied from the left many times.

    Guarantees: what it holds takes 16 bytes an element, `size_bytes` in all.
    """

    def __init__(self, a: Elements) -> None:
        if a.ndim != 2:
            raise SecureAggregationError(f"a left factor must be a matrix, got {a.ndim} dimensions")
        self.shape: tuple[int, int] = a.shape
        self._halves = np.concatenate(_halves(a), axis=0)

    @property
    def size_bytes(self) -> int:
        """The memory that it holds, in bytes."""
        return self._halves.nbytes

    def times(self, b: Elements) -> Elements:
        """Return the product with `b` of shape (K, c): (r, c).

        Raises: SecureAggregationError: if the shapes do not fit.
        """
        if b.ndim != 2 or b.shape[0] != self.shape[1]:
            raise SecureAggregationError(f"a product needs fitting shapes, got {self.shape} and {b.shape}")
        result = np.zeros((self.shape[0], b.shape[1]), np.uint32)
        columns = max(1, _BLOCK_ELEMENTS // max(1, min(self.shape[1], _INNER)))
        for left in range(0, b.shape[1], columns):
            block = slice(left, left + columns)
            for first in range(0, self.shape[1], _INNER):
                inner = slice(first, first + _INNER)
                partial = _partial_product(self._halves[:, inner], b[inner, block])
                result[:, block] = add(result[:, block], partial) if first else partial
        return result


def matmul(a: Elements, b: Elements) -> Elements:
    """Return the matrix product of `a`, (r, K), and `b`, (K, c): (r, c).

    Raises: SecureAggregationError: if the shapes do not fit.
    """
    return LeftFactor(a).times(b)


def to_limbs(secrets: NDArray[np.uint8]) -> Elements:
    """Return secrets of shape (m, 32) as elements of shape (m, 9): limb i holds bits 30 i to 30 i + 29, little-endian.

    Raises: SecureAggregationError: if the shape or the type is another.
    """
    if secrets.ndim != 2 or secrets.shape[1] != SECRET_BYTES or secrets.dtype != np.uint8:
        raise SecureAggregationError(f"secrets must be bytes of shape (m, {SECRET_BYTES}), got {_described(secrets)}")
    bits = np.zeros((len(secrets), LIMBS * _LIMB_BITS), np.uint8)
    bits[:, : 8 * SECRET_BYTES] = np.unpackbits(secrets, axis=1, bitorder="little")
    limbs = bits.reshape(len(secrets), LIMBS, _LIMB_BITS) @ (np.uint32(1) << np.arange(_LIMB_BITS, dtype=np.uint32))
    bits.fill(0)
    return limbs.astype(np.uint32, copy=False)


def well_formed(limbs: Elements) -> NDArray[np.bool_]:
    """Return which rows of `limbs`, (m, 9), are secrets of 32 bytes; wrong shares rarely give one."""
    require_elements("limbs", limbs, (len(limbs), LIMBS))
    inner = np.all(limbs[:, :-1] < 2**_LIMB_BITS, axis=1)
    fits: NDArray[np.bool_] = inner & (limbs[:, -1] < 2**_LAST_LIMB_BITS)
    return fits


def from_limbs(limbs: Elements) -> NDArray[np.uint8]:
    """Return the secrets, (m, 32), that `to_limbs` made elements of.

    Guarantees: whatever is returned gives the same limbs again, so no two rows of limbs are one secret.
    Raises: SecureAggregationError: if a row is none: a limb has more bits than its place, or is not canonical.
    """
    fits = well_formed(limbs)
    if not np.all(fits):
        count = len(fits) - int(np.count_nonzero(fits))
        raise SecureAggregationError(f"{count} of {len(fits)} reconstructed values are not secrets; a share is wrong")
    bits = (limbs[:, :, None] >> np.arange(_LIMB_BITS, dtype=np.uint32)) & np.uint32(1)
    row = bits.astype(np.uint8).reshape(len(limbs), LIMBS * _LIMB_BITS)
    return np.packbits(row[:, : 8 * SECRET_BYTES], axis=1, bitorder="little")


def require_elements(name: str, values: NDArray[Any], shape: tuple[int, ...]) -> None:
    """Raise SecureAggregationError unless `values` are canonical elements of `shape`; the message shows no value."""
    if values.dtype != np.uint32 or values.shape != shape:
        raise SecureAggregationError(f"{name} must be uint32 of shape {shape}, got {_described(values)}")
    if np.any(values >= PRIME):
        raise SecureAggregationError(f"{name} must be below 2^31 - 1, got a larger one; what was sent is damaged")


def _described(values: NDArray[Any]) -> str:
    return f"{values.dtype} of shape {values.shape}"


def _words(a: _Operand) -> _Words:
    return np.asarray(a).astype(np.uint64)


def _reduced(words: _Words) -> Elements:
    """Return words below 2^62 - 1 modulo p; they are this module's own, and are overwritten."""
    high = words >> _P_BITS
    words &= _P
    words += high  # below 2 p
    result = words.astype(np.uint32)
    wrapped = result - np.uint32(PRIME)  # a difference below 0 wraps to a larger number
    smallest: Elements = np.minimum(result, wrapped)
    return smallest


def _halves(a: Elements) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the low 16 bits and the high 15 of each element."""
    return (a & np.uint32(_LOW_HALF)).astype(np.float64), (a >> np.uint32(_HALF_BITS)).astype(np.float64)


def _partial_product(left: NDArray[np.float64], b: Elements) -> Elements:
    """Return the product of what `left` holds the halves of, low above high, and `b`."""
    assert left.shape[1] <= _INNER, "more products than float64 adds up exactly"
    rows, columns = len(left) // 2, b.shape[1]
    sums = left @ np.concatenate(_halves(b), axis=1)
    lowest = sums[:rows, :columns].astype(np.uint64)
    # One factor of each of these products has 15 bits, so both sums together stay below 2^53, too.
    middle = (sums[rows:, :columns] + sums[:rows, columns:]).astype(np.uint64)
    highest = sums[rows:, columns:].astype(np.uint64)
    middle = _words(_reduced(middle)) << np.uint64(_HALF_BITS)
    return _reduced(lowest + middle + (highest << np.uint64(1)))  # 2^32 is 2
