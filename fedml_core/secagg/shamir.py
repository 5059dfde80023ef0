"""Secrets of 32 bytes, shared so that a threshold of holders opens them and fewer learn nothing (Shamir, 1979).

A secret is nine elements of the field. Each is the value at 0 of a polynomial of its own, whose other coefficients are
fresh and uniform; holder number x, counted from 1, has the nine values at x. Many secrets are shared, or opened from
one set of holders, by one matrix product.

Shares, coefficients and secrets are plain arrays here, which whoever holds them overwrites after use; what NumPy copied
on the way stays in freed memory until that is used again.

Guarantees: any `threshold` shares of a secret open it, in any order and at any time.
Guarantees: whatever bytes are read, the outcome is canonical shares or a SecureAggregationError.
Trust: fewer than `threshold` shares fit every secret equally well, however much their holders compute.
Trust: whoever deals the shares is believed; wrong shares, or shares of another secret, show only when the opened
    secret is compared with a commitment.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from fedml_core.errors import SecureAggregationError, ThresholdError
from fedml_core.secagg.field import (
    LIMBS,
    PRIME,
    Elements,
    LeftFactor,
    from_limbs,
    inverse,
    multiply,
    require_elements,
    subtract,
    to_limbs,
)

__all__ = [
    "SHARE_BYTES",
    "Reconstructor",
    "as_points",
    "from_bytes",
    "powers_of",
    "reconstruct",
    "share",
    "to_bytes",
    "uniform",
    "weights_at_zero",
]

SHARE_BYTES = 4 * LIMBS
"""The size of one holder's share of one secret, as bytes."""

_CACHE_BYTES = 64 * 2**20
_BLOCK_ELEMENTS = 2**20  # of the matrix of powers at a time, where it is too large to be kept


def share(secrets: NDArray[np.uint8], threshold: int, holders: int) -> Elements:
    """Return the shares of m secrets for each of the holders: (holders, m, 9); row i belongs to point i + 1.

    Guarantees: every coefficient but the secret is uniform in the field, from the operating system, and used once.
    Args: secrets: bytes of shape (m, 32). threshold: how many holders open them. holders: how many there are.
    Raises: SecureAggregationError: unless 1 <= threshold <= holders < 2^31 - 1 and the secrets have that shape.
    """
    if not 1 <= threshold <= holders < PRIME:
        raise SecureAggregationError(
            f"sharing needs 1 <= threshold <= holders < {PRIME}, got threshold {threshold} of {holders} holders"
        )
    coefficients = np.empty((threshold, len(secrets) * LIMBS), np.uint32)
    coefficients[0] = to_limbs(secrets).ravel()
    coefficients[1:] = uniform(coefficients[1:].size).reshape(coefficients[1:].shape)
    shares = np.concatenate([powers.times(coefficients) for powers in _powers(holders, threshold)], axis=0)
    coefficients.fill(0)
    return shares.reshape(holders, len(secrets), LIMBS)


def reconstruct(points: Sequence[int], shares: Elements) -> NDArray[np.uint8]:
    """Return the secrets, (m, 32), that the shares at `points`, (points, m, 9), open.

    Raises: SecureAggregationError: as `Reconstructor`.
    """
    return Reconstructor(points).secrets(shares)


class Reconstructor:
    """Opens any number of secrets that one set of holders has shares of; its weights are computed once.

    Args: points: exactly as many as the threshold, each from 1 to 2^31 - 2, all different.
    Raises: SecureAggregationError: if the points are no such numbers.
    """

    def __init__(self, points: Sequence[int]) -> None:
        self.points = tuple(map(int, points))
        self._weights = LeftFactor(weights_at_zero(as_points(self.points))[None, :])

    def secrets(self, shares: Elements) -> NDArray[np.uint8]:
        """Return the secrets, (m, 32), of shares of shape (points, m, 9); the rows are in the order of the points.

        Guarantees: a result that is no secret of 32 bytes, because a share is wrong, is an error and never a secret.
        Raises: SecureAggregationError: in that case, or if the shares have another shape or are not canonical.
        """
        return from_limbs(self.limbs(shares))

    def limbs(self, shares: Elements) -> Elements:
        """Return what the shares open as elements, (m, 9), to be looked at row by row with `well_formed`."""
        secrets = shares.shape[1] if shares.ndim == 3 else -1
        require_elements("shares", shares, (len(self.points), secrets, LIMBS))
        return self._weights.times(shares.reshape(len(self.points), secrets * LIMBS)).reshape(secrets, LIMBS)


