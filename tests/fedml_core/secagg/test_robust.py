"""Liars can neither put a wrong secret in place of the right one nor have somebody honest blamed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedml_core.errors import SecureAggregationError, ThresholdError
from fedml_core.secagg import robust
from fedml_core.secagg.field import LIMBS, PRIME, Elements, add, matmul
from fedml_core.secagg.robust import MOST_SUBSETS, Recovered, reconstruct_despite_liars
from fedml_core.secagg.shamir import as_points, powers_of, share, weights_at_zero

SECRET = hashlib.sha256(b"a secret").digest()
COMMITMENT = hashlib.sha256(SECRET).digest()


def correct(candidate: bytes) -> bool:
    return hashlib.sha256(candidate).digest() == COMMITMENT


def dealt(holders: int, threshold: int) -> Elements:
    return share(np.frombuffer(SECRET, np.uint8)[None, :], threshold, holders)[:, 0].copy()


def altered(shares: Elements, liars: Sequence[int]) -> Elements:
    """Return the shares with one element of each liar's changed, the place of it by turns."""
    result = shares.copy()
    for turn, point in enumerate(liars):
        result[point - 1, turn % LIMBS] = (int(result[point - 1, turn % LIMBS]) + 1 + turn) % PRIME
    return result


def opened(shares: Elements, threshold: int, check: Callable[[bytes], bool] = correct) -> Recovered:
    return reconstruct_despite_liars(range(1, len(shares) + 1), shares, threshold, check)


