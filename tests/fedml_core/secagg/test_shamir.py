"""A threshold of shares opens a secret, fewer say nothing, and what is no share is refused."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedml_core.errors import SecureAggregationError, ThresholdError
from fedml_core.secagg import shamir
from fedml_core.secagg.field import LIMBS, PRIME, Elements, from_limbs, to_limbs
from fedml_core.secagg.shamir import (
    SHARE_BYTES,
    Reconstructor,
    as_points,
    from_bytes,
    powers_of,
    reconstruct,
    share,
    to_bytes,
    uniform,
    weights_at_zero,
)


class Entropy:
    """Stands in for the operating system: the same bytes in every run, and what was asked for."""

    def __init__(self, seed: bytes = b"") -> None:
        self.seed, self.asked = seed, list[int]()

    def urandom(self, size: int) -> bytes:
        self.asked.append(size)
        return hashlib.shake_256(self.seed + len(self.asked).to_bytes(4, "big")).digest(size)


@pytest.fixture(autouse=True)
def entropy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Entropy]:
    source = Entropy()
    monkeypatch.setattr("os.urandom", source.urandom)
    yield source


def secrets(count: int, seed: bytes = b"secret") -> NDArray[np.uint8]:
    return np.frombuffer(hashlib.shake_256(seed).digest(32 * count), np.uint8).reshape(count, 32)


def value_at(coefficients: list[int], point: int) -> int:
    result = 0
    for coefficient in reversed(coefficients):
        result = (result * point + coefficient) % PRIME
    return result


@given(data=st.data(), threshold=st.integers(1, 8), spare=st.integers(0, 4), count=st.integers(0, 3))
def test_any_threshold_of_shares_opens_the_secrets(data: st.DataObject, threshold: int, spare: int, count: int) -> None:
    """Guarantees: any `threshold` shares of a secret open it, in any order and at any time."""
    hidden = secrets(count)
    shares = share(hidden, threshold, threshold + spare)
    places = data.draw(st.permutations(range(threshold + spare)))[:threshold]
    opener = Reconstructor([place + 1 for place in places])
    assert np.array_equal(opener.secrets(shares[places]), hidden)
    assert np.array_equal(opener.secrets(shares[places]), hidden)  # and once more
    assert np.array_equal(reconstruct(opener.points, shares[places]), hidden)


@pytest.mark.parametrize("hidden", [bytes(32), b"\xff" * 32, bytes(31) + b"\x80", b"\x01" + bytes(31)])
def test_secrets_at_the_edges_survive(hidden: bytes) -> None:
    row = np.frombuffer(hidden, np.uint8)[None, :]
    assert reconstruct([5, 2, 4], share(row, 3, 5)[[4, 1, 3]]).tobytes() == hidden


def test_more_shares_than_the_threshold_open_the_same_secret() -> None:
    hidden = secrets(2)
    assert np.array_equal(reconstruct(range(1, 8), share(hidden, 3, 7)), hidden)


def test_shares_are_the_values_of_polynomials_over_the_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = np.array([pow(5, power, PRIME) for power in range(3 * 2 * LIMBS)], np.uint32)
    monkeypatch.setattr(shamir, "uniform", lambda count: drawn[:count])
    hidden = secrets(2)
    shares = share(hidden, 4, 6)
    rows = np.concatenate([to_limbs(hidden).reshape(1, -1), drawn.reshape(3, 2 * LIMBS)])
    expected = [[value_at(column, point) for column in rows.T.tolist()] for point in range(1, 7)]
    assert shares.reshape(6, -1).tolist() == expected
    assert shares.dtype == np.uint32


def test_weights_are_lagranges() -> None:
    points = [3, 1, PRIME - 1, 70_000, 2**30]
    expected = []
    for one in points:
        above = below = 1
        for other in points:
            if other != one:
                above, below = above * other % PRIME, below * (other - one) % PRIME
        expected.append(above * pow(below, -1, PRIME) % PRIME)
    assert weights_at_zero(np.array(points, np.uint32)).tolist() == expected


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 8, 9])
def test_powers_are_powers(count: int) -> None:
    points = np.array([1, 2, PRIME - 1, 12345], np.uint32)
    expected = [[pow(int(x), power, PRIME) for power in range(count)] for x in points]
    assert powers_of(points, count).tolist() == expected


def test_fewer_shares_fit_every_secret_equally_well() -> None:
    """Trust: fewer than `threshold` shares fit every secret equally well, however much their holders compute.

    Of any t - 1 points, the powers x to x^(t - 1) form an invertible matrix: whatever the secret is, each outcome of
    t - 1 shares has exactly one set of coefficients, and all sets are equally likely.
    """
    threshold, holders = 3, 5
    shares = share(secrets(1), threshold, holders)[:, 0]
    for places in itertools.combinations(range(holders), threshold - 1):
        for other in (bytes(32), b"\xff" * 32, bytes(range(32))):
            claimed = to_limbs(np.frombuffer(other, np.uint8)[None, :])
            x, y = (place + 1 for place in places)
            determinant = (x * y * y - y * x * x) % PRIME
            assert determinant != 0
            first, second = (shares[place].astype(object) - claimed[0].astype(object) for place in places)
            scale = pow(determinant, -1, PRIME)
            linear = (first * y * y - second * x * x) * scale % PRIME
            square = (second * x - first * y) * scale % PRIME
            for place in places:
                columns = zip(claimed[0].tolist(), linear, square, strict=True)
                assert [value_at(list(column), place + 1) for column in columns] == shares[place].tolist()


@pytest.mark.parametrize("hidden", [b"\x00", b"\xff"])
def test_one_share_alone_is_uniform_whatever_the_secret(hidden: bytes) -> None:
    row = np.frombuffer(hidden * 32, np.uint8)[None, :]
    shares = share(np.repeat(row, 2000, axis=0), 2, 3)
    for holder in shares:
        counts = np.bincount(holder.ravel() >> 27, minlength=16)  # the four highest of 31 bits
        expected = holder.size / 16
        assert ((counts - expected) ** 2 / expected).sum() < 37.7  # chi-square, 15 degrees: one in a thousand
    differing = np.unique(shares[0].ravel())
    assert len(differing) > 0.999 * shares[0].size  # every coefficient is its own


def test_coefficients_are_fresh_uniform_and_from_the_operating_system(entropy: Entropy) -> None:
    """Guarantees: every coefficient but the secret is uniform in the field, from the operating system, and used
    once.
    """
    hidden = secrets(2)
    first, second = share(hidden, 4, 6), share(hidden, 4, 6)
    assert entropy.asked == [4 * 3 * 2 * LIMBS] * 2
    assert not np.any(first == second)


def test_the_one_value_too_many_is_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guarantees: each element of the field is equally likely: of 31 random bits, the one value too many is drawn
    again.
    """
    answers = [[PRIME, 7, 2**32 - 1, 2**31], [PRIME, 2**31 + PRIME - 1], [3]]
    asked: list[int] = []

    def urandom(size: int) -> bytes:
        asked.append(size)
        return np.array(answers[len(asked) - 1], np.uint32).tobytes()

    monkeypatch.setattr("os.urandom", urandom)
    assert uniform(4).tolist() == [3, 7, PRIME - 1, 0]
    assert asked == [16, 8, 4]


