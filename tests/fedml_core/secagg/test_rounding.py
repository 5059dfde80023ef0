"""What `fedml_core.secagg.rounding` promises, against exact fractions."""

from __future__ import annotations

import hashlib
from fractions import Fraction
from math import ceil, floor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedml_core.errors import SecureAggregationError
from fedml_core.secagg import rounding
from fedml_core.secagg.keystream import Keystream
from fedml_core.secagg.rounding import Rounder

CLIP = 0.7
TYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64])
LIMITS = pytest.mark.parametrize("limit", [327.0, 21_474_836.0, 2.0**31 - 1, 2.0**31, 2.0**52], ids=str)


def rounded(values: NDArray[Any], limit: float, key: bytes = bytes(32), clip: float = CLIP) -> tuple[list[int], int]:
    out = np.empty(len(values), "<u8")
    clipped = Rounder(values.dtype, clip).round(values, limit, Keystream(key), out)
    return out.view("<i8").tolist(), clipped


@TYPES
@LIMITS
def test_the_clip_becomes_the_limit_exactly(dtype: type[np.floating[Any]], limit: float) -> None:
    """no result is larger in absolute value than `limit`, rounded up; one of at least `clip` gives `limit` itself."""
    # 0.5 is a number of both types; 0.7 is none, so that only larger numbers reach it.
    keys = [hashlib.sha256(bytes([number])).digest() for number in range(20)]
    beyond = np.array([CLIP * 1.001, -CLIP * 1.001, 3e38, -3e38], dtype)
    assert all(rounded(beyond, limit, key) == ([int(limit), -int(limit)] * 2, 4) for key in keys)
    at = np.array([0.5, -0.5, 0.0, -0.0], dtype)
    assert all(rounded(at, limit, key, clip=0.5) == ([int(limit), -int(limit), 0, 0], 0) for key in keys)


@TYPES
@pytest.mark.parametrize("limit", [100.25, 2.0**31 + 0.5, 0.125, 0.0])
def test_a_limit_between_whole_numbers_is_rounded_like_the_rest(dtype: type[np.floating[Any]], limit: float) -> None:
    found, clipped = rounded(np.array([1.0, -1.0] * 2000, dtype), limit)
    assert clipped == 4000
    assert set(found[::2]) == {floor(limit), ceil(limit)}
    assert set(found[1::2]) == {-floor(limit), -ceil(limit)}
    # 4 standard errors of 4,000 draws with the limit's fraction
    assert abs(float(np.mean(np.abs(found))) - limit) <= 4 * 0.5 / 4000**0.5


@settings(max_examples=60)
@given(
    st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=20),
    st.sampled_from([100.0, 12_345.6, 2.0**31 - 1, 2.0**31 + 3, 2.0**45, 2.0**52]),
    st.integers(0, 2**32),
)
def test_rounding_is_that_of_exact_fractions(values: list[float], limit: float, seed: int) -> None:
    """the scaled coordinate is rounded up with a probability equal to its fraction, up to 2^-32, and else down."""
    key = hashlib.sha256(b"%d" % seed).digest()
    words = np.empty(len(values), "<u4")
    Keystream(key).into(words)
    found, _ = rounded(np.array(values, np.float32), limit, key, clip=0.5)
    for value, word, got in zip(values, words.tolist(), found, strict=True):
        # 0.5 is a power of two: limit / clip and its product with a float32 lose at most one float64 rounding.
        scaled = Fraction(max(-limit, min(limit, value * (limit / 0.5))))
        fraction = scaled - floor(scaled)
        # Up exactly where the word lies in a range that is as wide as the fraction, to within one of 2^32 words.
        low, high = floor(fraction * 2**32), ceil(fraction * 2**32)
        up = got - floor(scaled)
        if limit < 2**31:
            assert (word >= 2**32 - low) <= up <= (word >= 2**32 - high)
        else:
            assert up == (word < high)


@TYPES
@LIMITS
def test_rounding_is_unbiased_and_as_wide_as_it_must_be(dtype: type[np.floating[Any]], limit: float) -> None:
    size = 20_000
    step = 0.5 / limit  # of one whole number
    values = np.full(size, 100 * step * 1.003, dtype)  # 100 and a fraction
    exact = float(Fraction(float(values[0])) * Fraction(limit) / Fraction(0.5))
    fraction = exact - floor(exact)
    found = np.array(rounded(values, limit, clip=0.5)[0], dtype=np.float64) - floor(exact)
    deviation = (fraction * (1 - fraction)) ** 0.5
    assert set(found) <= {0.0, 1.0}
    assert abs(found.mean() - fraction) <= 4 * deviation / size**0.5
    assert abs(found.std() - deviation) <= 0.01


@pytest.mark.parametrize("clip", [number / 97 for number in range(1, 40)])
def test_every_clip_becomes_the_limit_exactly(clip: float) -> None:
    # One float64 step less would be half a whole number less, which half of the words round down.
    assert rounded(np.array([clip, -clip] * 10), 2.0**52, clip=clip) == ([2**52, -(2**52)] * 10, 0)


@TYPES
@pytest.mark.parametrize("clip", [0.7, 0.1, 0.5])  # as float32: below itself, above itself, itself
def test_only_coordinates_above_the_clip_are_counted(dtype: type[np.floating[Any]], clip: float) -> None:
    nearest = dtype(clip)
    around = np.array([np.nextafter(nearest, dtype(0)), nearest, np.nextafter(nearest, dtype(1)), 0], dtype)
    expected = sum(Fraction(float(value)) > Fraction(clip) for value in around)
    assert rounded(around, 1000.0, clip=clip)[1] == expected
    assert rounded(-around, 1000.0, clip=clip)[1] == expected


@TYPES
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 70_000])
def test_a_coordinate_that_is_not_finite_is_refused(dtype: type[np.floating[Any]], bad: float, place: int) -> None:
    """a coordinate that is not finite is refused, before or after others were written."""
    values = np.zeros(70_001, dtype)
    values[place] = bad
    with pytest.raises(SecureAggregationError, match="NaN or infinite coordinates; nothing was sent"):
        rounded(values, 1000.0)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.linspace(-1, 1, 5000, dtype=np.float32)
    whole = [rounded(values, limit) for limit in (1000.0, 2.0**40)]
    monkeypatch.setattr(rounding, "_CHUNK", 64)
    assert [rounded(values, limit) for limit in (1000.0, 2.0**40)] == whole


def test_the_largest_numbers_are_clipped_like_others() -> None:
    values = np.array([1.7e308, -1.7e308, 5e-324])
    assert rounded(values, 2.0**52, clip=1e-30)[0][:2] == [2**52, -(2**52)]


def test_a_rounded_vector_is_in_clear() -> None:
    """runs at the client; its result hides nothing until a mask is on it."""
    assert rounded(np.array([0.35, -0.35]), 1000.0)[0] == [500, -500]