@given(data=st.data(), threshold=st.integers(1, 9), spare=st.integers(0, 9))
def test_as_many_liars_as_can_be_corrected_change_nothing(data: st.DataObject, threshold: int, spare: int) -> None:
    """Guarantees: if at most (n - threshold) / 2 of n shares are wrong, the secret is found, but for that chance."""
    holders = threshold + spare
    liars = data.draw(st.permutations(range(1, holders + 1)))[: spare // 2]
    found = opened(altered(dealt(holders, threshold), liars), threshold)
    assert found == Recovered(SECRET, tuple(sorted(liars)), True)


@pytest.mark.parametrize(
    ("holders", "threshold", "liars"),
    [
        (3, 3, []),
        (4, 3, [4]),  # with the secret known, one share in excess is enough
        (4, 3, [1]),
        (5, 3, [3]),
        (6, 3, [1, 6]),
        (60, 40, list(range(1, 11))),
        (60, 40, list(range(51, 61))),
        (61, 40, list(range(51, 62))),
        (61, 40, list(range(3, 53, 5))),
        (5, 1, [2, 4]),
    ],
)
def test_exactly_the_liars_are_named(holders: int, threshold: int, liars: list[int]) -> None:
    assert 2 * len(liars) <= holders + 1 - threshold
    assert opened(altered(dealt(holders, threshold), liars), threshold) == Recovered(SECRET, tuple(liars), True)


def test_liars_whose_lies_cancel_do_not_get_the_honest_blamed() -> None:
    """Guarantees: if a secret is found and at most (n + 1 - threshold) / 2 of n shares are wrong, exactly their points
    are named, but for that chance, however the liars agreed on their lies.
    """
    threshold, holders = 6, 12
    shares = dealt(holders, threshold)
    # Two liars among the first shares add a multiple of x (x - 3)(x - 4)(x - 5)(x - 6), which is 0 at 0: the first
    # shares still open the secret, and lie on a polynomial that no honest share in excess lies on.
    first = [int(weight) for weight in weights_at_zero(as_points(range(1, threshold + 1)))]
    shares[0, 0] = (int(shares[0, 0]) + first[1]) % PRIME
    shares[1, 0] = (int(shares[1, 0]) - first[0]) % PRIME
    assert opened(shares[:threshold], threshold).secret == SECRET
    assert opened(shares, threshold) == Recovered(SECRET, (1, 2), True)


def test_nobody_is_named_where_too_many_lie() -> None:
    """Guarantees: nobody is named where the shares fit no such number of liars."""
    found = opened(altered(dealt(6, 4), [5, 6]), 4)  # the first four open it, two of six are not on their polynomial
    assert found == Recovered(SECRET, (), False)


def test_a_few_shares_are_searched_where_decoding_fails() -> None:
    found = opened(altered(dealt(7, 3), [1, 2, 3, 7]), 3)
    assert found == Recovered(SECRET, (), False)


def test_many_shares_are_searched_at_random(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = [0]

    def urandom(size: int) -> bytes:
        drawn[0] += 1
        return hashlib.shake_256(drawn[0].to_bytes(4, "big")).digest(size)

    monkeypatch.setattr("os.urandom", urandom)
    assert math.comb(24, 4) > MOST_SUBSETS
    liars = list(range(1, 13))  # 12 of 24, where decoding corrects 10
    assert opened(altered(dealt(24, 4), liars), 4).secret == SECRET


lie = st.tuples(st.integers(0, 11), st.integers(0, LIMBS - 1), st.integers(1, PRIME - 1))


@settings(max_examples=40)
@given(st.lists(lie, max_size=40), st.integers(1, 12))
def test_a_wrong_secret_is_never_returned(lies: list[tuple[int, int, int]], threshold: int) -> None:
    """Guarantees: what is returned passed `correct`, so a wrong secret is never returned, whoever lies and however
    many.
    """
    shares = dealt(12, threshold)
    for place, limb, change in lies:
        shares[place, limb] = (int(shares[place, limb]) + change) % PRIME
    try:
        found = opened(shares, threshold)
    except SecureAggregationError:
        assert lies
    else:
        assert found.secret == SECRET
        honest = {place + 1 for place in range(12)} - {place + 1 for place, _, _ in lies}
        if 2 * (12 - len(honest)) <= 13 - threshold:
            assert not honest & set(found.liars)


@pytest.mark.parametrize(("holders", "threshold"), [(5, 3), (30, 15), (40, 40), (300, 200)])
def test_the_work_is_bounded(holders: int, threshold: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guarantees: the work is bounded by two decodings and `MOST_SUBSETS` candidates, fewer where a threshold is
    large.
    """
    tried, decoded = list[bytes](), list[int]()
    monkeypatch.setattr(robust, "_SEARCH_PRODUCTS", 20 * 200**2)
    decode = robust._decoded

    def counted(points: Elements, values: Elements, threshold: int) -> Elements | None:
        decoded.append(threshold)
        return decode(points, values, threshold)

    monkeypatch.setattr(robust, "_decoded", counted)

    def refuses(candidate: bytes) -> bool:
        tried.append(candidate)
        return False

    with pytest.raises(SecureAggregationError, match=f"no {threshold} of {holders} shares open the secret"):
        opened(dealt(holders, threshold), threshold, refuses)
    sets = min(MOST_SUBSETS, math.comb(holders, threshold), 21 if threshold == 200 else MOST_SUBSETS)
    assert len(tried) == sets + 2
    assert len(decoded) == 1
    opened(dealt(holders, threshold), threshold)
    assert len(decoded) <= 3


def test_if_lies_hide_in_the_combination_nobody_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    # The chance of 2^-31, made certain: the combination takes nothing from the element that was changed.
    monkeypatch.setattr(robust, "uniform", lambda count: np.array([0] + [1] * (count - 1), np.uint32))
    shares = dealt(8, 4)
    shares[7, 0] = (int(shares[7, 0]) + 1) % PRIME
    assert opened(shares, 4) == Recovered(SECRET, (8,), True)  # seen by the check of every element
    shares[0, 0] = (int(shares[0, 0]) + 1) % PRIME
    found = reconstruct_despite_liars([2, 3, 4, 5, 1, 6, 7], shares[[1, 2, 3, 4, 0, 5, 6]], 4, correct)
    assert found == Recovered(SECRET, (1,), True)
    assert opened(shares, 4) == Recovered(SECRET, (), False)


def test_a_holder_answers_for_what_it_was_dealt() -> None:
    """Trust: the dealer is believed to have dealt one polynomial; where it did not, a holder may be named for its
    dealer's lie, unless shares were committed to.
    """
    by_the_dealer = altered(dealt(7, 3), [4])  # holder 4 passes on what it got
    assert opened(by_the_dealer, 3).liars == (4,)


def test_the_points_need_not_be_in_order_nor_all_there() -> None:
    shares = altered(dealt(10, 4), [9])
    order = [9, 2, 7, 10, 1, 3]
    found = reconstruct_despite_liars(order, shares[[point - 1 for point in order]], 4, correct)
    assert found == Recovered(SECRET, (9,), True)


def test_a_thousand_shares_are_corrected() -> None:
    liars = list(range(2, 334, 2))  # 166, as many as can be
    assert opened(altered(dealt(1000, 667), liars), 667) == Recovered(SECRET, tuple(liars), True)


def test_all_zero_shares_are_a_polynomial_too() -> None:
    found = opened(np.zeros((7, LIMBS), np.uint32), 3, lambda candidate: candidate == bytes(32))
    assert found == Recovered(bytes(32), (), True)


@pytest.mark.parametrize(("degree", "errors"), [(0, 3), (1, 0), (4, 2), (7, 1)])
def test_decoding_returns_the_polynomial_itself(degree: int, errors: int) -> None:
    coefficients = np.array([[pow(3, power + 1, PRIME)] for power in range(degree + 1)], np.uint32)
    points = as_points([5, 1, 9, 2, 100, 7, PRIME - 1, 8, 4, 3])
    values = matmul(powers_of(points, degree + 1), coefficients)
    values[:errors] = add(values[:errors], np.ones((errors, 1), np.uint32))
    decoded = robust._decoded(points, values, degree + 1)
    assert decoded is not None
    assert decoded.tolist() == coefficients[:, 0].tolist()


def test_too_few_shares_are_told_apart_from_wrong_ones() -> None:
    with pytest.raises(ThresholdError, match="2 shares are left, the threshold is 3; the secret stays closed"):
        opened(dealt(5, 3)[:2], 3)
    with pytest.raises(ThresholdError, match="no share is left"):
        reconstruct_despite_liars([], np.zeros((0, LIMBS), np.uint32), 1, correct)


@pytest.mark.parametrize(
    ("points", "shares", "threshold", "message"),
    [
        ([1, 2], np.zeros((3, LIMBS), np.uint32), 2, "shares must be uint32 of shape"),
        ([1, 2], np.full((2, LIMBS), PRIME, np.uint32), 2, "shares must be below"),
        ([1, 1], np.zeros((2, LIMBS), np.uint32), 2, "points must differ"),
        ([0, 1], np.zeros((2, LIMBS), np.uint32), 2, "points must be from 1"),
        ([1, 2], np.zeros((2, LIMBS), np.uint32), 0, "a threshold must be at least 1, got 0"),
    ],
)
def test_what_are_no_shares_is_refused(points: list[int], shares: Elements, threshold: int, message: str) -> None:
    with pytest.raises(SecureAggregationError, match=message):
        reconstruct_despite_liars(points, shares, threshold, correct)


def test_what_was_recovered_does_not_print_the_secret() -> None:
    shown = repr(opened(dealt(3, 2), 2))
    assert shown == "Recovered(liars=(), attributed=True)"
