"""What `fedml_core.secagg.scalars` promises, against exact fractions."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedml_core.errors import ConfigError, SecureAggregationError
from fedml_core.secagg.scalars import Count, Measure, Scalar, check_names, from_digits, to_digits

SECRET = 123.456


def summed(scalar: Scalar, values: list[Any], limb_bits: int, clients: int) -> float:
    """Encode each value, add up digit by digit, and decode the sums."""
    count = scalar.digits(limb_bits, clients)
    rows = [to_digits(scalar.to_whole(value, clients), count, limb_bits) for value in values]
    assert all(abs(digit) < 1 << limb_bits for row in rows for digit in row)
    return scalar.from_whole(from_digits([sum(column) for column in zip(*rows, strict=True)], limb_bits), clients)


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=20), st.integers(1, 52))
def test_counts_add_up_exactly(values: list[int], limb_bits: int) -> None:
    """the sum of `Count`s is exact, in every ring."""
    assert summed(Count("examples"), values, limb_bits, len(values)) == sum(values)


@given(
    st.floats(1e-200, 1e200),
    st.lists(st.floats(-1, 1), min_size=1, max_size=20),
    st.sampled_from([6, 8, 24, 52]),
    st.sampled_from([0, 1000]),
)
def test_measures_add_up_within_the_stated_error(
    scale: float, shares: list[float], limb_bits: int, more_clients: int
) -> None:
    """the sum of `Measure`s is within 2^-60 of one client's `scale` of the exact sum, and then rounded to float64."""
    values = [max(-scale, min(scale, share * scale)) for share in shares]
    exact = sum(Fraction(value) for value in values)
    found = summed(Measure("loss", scale), values, limb_bits, len(values) + more_clients)
    allowed = Fraction(scale) / 2**60 + Fraction(math.ulp(found))
    assert abs(Fraction(found) - exact) <= allowed


@pytest.mark.parametrize("power", range(-53, -36))
def test_all_roundings_together_stay_within_the_stated_error(power: int) -> None:
    # The same fraction of a step, whatever a step is, in all of 1,000 clients: every rounding goes the same way.
    clients, measure = 1000, Measure("loss", 1.0)
    value = 0.5 + 0.45 * math.ldexp(1.0, power)
    found = summed(measure, [value] * clients, 8, clients)
    assert abs(Fraction(found) - clients * Fraction(value)) <= Fraction(1, 2**60) + Fraction(math.ulp(found))


@pytest.mark.parametrize("value", [-1, 11, 0.5, math.nan, math.inf, "3", None, 10**400])
def test_a_count_outside_its_range_is_refused(value: Any) -> None:
    with pytest.raises(SecureAggregationError, match="scalar 'examples' must be a whole number from 0 to 10; nothing"):
        Count("examples", 10).to_whole(value, 5)


@pytest.mark.parametrize("value", [SECRET, -SECRET, math.nan, math.inf, -math.inf, "3", None])
def test_a_measure_outside_its_range_is_refused_without_being_shown(value: Any) -> None:
    """a number outside its range is refused, by a message that names the range and never the number."""
    # Trust: server sees only sums.
    with pytest.raises(SecureAggregationError) as caught:
        Measure("loss", 100.0).to_whole(value, 5)
    assert str(caught.value) == "scalar 'loss' must be between -100 and 100; nothing was sent"


def test_the_ends_of_each_range_are_inside() -> None:
    assert [Count("n", 10).to_whole(value, 5) for value in (0, 10, 10.0, True)] == [0, 10, 10, 1]
    measure = Measure("loss", 3.0)
    assert measure.to_whole(3.0, 5) == -measure.to_whole(-3.0, 5) > 2**40


@given(st.integers(-(2**60), 2**60), st.integers(1, 52))
def test_digits_give_their_number_back(whole: int, limb_bits: int) -> None:
    count = -(-whole.bit_length() // limb_bits)
    digits = to_digits(whole, count, limb_bits)
    assert from_digits(digits, limb_bits) == whole
    assert all(digit * whole >= 0 for digit in digits)


@pytest.mark.parametrize("most", [0, -1, 1.5, True, 2**52 + 1])
def test_a_count_that_nothing_fits_is_refused(most: Any) -> None:
    with pytest.raises(ConfigError, match="most of 'n' must be"):
        Count("n", most)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf, "1"])
def test_a_measure_that_nothing_fits_is_refused(scale: Any) -> None:
    with pytest.raises(ConfigError, match="scale of 'x' must be"):
        Measure("x", scale)


@pytest.mark.parametrize("scalars", [(Count("a"), Measure("a", 1.0)), (Count(""),), (Count(3),)])  # type: ignore[arg-type]  # the last is the point
def test_names_are_distinct_text(scalars: tuple[Scalar, ...]) -> None:
    with pytest.raises(ConfigError, match="scalars must have distinct names, got "):
        check_names(scalars)
