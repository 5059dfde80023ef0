"""The error of a mean under `fedml_core.secagg.encoding`: acceptance test A7, over 1,000 seeds."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedml_core.secagg.encoding import RingEncoding

BITS = pytest.mark.parametrize("bits", [16, 32, 64])
WEIGHTED = RingEncoding(0.5, 100, max_weight=50.0)


def key_of(*numbers: int) -> bytes:
    return hashlib.sha256(repr(numbers).encode()).digest()


def errors_of_the_mean(encoding: RingEncoding, rows: NDArray[Any], weights: list[float], seeds: int) -> NDArray[Any]:
    """Return decoded minus true means, (seeds, d)."""
    count = len(rows)
    true = np.average(rows.astype(np.float64), axis=0, weights=weights)
    found = []
    for seed in range(seeds):
        keys = [key_of(seed, row) for row in range(count)]
        encoded = encoding.encode_rows(rows, keys, weights=weights)
        decoded = encoding.decode(encoded.sum(axis=0, dtype=encoded.dtype), count)
        found.append(decoded.values / decoded.weight - true)
    return np.array(found)


@BITS
@pytest.mark.parametrize("weights", [[8.0] * 10, [0.5, 1.0, 2.0, 3.0, 8.0] * 2], ids=["equal", "spread"])
def test_the_mean_is_unbiased_and_within_its_bound(bits: int, weights: list[float]) -> None:
    """the decoded sum is the sum of the clipped, weighted updates in expectation, and the mean that it makes has a
    standard deviation of at most clip / (2 Q omega sqrt(n)) per coordinate around theirs."""
    # A ring of 64 bits rounds finer than float64 can tell from exact, unless as many clients share it.
    clients = 10 if bits < 64 else 2**40
    encoding = RingEncoding(1.0, clients, bits=bits, max_weight=8.0)
    rows = np.sin(np.arange(10 * 40, dtype=np.float64)).reshape(10, 40) * 0.99
    errors = errors_of_the_mean(encoding, rows, weights, 1000)
    bound = encoding.mean_error(10, sum(weights) / 10)
    deviation = float(np.sqrt((errors**2).mean()))
    # Fractions are spread evenly, so the deviation is sqrt(1/6) of a step where the bound says 1/2: 0.816 of it. The
    # 400 fractions make that uncertain by 3 %, the 40,000 errors by less.
    assert 0.75 * bound < deviation < 0.88 * bound
    assert abs(errors.mean()) < 3 * deviation / errors.size**0.5
    each = np.sqrt((errors**2).mean(axis=0))
    assert each.max() < bound * (1 + 4 / math.sqrt(2 * len(errors)))


def test_the_bound_is_met_where_every_fraction_is_one_half() -> None:
    encoding = RingEncoding(1.0, 10)
    rows = np.full((10, 400), 1000.5 / encoding.steps)
    errors = errors_of_the_mean(encoding, rows, [1.0] * 10, 20)
    assert float(np.sqrt((errors**2).mean())) == pytest.approx(encoding.mean_error(10), rel=0.03)


def test_the_bound_is_the_formula() -> None:
    assert WEIGHTED.mean_error(25, 5.0) == 0.5 / (2 * WEIGHTED.steps * 0.1 * 5)
    assert RingEncoding(0.5, 100).mean_error(25) == 0.5 / (2 * WEIGHTED.steps * 5)
    assert WEIGHTED.mean_error(25, 0.0) == WEIGHTED.mean_error(25) == WEIGHTED.mean_error(0, 1.0) == math.inf
