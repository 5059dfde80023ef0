"""The field's arithmetic is that of Python's integers modulo 2^31 - 1."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedml_core.errors import SecureAggregationError
from fedml_core.secagg import field
from fedml_core.secagg.field import (
    LIMBS,
    PRIME,
    Elements,
    LeftFactor,
    add,
    from_limbs,
    inverse,
    matmul,
    multiply,
    subtract,
    to_limbs,
    well_formed,
)
from tests.sources import calls, our_files, uses

EDGES = [0, 1, 2, 2**15, 2**16 - 1, 2**16, 2**30 - 1, 2**30, PRIME - 2, PRIME - 1]
element = st.one_of(st.sampled_from(EDGES), st.integers(0, PRIME - 1))
pairs = st.lists(st.tuples(element, element), min_size=1, max_size=40)


def elements(values: object) -> Elements:
    return np.array(values, np.uint32)


def scattered(*shape: int) -> Elements:
    """Return elements that fill the field, the edges first, always the same."""
    count = int(np.prod(shape))
    values = [*EDGES, *(pow(7, power, PRIME) for power in range(1, count + 1))][:count]
    return elements(values).reshape(shape)


def is_canonical(values: Elements) -> bool:
    return values.dtype == np.uint32 and not np.any(values >= PRIME)


@given(pairs)
def test_sums_differences_and_products_are_those_of_integers(numbers: list[tuple[int, int]]) -> None:
    """Guarantees: every result is canonical and exact, the number that Python's integers give modulo p."""
    a, b = elements([x for x, _ in numbers]), elements([y for _, y in numbers])
    assert add(a, b).tolist() == [(x + y) % PRIME for x, y in numbers]
    assert subtract(a, b).tolist() == [(x - y) % PRIME for x, y in numbers]
    assert multiply(a, b).tolist() == [x * y % PRIME for x, y in numbers]
    assert is_canonical(add(a, b))
    assert is_canonical(subtract(a, b))
    assert is_canonical(multiply(a, b))


@given(st.lists(element.filter(bool), min_size=1, max_size=20))
def test_inverses_are_those_of_integers(numbers: list[int]) -> None:
    assert inverse(elements(numbers)).tolist() == [pow(x, -1, PRIME) for x in numbers]


def test_zero_has_no_inverse() -> None:
    with pytest.raises(SecureAggregationError, match="0 has no inverse"):
        inverse(elements([1, 0]))


def product_of_integers(a: Elements, b: Elements) -> NDArray[Any]:
    result: NDArray[Any] = (a.astype(object) @ b.astype(object)) % PRIME
    return result


@pytest.mark.parametrize(("rows", "inner", "columns"), [(1, 1, 1), (3, 7, 5), (1, 300, 4), (20, 2, 1), (4, 64, 33)])
def test_a_matrix_product_is_that_of_integers(rows: int, inner: int, columns: int) -> None:
    a, b = scattered(rows, inner), scattered(inner, columns)
    product = matmul(a, b)
    assert is_canonical(product)
    assert np.array_equal(product, product_of_integers(a, b))
    extreme = np.full((rows, inner), PRIME - 1, np.uint32), np.full((inner, columns), PRIME - 1, np.uint32)
    assert np.all(matmul(*extreme) == inner)  # (-1) (-1) is 1


@pytest.mark.parametrize(("inner_at_once", "block"), [(1, 1), (2, 3), (5, 100), (64, 7)])
def test_a_product_in_pieces_is_the_product(monkeypatch: pytest.MonkeyPatch, inner_at_once: int, block: int) -> None:
    monkeypatch.setattr(field, "_INNER", inner_at_once)
    monkeypatch.setattr(field, "_BLOCK_ELEMENTS", block)
    a, b = scattered(6, 13), scattered(13, 9)
    assert np.array_equal(matmul(a, b), product_of_integers(a, b))


def test_a_product_longer_than_float64_adds_up_exactly_is_exact() -> None:
    # All products are as large as can be; two elements set apart the places where the sum is cut.
    inner = field._INNER + 3
    a, b = np.full((1, inner), PRIME - 1, np.uint32), np.full((inner, 1), PRIME - 1, np.uint32)
    a[0, 0], a[0, -1] = 2**16 - 1, 2**16 - 1
    assert int(matmul(a, b)[0, 0]) == (inner - 2 - 2 * (2**16 - 1)) % PRIME


def test_so_many_products_of_halves_stay_exact_and_no_more_are_added_up() -> None:
    assert field._INNER * (2**16 - 1) ** 2 <= 2**53
    assert field._INNER * (2 * (2**16 - 1) * (2**15 - 1)) <= 2**53
    with pytest.raises(AssertionError, match="more products than float64 adds up exactly"):
        field._partial_product(np.zeros((2, field._INNER + 1)), np.zeros((field._INNER + 1, 1), np.uint32))


