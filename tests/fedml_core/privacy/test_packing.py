"""Packed vectors add up as the vectors do, in fewer bytes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedml_core.errors import ConfigError
from fedml_core.privacy.packing import SUM_BITS, pack, packed_length, unpack, word_bits
from fedml_core.secagg.masks import add_mask, ring_type

sums = st.integers(min_value=2, max_value=6)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SUM_BITS), st.integers(min_value=1, max_value=20), sums, st.integers(0, 2**32))
def test_a_sum_of_packed_vectors_is_the_packed_sum(bits: int, size: int, clients: int, seed: int) -> None:
    # "unpacked, a sum of packed vectors is the sum of the vectors, where each coordinate's fits the bits."
    most = (2 ** (bits - 1) - 1) // clients
    rows = np.random.default_rng(seed).integers(-most, most, size=(clients, size), endpoint=True)
    rows[:, 0] = most
    rows[:, -1] = -most
    total = sum((pack(row, bits) for row in rows), np.zeros(packed_length(size, bits), ring_type(word_bits(bits))))
    assert np.array_equal(unpack(total, size, bits), rows.sum(axis=0))


@pytest.mark.parametrize("bits", SUM_BITS)
def test_masks_come_off_a_packed_sum_again(bits: int) -> None:
    # "packing hides nothing; masks do."
    whole = np.arange(-50, 51)
    words = pack(whole, bits)
    assert np.array_equal(unpack(words, 101, bits), whole)
    add_mask(words, bytes(32))
    assert not np.array_equal(unpack(words, 101, bits), whole)
    add_mask(words, bytes(32), -1)
    assert np.array_equal(unpack(words, 101, bits), whole)


@pytest.mark.parametrize("bits", SUM_BITS)
def test_equal_sums_are_equal_words_even_where_they_overflow(bits: int) -> None:
    # "a packed sum is a function of the sums of the coordinates, whatever they are."
    drawn = np.random.default_rng(5).integers(-(2**40), 2**40, size=(2, 30))
    moved = drawn + np.array([[7], [-7]])
    one, other = (pack(rows[0], bits) + pack(rows[1], bits) for rows in (drawn, moved))
    assert np.array_equal(one, other)


def test_twenty_bits_take_two_thirds_of_the_next_ring() -> None:
    sizes = {bits: packed_length(1_000_000, bits) * word_bits(bits) // 8 for bits in SUM_BITS}
    assert sizes == {16: 2_000_000, 20: 2_666_672, 32: 4_000_000}


@pytest.mark.parametrize("bits", [0, 8, 24, 64, True, "16"])
def test_other_bits_are_refused(bits: int) -> None:
    with pytest.raises(ConfigError, match="bits must be 16, 20 or 32"):
        word_bits(bits)
