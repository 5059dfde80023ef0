"""The shared random rotation that spreads an update evenly over its coordinates, so that few bits hold each of them.

Random signs, then a Hadamard matrix: a Kronecker product of small ones, so that it takes a few small matrix products
(Suresh et al. 2017, arXiv:1611.00429; Kairouz, Liu and Steinke 2021, arXiv:2102.06387). Beside powers of two, Paley's
matrices of order 12, 20 and 28 serve as one factor: an update is padded by at most a quarter instead of doubled.

Guarantees: a rotation keeps the L2 norm, and `back` undoes `forward`, both up to the rounding of their floats.
Guarantees: equal keys and sizes rotate alike on every machine, up to that rounding.
Trust: the key is public; no protection depends on it, only that few coordinates outgrow their bits.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedml_core.checks import require_whole
from fedml_core.secagg.keystream import CHUNK_SIZE, Keystream

__all__ = ["Rotation", "padded_size"]

_MOST_SIZE = 1 << 34
_DIGIT_BITS = 5  # factors of up to 32: smaller ones go through memory more often, larger ones multiply more
_PALEY = (12, 20, 28)


def padded_size(size: int) -> int:
    """Return the least length >= `size` that can be rotated: 2^k, or 12, 20 or 28 times 2^k.

    Guarantees: it is below 5/4 of `size`, for sizes from 20 on.
    Example:
        >>> padded_size(650), padded_size(1_000_000)
        (768, 1048576)
    """
    require_whole("size", size, at_least=1, at_most=_MOST_SIZE)
    return min(factor << max(0, (-(-size // factor) - 1).bit_length()) for factor in (1, *_PALEY))


@dataclass(frozen=True)
class Rotation:
    """One rotation of vectors of `size` entries. `key`: public text, the same for all who add up."""

    size: int
    key: str

    @property
    def dimension(self) -> int:
        """Return the length of rotated vectors."""
        return padded_size(self.size)

    def forward(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return the rotated vector, (dimension,), of the float type of `values`, (size,)."""
        padded = np.zeros(self.dimension, dtype=values.dtype)
        np.multiply(values, _signs(self.key, self.dimension)[: self.size], out=padded[: self.size])
        return _product(padded, inverse=False)

    def back(self, rotated: NDArray[Any]) -> NDArray[Any]:
        """Return the vector, (size,), whose rotation is `rotated`, (dimension,); what is left of the padding is cut."""
        return _product(rotated, inverse=True)[: self.size] * _signs(self.key, self.dimension)[: self.size]


@lru_cache(maxsize=4)
def _signs(key: str, dimension: int) -> NDArray[np.float32]:
    """Return 1 or -1 for each coordinate, from the bits of a keystream."""
    stream = Keystream(hashlib.sha256(b"fedveil/rotation/" + key.encode()).digest())
    drawn = np.empty(-(-dimension // 8), dtype=np.uint8)
    for start in range(0, len(drawn), CHUNK_SIZE):
        stream.into(drawn[start : start + CHUNK_SIZE])
    signs = np.unpackbits(drawn, count=dimension).astype(np.float32)
    signs *= -2
    signs += 1
    signs.flags.writeable = False
    return signs


def _product(vector: NDArray[Any], *, inverse: bool) -> NDArray[Any]:
    """Return the Kronecker product of the factors (or of their inverses) times the vector.

    By NumPy, which takes one thread for small products: torch's second thread costs many times a small model's.
    """
    for order in _factors(len(vector)):
        small = _hadamard(order).astype(vector.dtype)
        # Each product takes the first digit of the index and, transposed, puts it last: in the end all are in place.
        vector = ((small.T if inverse else small) @ vector.reshape(order, -1)).T.reshape(-1)
    return vector


def _factors(dimension: int) -> list[int]:
    """Return the orders of the factors: near-equal powers of two, and Paley's where there is one."""
    odd = dimension // (dimension & -dimension)
    paley = [] if odd == 1 else [4 * odd]
    bits = (dimension // (4 * odd if paley else 1)).bit_length() - 1
    count = -(-bits // _DIGIT_BITS)
    return paley + [1 << ((bits + place) // count) for place in range(count)]


@lru_cache(maxsize=16)
def _hadamard(order: int) -> NDArray[np.float64]:
    """Return an orthogonal matrix whose entries are 1 or -1 over sqrt(order)."""
    matrix = np.ones((1, 1))
    if order in (12, 20):
        matrix = np.eye(order) + _conference(order - 1)
    elif order == 28:
        unit, core = np.eye(14), _conference(13)
        matrix = np.kron(core, [[1, 1], [1, -1]]) + np.kron(unit, [[1, -1], [-1, -1]])
    while len(matrix) < order:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return np.asarray(matrix / math.sqrt(order))


def _conference(prime: int) -> NDArray[np.float64]:
    """Return Paley's matrix of order prime + 1: 0 on the diagonal, else whether places differ by a square (1, -1)."""
    squares = {place * place % prime for place in range(1, prime)}
    residues = np.array([0] + [1 if place in squares else -1 for place in range(1, prime)], dtype=np.float64)
    matrix = np.zeros((prime + 1, prime + 1))
    matrix[0, 1:] = 1
    matrix[1:, 0] = 1 if prime % 4 == 1 else -1  # symmetric for 1 mod 4, antisymmetric for 3 mod 4
    places = np.arange(prime)
    matrix[1:, 1:] = residues[(places[:, None] - places) % prime]
    return matrix