def test_empty_products_are_zero() -> None:
    assert matmul(np.zeros((2, 0), np.uint32), np.zeros((0, 3), np.uint32)).tolist() == [[0, 0, 0]] * 2
    assert matmul(scattered(2, 3), np.zeros((3, 0), np.uint32)).shape == (2, 0)


def test_factors_that_do_not_fit_are_refused() -> None:
    with pytest.raises(SecureAggregationError, match=r"fitting shapes, got \(2, 3\) and \(2, 3\)"):
        matmul(scattered(2, 3), scattered(2, 3))
    with pytest.raises(SecureAggregationError, match="must be a matrix, got 1 dimensions"):
        LeftFactor(scattered(3))


def test_a_left_factor_takes_sixteen_bytes_an_element() -> None:
    """Guarantees: what it holds takes 16 bytes an element, `size_bytes` in all."""
    factor = LeftFactor(scattered(5, 11))
    held = sum(value.nbytes for value in vars(factor).values() if isinstance(value, np.ndarray))
    assert factor.size_bytes == held == 16 * 5 * 11


def test_no_argument_is_changed() -> None:
    """Guarantees: no argument is changed."""
    a, b = scattered(4, 4), scattered(4, 4)[::-1].copy()
    secrets = np.arange(64, dtype=np.uint8).reshape(2, 32)
    limbs = to_limbs(secrets)
    for each in (a, b, secrets, limbs):
        each.setflags(write=False)  # whoever writes gets an error
    add(a, b), subtract(a, b), multiply(a, b), matmul(a, b), inverse(elements([3])), to_limbs(secrets)
    assert np.array_equal(from_limbs(limbs), secrets)
    assert np.array_equal(a, scattered(4, 4))


secret = st.one_of(st.binary(min_size=32, max_size=32), st.sampled_from([bytes(32), b"\xff" * 32, b"\x01" + bytes(31)]))


@given(st.lists(secret, max_size=5))
def test_limbs_are_thirty_bits_each_from_the_lowest_on(secrets: list[bytes]) -> None:
    rows = np.frombuffer(b"".join(secrets), np.uint8).reshape(-1, 32)
    limbs = to_limbs(rows)
    numbers = [int.from_bytes(each, "little") for each in secrets]
    assert limbs.tolist() == [[number >> 30 * place & (2**30 - 1) for place in range(LIMBS)] for number in numbers]
    assert is_canonical(limbs)
    assert np.all(well_formed(limbs))
    assert np.array_equal(from_limbs(limbs), rows)


@given(st.lists(st.sampled_from([0, 1, 2**16 - 1, 2**16, 2**30 - 1, 2**30, PRIME - 1]), min_size=LIMBS, max_size=LIMBS))
def test_limbs_out_of_range_are_no_secret(row: list[int]) -> None:
    """Guarantees: whatever is returned gives the same limbs again, so no two rows of limbs are one secret."""
    limbs = elements([row])
    fits = all(limb < 2**30 for limb in row[:-1]) and row[-1] < 2**16
    assert well_formed(limbs).tolist() == [fits]
    if fits:
        assert np.array_equal(to_limbs(from_limbs(limbs)), limbs)
    else:
        with pytest.raises(SecureAggregationError, match="1 of 1 reconstructed values are not secrets"):
            from_limbs(limbs)


@pytest.mark.parametrize(
    ("limbs", "message"),
    [
        (np.full((1, LIMBS), PRIME, np.uint32), "limbs must be below 2\\^31 - 1"),
        (np.zeros((1, LIMBS), np.uint64), "limbs must be uint32 of shape \\(1, 9\\), got uint64"),
        (np.zeros((1, LIMBS + 1), np.uint32), "got uint32 of shape \\(1, 10\\)"),
        (np.zeros((2, LIMBS, 1), np.uint32), "got uint32 of shape \\(2, 9, 1\\)"),
    ],
)
def test_what_are_no_limbs_is_refused(limbs: Elements, message: str) -> None:
    with pytest.raises(SecureAggregationError, match=message):
        from_limbs(limbs)


@pytest.mark.parametrize(
    "secrets", [np.zeros((1, 31), np.uint8), np.zeros(32, np.uint8), np.zeros((1, 32), np.int8), np.zeros((1, 32))]
)
def test_what_are_no_secrets_is_refused(secrets: NDArray[Any]) -> None:
    with pytest.raises(SecureAggregationError, match=r"secrets must be bytes of shape \(m, 32\), got"):
        to_limbs(secrets)


def test_the_field_has_no_way_to_tell_anybody() -> None:
    """Trust: nothing here draws, keeps, prints or sends anything."""
    file = "fedml_core/secagg/field.py"
    text = our_files()[file]
    imports = {use.target.split(".")[0] for use in uses(file, text) if use.is_import}
    assert imports == {"__future__", "typing", "numpy", "fedml_core"}
    drawing = [call for call in calls(file, text) if "random" in call.function]
    assert drawing == []
    assert not any(word in text for word in ("print(", "open(", "global ", "_cache", "setattr"))
