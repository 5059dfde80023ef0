"""Opening a secret although some shares are wrong, and saying whose.

The values of a polynomial are a Reed-Solomon code word. All nine elements of a share are decoded as one, by a random
combination drawn after the shares arrived; what was decoded is then checked on every element. The decoder is that of
Gao (2003), "A new algorithm for decoding Reed-Solomon codes": it corrects as many errors as Berlekamp and Welch's,
half of the shares in excess, at the cost of a product. Once the secret is known, it counts as one more right share.

A wrong share looks right in the combination with probability 2^-31; then decoding may fail, and nobody is named.

Guarantees: what is returned passed `correct`, so a wrong secret is never returned, whoever lies and however many.
Guarantees: if at most (n - threshold) / 2 of n shares are wrong, the secret is found, but for that chance.
Guarantees: if a secret is found and at most (n + 1 - threshold) / 2 of n shares are wrong, exactly their points are
    named, but for that chance, however the liars agreed on their lies.
Guarantees: nobody is named where the shares fit no such number of liars.
Guarantees: the work is bounded by two decodings and `MOST_SUBSETS` candidates, fewer where a threshold is large.
Trust: the dealer is believed to have dealt one polynomial; where it did not, a holder may be named for its dealer's
    lie, unless shares were committed to.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedml_core.errors import SecureAggregationError, ThresholdError
from fedml_core.secagg.field import (
    LIMBS,
    PRIME,
    Elements,
    add,
    from_limbs,
    inverse,
    matmul,
    multiply,
    require_elements,
    subtract,
    to_limbs,
    well_formed,
)
from fedml_core.secagg.shamir import Reconstructor, as_points, powers_of, uniform

__all__ = ["MOST_SUBSETS", "Recovered", "reconstruct_despite_liars"]

MOST_SUBSETS = 500
"""How many sets of shares are tried where decoding fails; where there are no more, all of them."""

_SEARCH_PRODUCTS = 5 * 10**7  # a candidate costs threshold^2 of them, so a search takes about a second at most


@dataclass(frozen=True)
class Recovered:
    """A secret, and the points whose shares are not on its polynomial.

    `attributed` is whether it is known who lied: without it `liars` is empty, and somebody may have lied nevertheless.
    """

    secret: bytes = field(repr=False)
    liars: tuple[int, ...]
    attributed: bool


def reconstruct_despite_liars(
    points: Sequence[int], shares: Elements, threshold: int, correct: Callable[[bytes], bool]
) -> Recovered:
    """Return the secret that `correct` accepts, and whose shares are wrong.

    Args: shares: (n, 9), one secret's, in the order of `points`. correct: whether 32 bytes are the secret, from a
        commitment that was made before the shares were; it must be quick, and is called with wrong candidates.
    Raises: ThresholdError: if there are fewer shares than `threshold`. SecureAggregationError: if no secret is found,
        or the points or the shares are none.
    """
    where = as_points(points)
    require_elements("shares", shares, (len(where), LIMBS))
    if threshold < 1:
        raise SecureAggregationError(f"a threshold must be at least 1, got {threshold}")
    if len(where) < threshold:
        raise ThresholdError(f"{len(where)} shares are left, the threshold is {threshold}; the secret stays closed")
    secret = _opened(where[:threshold], shares[:threshold], correct)
    if secret is None and (agreed := _agreeing(where, shares, threshold)) is not None:
        secret = _opened(where[agreed], shares[agreed], correct)
    if secret is None:
        secret = _searched(where, shares, threshold, correct)
    liars = _liars(where, shares, threshold, secret)
    return Recovered(secret, liars or (), liars is not None)


def _opened(points: Elements, shares: Elements, correct: Callable[[bytes], bool]) -> bytes | None:
    """Return the secret that exactly these shares open, if it is one and is correct."""
    limbs = Reconstructor(points.tolist()).limbs(shares[:, None])
    if not well_formed(limbs)[0]:
        return None
    candidate = from_limbs(limbs)[0].tobytes()
    return candidate if correct(candidate) else None


def _searched(points: Elements, shares: Elements, threshold: int, correct: Callable[[bytes], bool]) -> bytes:
    for chosen in _subsets(len(points), threshold):
        if (secret := _opened(points[chosen], shares[chosen], correct)) is not None:
            return secret
    raise SecureAggregationError(
        f"no {threshold} of {len(points)} shares open the secret that was committed to, so more than "
        f"{(len(points) - threshold) // 2} of them are wrong, or all are; wait for more shares or begin a new attempt"
    )


def _subsets(count: int, size: int) -> Iterator[NDArray[np.intp]]:
    """Yield all subsets of `size` places, or a bounded number of random ones if there are too many."""
    if math.comb(count, size) <= MOST_SUBSETS:
        yield from (np.array(chosen, np.intp) for chosen in itertools.combinations(range(count), size))
        return
    for _ in range(min(MOST_SUBSETS, 1 + _SEARCH_PRODUCTS // size**2)):
        # Two equal words would only make the choice a little less even: it decides the cost, not the outcome.
        yield np.argsort(np.frombuffer(os.urandom(8 * count), np.uint64))[:size]


def _liars(points: Elements, shares: Elements, threshold: int, secret: bytes) -> tuple[int, ...] | None:
    """Return the points that are not on the one polynomial that fits the secret and enough shares, if there is one."""
    known = to_limbs(np.frombuffer(secret, np.uint8)[None, :])
    points, shares = np.append(points, np.uint32(0)), np.append(shares, known, axis=0)
    agreed = _agreeing(points, shares, threshold)
    if agreed is None:
        return None
    fitted = matmul(powers_of(points, threshold), _interpolated(points[agreed], shares[agreed]))
    wrong = np.any(fitted != shares, axis=1)
    # Two polynomials of this degree agree in threshold - 1 places, so only one leaves as few as this aside.
    if wrong[-1] or 2 * np.count_nonzero(wrong) > len(points) - threshold:
        return None
    return tuple(points[wrong].tolist())


def _agreeing(points: Elements, shares: Elements, threshold: int) -> NDArray[np.intp] | None:
    """Return `threshold` places whose shares lie on one polynomial with all but a few, if that few can be corrected."""
    mixed = matmul(shares, uniform(LIMBS)[:, None])  # a wrong share mixes to a right one with probability 1 / p
    polynomial = _decoded(points, mixed, threshold)
    if polynomial is None:
        return None
    fitted = matmul(powers_of(points, len(polynomial)), polynomial[:, None])
    return np.flatnonzero(fitted == mixed)[:threshold]


def _decoded(points: Elements, values: Elements, threshold: int) -> Elements | None:
    """Return the polynomial of degree below `threshold` that fits the values, (n, 1).

    At most (n - threshold) / 2 of them may be wrong; None if more seem to be.

    Polynomials are coefficients in ascending order; the last is not 0, and the polynomial 0 is empty.
    """
    older, newer = _vanishing(points), _trimmed(_interpolated(points, values)[:, 0])
    older_factor, factor = np.zeros(0, np.uint32), np.ones(1, np.uint32)
    while 2 * (len(newer) - 1) >= len(points) + threshold:
        quotient, rest = _divided(older, newer)
        older, newer = newer, rest
        older_factor, factor = factor, _minus(older_factor, _times(quotient, factor))
    polynomial, rest = _divided(newer, factor)
    return polynomial if len(rest) == 0 and len(polynomial) <= threshold else None


def _interpolated(points: Elements, values: Elements) -> Elements:
    """Return the coefficients, (n, c), of the polynomials that have the values, (n, c), at the n points."""
    vanishing, quotients = _vanishing(points), np.empty((len(points), len(points)), np.uint32)
    row = np.zeros_like(points)
    for power in range(len(points) - 1, -1, -1):  # divides by every (x - point) at once
        row = quotients[power] = add(multiply(row, points), vanishing[power + 1])
    products = np.ones_like(points)
    for place, point in enumerate(points):
        differences = subtract(points, point)
        differences[place] = 1
        products = multiply(products, differences)
    return matmul(quotients, multiply(values, inverse(products)[:, None]))


def _vanishing(points: Elements) -> Elements:
    """Return the product of all (x - point)."""
    product = np.ones(1, np.uint32)
    for point in points:
        product = subtract(np.append(np.uint32(0), product), np.append(multiply(product, point), np.uint32(0)))
    return product


def _divided(numerator: Elements, divisor: Elements) -> tuple[Elements, Elements]:
    """Return the quotient and the rest."""
    steps = max(0, len(numerator) - len(divisor) + 1)
    quotient, rest = np.zeros(steps, np.uint32), numerator.copy()
    leading = pow(int(divisor[-1]), -1, PRIME)
    for power in range(steps - 1, -1, -1):
        window = slice(power, power + len(divisor))
        quotient[power] = int(rest[window][-1]) * leading % PRIME
        rest[window] = subtract(rest[window], multiply(divisor, quotient[power]))
    return _trimmed(quotient), _trimmed(rest)


def _times(a: Elements, b: Elements) -> Elements:
    product = np.zeros(max(0, len(a) + len(b) - 1), np.uint32)
    for power, coefficient in enumerate(a):
        window = slice(power, power + len(b))
        product[window] = add(product[window], multiply(b, coefficient))
    return product


def _minus(a: Elements, b: Elements) -> Elements:
    size = max(len(a), len(b))
    return _trimmed(subtract(np.pad(a, (0, size - len(a))), np.pad(b, (0, size - len(b)))))


def _trimmed(polynomial: Elements) -> Elements:
    kept = np.flatnonzero(polynomial)
    return polynomial[: kept[-1] + 1] if len(kept) else polynomial[:0]
