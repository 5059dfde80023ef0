"""The rotation keeps lengths, can be undone, and spreads whatever it is given."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedml_core.errors import ConfigError
from fedml_core.privacy import rotation
from fedml_core.privacy.rotation import Rotation, padded_size

SIZES = (1, 2, 3, 5, 12, 20, 28, 64, 650, 1000, 33_000, 70_000)


def drawn(size: int, dtype: type = np.float64) -> np.ndarray:
    return np.random.default_rng(size).normal(size=size).astype(dtype)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-13), (np.float32, 1e-5)])
def test_a_rotation_keeps_the_norm_and_can_be_undone(size: int, dtype: type, tolerance: float) -> None:
    # "a rotation keeps the L2 norm, and `back` undoes `forward`, both up to the rounding of their floats."
    values, turn = drawn(size, dtype), Rotation(size, "a round")
    rotated = turn.forward(values)
    assert rotated.shape == (turn.dimension,) and rotated.dtype == dtype
    assert np.linalg.norm(rotated) == pytest.approx(np.linalg.norm(values), rel=tolerance)
    np.testing.assert_allclose(turn.back(rotated), values, rtol=0, atol=tolerance)


@pytest.mark.parametrize("size", SIZES)
def test_one_large_coordinate_is_spread_over_all_of_them(size: int) -> None:
    values = np.zeros(size)
    values[size // 2] = 3.0
    turn = Rotation(size, "a round")
    np.testing.assert_allclose(np.abs(turn.forward(values)), 3.0 / np.sqrt(turn.dimension), rtol=1e-12)


def test_the_coordinates_of_a_worst_case_are_spread_as_a_gaussian_is() -> None:
    # All equal is what a plain Hadamard matrix would gather into one coordinate; random signs prevent it.
    size = 1 << 16
    rotated = Rotation(size, "a round").forward(np.full(size, 1 / 256))
    assert np.abs(rotated).max() < 6 / 256
    assert np.std(rotated) == pytest.approx(1 / 256, rel=1e-3)


def test_equal_keys_rotate_alike_and_others_otherwise() -> None:
    # "equal keys and sizes rotate alike on every machine, up to that rounding."
    values = drawn(1000)
    first = Rotation(1000, "one").forward(values)
    assert np.array_equal(first, Rotation(1000, "one").forward(values))
    assert abs(np.corrcoef(first, Rotation(1000, "two").forward(values))[0, 1]) < 0.15
    # A fixed point, so that another version of the code cannot rotate otherwise without anybody's seeing it.
    assert "".join("+" if sign > 0 else "-" for sign in rotation._signs("one", 16)) == "++-+----+--+-+-+"


def test_the_key_is_public_and_in_plain_sight() -> None:
    # "the key is public; no protection depends on it, only that few coordinates outgrow their bits."
    assert "one" in repr(Rotation(8, "one"))


def test_powers_of_two_rotate_as_the_textbook_matrix_does() -> None:
    textbook = np.ones((1, 1))
    while len(textbook) < 256:
        textbook = np.block([[textbook, textbook], [textbook, -textbook]])
    values, turn = drawn(256), Rotation(256, "k")
    signs = rotation._signs("k", 256)
    np.testing.assert_allclose(turn.forward(values), textbook @ (values * signs) / 16, atol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 4, 8, 16, 32, 12, 20, 28])
def test_every_factor_is_a_hadamard_matrix(order: int) -> None:
    matrix = rotation._hadamard(order)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(order), atol=1e-12)
    np.testing.assert_allclose(np.abs(matrix), 1 / np.sqrt(order), rtol=1e-12)


@settings(max_examples=200, deadline=None)
@given(st.integers(min_value=20, max_value=1 << 34))
def test_padding_adds_less_than_a_quarter(size: int) -> None:
    # "it is below 5/4 of `size`, for sizes from 20 on."
    padded = padded_size(size)
    assert size <= padded < 1.25 * size
    assert np.prod(np.array(rotation._factors(padded), dtype=object)) == padded


def test_what_has_no_size_is_refused() -> None:
    for size in (0, -1, 1 << 35):
        with pytest.raises(ConfigError, match="size must be"):
            padded_size(size)