def test_uniform_elements_fill_the_field_evenly() -> None:
    drawn = uniform(64_000)
    counts = np.bincount(drawn % 64, minlength=64)
    assert ((counts - 1000) ** 2 / 1000).sum() < 103.5  # chi-square, 63 degrees: one in a thousand
    assert abs(float(drawn.mean()) / (PRIME / 2) - 1) < 4 / (3 * 64_000) ** 0.5  # four standard deviations
    assert uniform(0).shape == (0,)


def test_a_wrong_share_shows_only_against_a_commitment() -> None:
    """Trust: whoever deals the shares is believed; wrong shares, or shares of another secret, show only when the opened
    secret is compared with a commitment.
    """
    hidden = secrets(1)
    shares = share(hidden, 3, 3).copy()
    weight = int(weights_at_zero(as_points([1, 2, 3]))[1])
    shares[1, 0, 0] = (int(shares[1, 0, 0]) + pow(weight, -1, PRIME)) % PRIME  # adds one to the first limb
    opened = reconstruct([1, 2, 3], shares)
    assert int.from_bytes(opened.tobytes(), "little") == int.from_bytes(hidden.tobytes(), "little") + 1
    other = share(secrets(1, b"another"), 3, 3)
    assert np.array_equal(reconstruct([1, 2, 3], other), secrets(1, b"another"))


def test_a_result_that_is_no_secret_is_an_error() -> None:
    """Guarantees: a result that is no secret of 32 bytes, because a share is wrong, is an error and never a secret."""
    shares = share(np.full((2, 32), 255, np.uint8), 3, 3).copy()
    weight = int(weights_at_zero(as_points([1, 2, 3]))[1])
    shares[1, 1, -1] = (int(shares[1, 1, -1]) + pow(weight, -1, PRIME)) % PRIME  # 2^16 - 1 becomes 2^16
    with pytest.raises(SecureAggregationError, match="1 of 2 reconstructed values are not secrets; a share is wrong"):
        reconstruct([1, 2, 3], shares)
    limbs = Reconstructor([1, 2, 3]).limbs(shares)
    assert limbs[1, -1] == 2**16
    assert from_limbs(limbs[:1]).tobytes() == b"\xff" * 32  # the others are not lost


def test_shares_of_many_secrets_are_those_of_each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shamir, "uniform", lambda count: np.full(count, 12345, np.uint32))
    hidden = secrets(5)
    together = share(hidden, 3, 4)
    for place in range(5):
        assert np.array_equal(share(hidden[place : place + 1], 3, 4)[:, 0], together[:, place])