def to_bytes(shares: Elements) -> bytes:
    """Return shares of shape (..., 9) as bytes: 36 for each, little-endian."""
    require_elements("shares", shares, (*shares.shape[:-1], LIMBS))
    return shares.astype("<u4").tobytes()


def from_bytes(data: bytes, shape: tuple[int, ...] = ()) -> Elements:
    """Return the shares, (*shape, 9), that `to_bytes` wrote; without a shape it is one share, (9,).

    Raises: SecureAggregationError: if the size is another, or an element is not below 2^31 - 1.
    """
    expected = SHARE_BYTES * int(np.prod(shape, dtype=object))
    if len(data) != expected:
        raise SecureAggregationError(f"shares of shape {shape} have {expected} bytes, got {len(data)}")
    shares = np.frombuffer(data, "<u4").astype(np.uint32).reshape(*shape, LIMBS)
    require_elements("shares", shares, shares.shape)
    return shares


def uniform(count: int) -> Elements:
    """Return `count` fresh elements from the operating system's generator.

    Guarantees: each element of the field is equally likely: of 31 random bits, the one value too many is drawn again.
    """
    drawn = np.frombuffer(os.urandom(4 * count), np.uint32) & np.uint32(2**31 - 1)
    while np.any(outside := drawn == PRIME):
        drawn[outside] = np.frombuffer(os.urandom(4 * int(outside.sum())), np.uint32) & np.uint32(2**31 - 1)
    return drawn


def as_points(points: Sequence[int]) -> Elements:
    """Return x-coordinates as elements.

    Raises: ThresholdError: if there is none. SecureAggregationError: if two are equal, or one is not in the field's
        range or is 0, where the secret lies.
    """
    if not points:
        raise ThresholdError("no share is left, a secret needs at least one")
    if not all(1 <= point < PRIME for point in points):
        raise SecureAggregationError(f"points must be from 1 to {PRIME - 1}, got {min(points)} to {max(points)}")
    if len(set(points)) != len(points):
        raise SecureAggregationError(f"points must differ, got {len(points)} of which {len(set(points))} are different")
    return np.array(points, np.uint32)


def weights_at_zero(points: Elements) -> Elements:
    """Return by what each share is multiplied, so that the sum is the polynomial's value at 0 (Lagrange's weights)."""
    products, everything = points, 1
    for place, point in enumerate(points):
        differences = subtract(point, points)
        differences[place] = 1
        products = multiply(products, differences)
        everything = everything * int(point) % PRIME
    return multiply(np.uint32(everything), inverse(products))


def powers_of(points: Elements, count: int) -> Elements:
    """Return x^0 to x^(count - 1) for each of n points: (n, count)."""
    powers = np.ones((len(points), count), np.uint32)
    done, step = 1, points[:, None]
    while done < count:
        more = min(done, count - done)
        powers[:, done : done + more] = multiply(powers[:, :more], step)  # step is x^done
        done, step = done + more, multiply(step, step)
    return powers


_kept: OrderedDict[tuple[int, int], LeftFactor] = OrderedDict()
_keeping = threading.Lock()


def _powers(holders: int, threshold: int) -> Iterable[LeftFactor]:
    """Return the public matrix of powers in blocks of rows; kept for the next client where it fits into the cache."""
    points = np.arange(1, holders + 1, dtype=np.uint32)
    if 16 * holders * threshold > _CACHE_BYTES:
        rows = max(1, _BLOCK_ELEMENTS // threshold)
        blocks = (points[first : first + rows] for first in range(0, holders, rows))
        return (LeftFactor(powers_of(block, threshold)) for block in blocks)
    with _keeping:
        if (factor := _kept.get((holders, threshold))) is not None:
            _kept.move_to_end((holders, threshold))
            return [factor]
    factor = LeftFactor(powers_of(points, threshold))
    with _keeping:
        _kept[holders, threshold] = factor
        while sum(each.size_bytes for each in _kept.values()) > _CACHE_BYTES:
            _kept.popitem(last=False)
    return [factor]
