"""What `fedml_core.secagg.masks` and `keystream` promise, against AES blocks and published vectors."""

from __future__ import annotations

import hashlib
import tracemalloc
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedml_core.errors import SecureAggregationError
from fedml_core.secagg.keystream import CHUNK_SIZE, Keystream
from fedml_core.secagg.masks import add_mask, add_masks, ring_type
from fedml_core.secagg.secrets import Secret

BITS = pytest.mark.parametrize("bits", [16, 32, 64])
# The smallest vector that has two threads' worth of work at a few masks, and does not end at a chunk's end.
LONG = CHUNK_SIZE + 4096 * 3 + 5


def key_of(number: int) -> bytes:
    return hashlib.sha256(b"key %d" % number).digest()


def oracle(key: bytes, bits: int, size: int) -> list[int]:
    """The mask, block by block, from AES itself."""
    blocks = -(-size * bits // 128)
    counters = b"".join(block.to_bytes(16, "big") for block in range(blocks))
    stream = Cipher(algorithms.AES256(key), modes.ECB()).encryptor().update(counters)  # the oracle
    width = bits // 8
    return [int.from_bytes(stream[place * width : (place + 1) * width], "little") for place in range(size)]


def chi_square(part: NDArray[Any]) -> float:
    """The largest statistic (255 degrees of freedom) of any byte of the elements."""
    columns = part.view(np.uint8).reshape(len(part), -1)
    expected = len(part) / 256
    counts = [np.bincount(columns[:, place], minlength=256) for place in range(columns.shape[1])]
    return max(float((((count - expected) ** 2) / expected).sum()) for count in counts)


def test_the_keystream_is_that_of_nist_sp_800_38a_f_5_5() -> None:
    """equal keys and blocks give equal bytes on every platform: those of AES-256-CTR from that counter on."""
    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    plain = bytes.fromhex(
        "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
        "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710"
    )
    expected = bytes.fromhex(
        "601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5"
        "2b0930daa23de94ce87017ba2d84988ddfc9c58db67aada613c2dd08457941a6"
    )
    words = np.zeros(64, np.uint8)
    stream = Keystream(key, int("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff", 16))
    stream.into(words[:20])
    stream.into(words[20:])
    assert bytes(words ^ np.frombuffer(plain, np.uint8)) == expected


def test_a_keystream_can_begin_at_any_block() -> None:
    whole, tail = np.empty(64, np.uint8), np.empty(32, np.uint8)
    Keystream(key_of(1)).into(whole)
    Keystream(Secret(key_of(1)), 2).into(tail)
    assert bytes(whole[32:]) == bytes(tail)


def test_whoever_lacks_the_key_sees_other_bytes() -> None:
    """to whoever does not know the key, the bytes are as good as random."""
    words = np.empty(CHUNK_SIZE, np.uint8)
    Keystream(key_of(2)).into(words)
    assert chi_square(words) < 345
    other = np.empty_like(words)
    Keystream(key_of(3)).into(other)
    assert abs(float((words == other).mean()) - 1 / 256) < 5 * (1 / 256 / CHUNK_SIZE) ** 0.5


@BITS
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_mask_is_the_keystream_as_little_endian_elements(bits: int, size: int) -> None:
    total = np.zeros(size, ring_type(bits))
    add_mask(total, key_of(1))
    assert total.tolist() == oracle(key_of(1), bits, size)
    add_mask(total, Secret(key_of(1)))
    assert total.tolist() == [2 * word % 2**bits for word in oracle(key_of(1), bits, size)]


@BITS
@pytest.mark.parametrize("threads", [1, 2, 3, 64])
def test_the_number_of_threads_changes_nothing(bits: int, threads: int) -> None:
    """the result is the same, bit for bit, whatever the number of threads and the order of the masks."""
    masks = [(key_of(number), 1 if number % 3 else -1) for number in range(12)]
    one, many = np.arange(LONG).astype(ring_type(bits)), np.arange(LONG).astype(ring_type(bits))
    expected = np.arange(LONG).astype(ring_type(bits))
    for key, sign in masks:
        words = np.empty_like(expected)
        stream, step = Keystream(key), CHUNK_SIZE // words.itemsize
        for start in range(0, LONG, step):
            stream.into(words[start : start + step])
        expected += words if sign == 1 else -words
    add_masks(one, masks)
    add_masks(many, reversed(masks), threads=threads)
    assert np.array_equal(one, expected)
    assert np.array_equal(many, expected)


@settings(max_examples=30)
@given(st.integers(0, 3000), st.sampled_from([16, 32, 64]), st.lists(st.integers(0, 50), max_size=6, unique=True))
def test_masks_cancel_in_pairs(size: int, bits: int, numbers: list[int]) -> None:
    """a mask that is added once and subtracted once leaves the vector as it was."""
    before = np.arange(size).astype(ring_type(bits)) * 40_503
    total = before.copy()
    add_masks(total, [(key_of(number), 1) for number in numbers])
    assert size < 16 or not numbers or not np.array_equal(total, before)
    add_masks(total, [(key_of(number), -1) for number in reversed(numbers)])
    assert np.array_equal(total, before)


def test_the_masks_of_a_cohort_cancel_in_its_sum() -> None:
    members, size = range(5), 1000
    total = np.zeros(size, np.uint32)
    for member in members:
        vector = np.full(size, member, np.uint32)
        pairs = [(key_of(min(member, other) * 100 + max(member, other)), other) for other in members if other != member]
        add_masks(vector, [(key, 1 if member < other else -1) for key, other in pairs])
        total += vector
    assert total.tolist() == [sum(members)] * size


@BITS
def test_a_masked_vector_is_uniform_in_every_byte(bits: int) -> None:
    """a vector with at least one mask whose key an observer does not know is uniformly random to it."""
    # 345 is passed by chance with a probability of 1e-4, for each byte of a fixed key.
    total = np.arange(1 << 16).astype(ring_type(bits)) % 100
    assert chi_square(total) > 345
    add_mask(total, key_of(5))
    assert chi_square(total) < 345


def test_a_mask_that_misses_one_value_in_a_hundred_would_be_seen() -> None:
    total = np.zeros(1 << 16, np.uint16)
    add_mask(total, key_of(5))
    assert chi_square(np.where(total % 256 == 7, 8, total).astype(np.uint16)) > 345


def test_memory_does_not_grow_with_the_vector() -> None:
    """memory beyond the vector is one chunk and one cipher per mask for each thread, whatever the vector's length."""
    # Keystream: keystreams are written over the caller's buffer, and nothing as long as it is allocated.
    total = np.zeros(16 * CHUNK_SIZE, np.uint32)
    tracemalloc.start()
    try:
        add_masks(total, [(key_of(1), 1), (key_of(2), -1)], threads=2)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * CHUNK_SIZE + 256 * 1024 < total.nbytes / 16


READ_ONLY = np.zeros(8, np.uint32)
READ_ONLY.flags.writeable = False


@pytest.mark.parametrize(
    ("total", "said"),
    [
        (np.zeros(8, np.int32), "got int32"),
        (np.zeros(8, np.uint8), "got uint8"),
        (np.zeros(8, ">u4"), "got >u4"),
        (np.zeros(8, np.float32), "got float32"),
        (np.zeros((2, 4), np.uint32), r"got uint32 \(2, 4\)"),
        (np.zeros(16, np.uint32)[::2], "contiguous and writable"),
        (READ_ONLY, "contiguous and writable"),
    ],
)
def test_what_is_no_ring_vector_is_refused(total: NDArray[Any], said: str) -> None:
    with pytest.raises(SecureAggregationError, match=said):
        add_mask(total, key_of(1))
    assert not total.any()


@pytest.mark.parametrize("bad", [(bytes(31), 1), (bytes(33), 1), (key_of(1), 0), (key_of(1), 2)])
def test_nothing_is_added_if_one_mask_is_refused(bad: tuple[bytes, int]) -> None:
    """`total` is unchanged if anything is refused."""
    total = np.zeros(8, np.uint32)
    with pytest.raises(SecureAggregationError, match="a mask is a key of 32 bytes and a sign of 1 or -1"):
        add_masks(total, [(key_of(1), 1), bad])
    with pytest.raises(SecureAggregationError, match="threads must be >= 1, got 0"):
        add_masks(total, [(key_of(1), 1)], threads=0)
    assert not total.any()


def test_a_wiped_key_masks_nothing() -> None:
    total, key = np.zeros(8, np.uint32), Secret(key_of(1))
    key.wipe()
    with pytest.raises(SecureAggregationError, match="wiped"):
        add_masks(total, [(key_of(2), 1), (key, 1)])
    assert not total.any()


@pytest.mark.parametrize("bits", [8, 0, 31, 128])
def test_a_ring_of_another_size_is_refused(bits: int) -> None:
    with pytest.raises(SecureAggregationError, match=f"16, 32 or 64 bits, got {bits}"):
        ring_type(bits)


def test_a_keystreams_key_has_32_bytes() -> None:
    with pytest.raises(SecureAggregationError, match="32 bytes, got 16"):
        Keystream(bytes(16))