def test_the_matrix_of_powers_is_kept_within_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = shamir._kept
    monkeypatch.setattr(shamir, "_CACHE_BYTES", 16 * 5 * 3 + 16 * 6 * 3)
    monkeypatch.setattr(shamir, "_BLOCK_ELEMENTS", 20)
    kept.clear()
    hidden = secrets(1)
    for holders in (5, 6, 5, 4, 40):  # 40 never fits: it goes in blocks
        assert np.array_equal(reconstruct([holders, 1, 2], share(hidden, 3, holders)[[holders - 1, 0, 1]]), hidden)
        assert sum(each.size_bytes for each in kept.values()) <= shamir._CACHE_BYTES
    assert list(kept) == [(5, 3), (4, 3)]  # the one used longest ago went first
    factor = kept[5, 3]
    share(hidden, 3, 5)
    assert kept[5, 3] is factor
    kept.clear()


def test_a_matrix_in_blocks_gives_the_same_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shamir, "uniform", lambda count: np.arange(count, dtype=np.uint32))
    whole = share(secrets(2), 7, 23)
    monkeypatch.setattr(shamir, "_CACHE_BYTES", 0)
    monkeypatch.setattr(shamir, "_BLOCK_ELEMENTS", 7 * 5)
    assert np.array_equal(share(secrets(2), 7, 23), whole)


@pytest.mark.parametrize(("threshold", "holders"), [(0, 3), (4, 3), (-1, 3), (1, 0), (2, PRIME)])
def test_a_sharing_that_cannot_be_is_refused(threshold: int, holders: int) -> None:
    with pytest.raises(SecureAggregationError, match=f"got threshold {threshold} of {holders} holders"):
        share(secrets(1), threshold, holders)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([0, 1], "points must be from 1 to 2147483646, got 0 to 1"),
        ([1, PRIME], "got 1 to 2147483647"),
        ([-1], "got -1 to -1"),
        ([1, 2, 1], "points must differ, got 3 of which 2 are different"),
    ],
)
def test_points_that_are_none_are_refused(points: list[int], message: str) -> None:
    with pytest.raises(SecureAggregationError, match=message):
        Reconstructor(points)


def test_no_share_at_all_is_too_few() -> None:
    with pytest.raises(ThresholdError, match="no share is left, a secret needs at least one"):
        Reconstructor([])


@pytest.mark.parametrize(
    "shares",
    [
        np.zeros((3, 1, LIMBS), np.uint32),
        np.zeros((2, LIMBS), np.uint32),
        np.zeros((2, 1, LIMBS + 1), np.uint32),
        np.zeros((2, 1, LIMBS), np.int64),
        np.full((2, 1, LIMBS), PRIME, np.uint32),
    ],
)
def test_shares_that_do_not_belong_to_the_points_are_refused(shares: Elements) -> None:
    with pytest.raises(SecureAggregationError, match="shares must be"):
        reconstruct([1, 2], shares)


def test_shares_survive_the_way_through_bytes() -> None:
    shares = share(secrets(3), 2, 4)
    assert np.array_equal(from_bytes(to_bytes(shares), (4, 3)), shares)
    assert len(to_bytes(shares[0, 0])) == SHARE_BYTES == 36
    assert np.array_equal(from_bytes(to_bytes(shares[1, 2])), shares[1, 2])
    assert to_bytes(np.array([1, *[0] * 8], np.uint32)) == b"\x01" + bytes(35)  # little-endian


@given(
    st.one_of(st.binary(max_size=80), st.binary(min_size=36, max_size=36), st.binary(min_size=72, max_size=72)),
    st.sampled_from([(), (1,), (2,), (2, 1), (0,)]),
)
def test_whatever_bytes_are_read_become_shares_or_an_error(data: bytes, shape: tuple[int, ...]) -> None:
    """Guarantees: whatever bytes are read, the outcome is canonical shares or a SecureAggregationError."""
    try:
        shares = from_bytes(data, shape)
    except SecureAggregationError:
        words = [int.from_bytes(data[start : start + 4], "little") for start in range(0, len(data), 4)]
        assert len(data) != SHARE_BYTES * int(np.prod(shape)) or max(words) >= PRIME
    else:
        assert shares.shape == (*shape, LIMBS)
        assert not np.any(shares >= PRIME)
        assert to_bytes(shares) == data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (bytes(35), r"shares of shape \(\) have 36 bytes, got 35"),
        (bytes(37), "have 36 bytes, got 37"),
        (b"\xff\xff\xff\x7f" + bytes(32), "shares must be below"),
        (bytes(32) + b"\xff" * 4, "shares must be below"),
    ],
)
def test_bytes_that_are_no_share_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(SecureAggregationError, match=message):
        from_bytes(data)


def test_what_is_no_share_is_not_written() -> None:
    with pytest.raises(SecureAggregationError, match="shares must be below"):
        to_bytes(np.full(LIMBS, PRIME, np.uint32))


def test_sharing_leaves_the_secret_as_it_was() -> None:
    hidden = secrets(2)
    before = hidden.tobytes()
    shares = share(hidden, 2, 3)
    copy = shares.copy()
    reconstruct([1, 3], shares[[0, 2]])
    assert hidden.tobytes() == before
    assert np.array_equal(shares, copy)
