"""Degrees, thresholds and graphs: the published numbers, exact tails in integers, and plain searches as oracles."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedml_core.errors import ConfigError, SecureAggregationError
from fedml_core.secagg import graph
from fedml_core.secagg.graph import at_most, complete, connected, neighbourhood, neighbours, regular

CURIOUS, ACTIVE = False, True
KEY = bytes(range(32))

# (clients, corrupt share, dropout share, active, degree, threshold), at 40 and 20 bits: the test vectors of Google's
# graph_parameter_finder.
GOOGLE = [
    (100, 0.45, 0.45, CURIOUS, 92, 46),
    (1000, 0.45, 0.45, CURIOUS, 822, 417),
    (10_000, 0.45, 0.45, CURIOUS, 3494, 1771),
    (1_000_000, 0.45, 0.45, CURIOUS, 6240, 3156),
    (10, 0.33, 0.33, CURIOUS, 8, 4),
    (100, 0.33, 0.33, CURIOUS, 68, 34),
    (1000, 0.33, 0.33, CURIOUS, 286, 150),
    (100_000, 0.33, 0.33, CURIOUS, 480, 251),
    (100, 0.3, 0.3, ACTIVE, 92, 62),
    (1000, 0.3, 0.3, ACTIVE, 872, 584),
    (10_000, 0.3, 0.3, ACTIVE, 4822, 3230),
    (1000, 0.05, 0.33, CURIOUS, 72, 24),
    (10, 0.05, 0.33, ACTIVE, 8, 5),
    (10_000, 0.05, 0.33, ACTIVE, 746, 420),
    (10, 0.33, 0.05, CURIOUS, 4, 4),
    (1_000_000, 0.33, 0.05, CURIOUS, 110, 83),
    (10, 0.33, 0.05, ACTIVE, 4, 4),
    (1000, 0.33, 0.05, ACTIVE, 132, 109),
    (100, 0.05, 0.05, CURIOUS, 12, 6),
    (1000, 0.05, 0.05, CURIOUS, 30, 17),
    (1000, 0.05, 0.05, ACTIVE, 52, 37),
    (1_000_000, 0.05, 0.05, ACTIVE, 74, 52),
    (100, 0.33, 0.0, ACTIVE, 26, 26),
    (1000, 0.33, 0.0, CURIOUS, 38, 36),
    (1000, 0.0, 0.33, CURIOUS, 38, 2),
    (1000, 0.0, 0.33, ACTIVE, 228, 115),
    (10, 0.0, 0.0, ACTIVE, 2, 2),
    (1_000_000, 0.0, 0.0, CURIOUS, 2, 2),
]

# (corrupt share, dropout share, security bits): degree and threshold at 100, 1,000 and 10,000 clients, active.
TABLE = [
    (0.05, 0.05, 40, (16, 11), (52, 37), (62, 44)),
    (0.05, 0.05, 60, (16, 11), (60, 44), (72, 52)),
    (0.1, 0.1, 40, (32, 22), (96, 67), (122, 85)),
    (0.1, 0.1, 60, (32, 22), (108, 77), (138, 98)),
    (0.2, 0.1, 40, (42, 32), (140, 104), (184, 136)),
    (0.33, 0.05, 40, (42, 37), (132, 109), (178, 146)),
    (0.1, 0.3, 40, (72, 42), (414, 247), (778, 465)),
]


@pytest.mark.parametrize(("clients", "corrupt", "lost", "active", "degree", "threshold"), GOOGLE)
def test_degree_and_threshold_are_those_of_the_published_vectors(
    clients: int, corrupt: float, lost: float, active: bool, degree: int, threshold: int
) -> None:
    assert regular(clients, corrupt, lost, active=active, bits=(40, 20)) == (degree, threshold)


def test_a_threshold_raised_to_two_must_be_reachable_too() -> None:
    # Here the published vector is (4, 2); with three of ten lost, it leaves fewer than two of four neighbours
    # with a probability of 1 in 30, because its threshold was raised after reachability had been checked.
    assert tail(10, 3, 4, 2) == Fraction(1, 30)
    assert regular(10, 0.05, 0.33, active=False, bits=(40, 20)) == (6, 2)


@pytest.mark.parametrize("row", TABLE)
def test_degree_and_threshold_are_those_of_the_table(
    row: tuple[float, float, int, tuple[int, int], tuple[int, int], tuple[int, int]],
) -> None:
    corrupt, lost, bits, *expected = row
    found = [regular(clients, corrupt, lost, active=True, bits=(bits, 20)) for clients in (100, 1000, 10_000)]
    assert found == expected
    for clients, shape in zip((1000, 10_000), expected[1:], strict=True):
        assert neighbourhood(clients, corrupt, lost, security_bits=bits) == shape


def tail(clients: int, marked: int, drawn: int, limit: int) -> Fraction:
    """Return P[more than `limit` of `drawn` clients are marked], in integers."""
    ways = (math.comb(marked, x) * math.comb(clients - marked, drawn - x) for x in range(limit + 1, drawn + 1))
    return Fraction(sum(ways), math.comb(clients, drawn))


def regular_in_integers(
    clients: int, corrupt: int, lost: int, active: bool, bits: tuple[int, int]
) -> tuple[int, int] | None:
    for degree in range(2, clients - 1, 2):
        secure, correct = Fraction(1, 2 ** (bits[0] + 1)), Fraction(1, 2 ** bits[1])
        gaps = Fraction(clients * (clients - degree - 1), 2)
        split = gaps * Fraction(math.comb(corrupt + lost, degree), math.comb(clients, degree))
        t1 = next(t for t in range(degree + 1) if tail(clients, corrupt, degree, t) <= secure / clients)
        left = degree - next(t for t in range(degree + 1) if tail(clients, lost, degree, t) <= correct / clients)
        threshold = max(2, (degree + t1) // 2 + 1 if active else t1 + 1)
        if split < secure and threshold <= left:
            return degree, threshold
    return None


@pytest.mark.parametrize("active", [ACTIVE, CURIOUS])
@pytest.mark.parametrize("clients", [10, 37, 64, 101])
def test_the_smallest_degree_is_found_as_in_integers(clients: int, active: bool) -> None:
    for corrupt, lost in itertools.product((0.0, 0.05, 0.2, 0.41), (0.0, 0.1, 0.25)):
        counts = at_most(corrupt, clients), at_most(lost, clients)
        for bits in ((40, 20), (60, 10)):
            expected = regular_in_integers(clients, *counts, active, bits)
            if 10 * (counts[0] + (1 + active) * counts[1]) > 9 * clients:
                expected = None
            assert regular(clients, corrupt, lost, active=active, bits=bits) == expected


@pytest.mark.parametrize(
    ("clients", "marked", "drawn", "limit"),
    [(50, 20, 10, 7), (1000, 50, 52, 20), (10_000, 3000, 778, 290), (10_000, 500, 62, 0), (10**6, 330_000, 212, 140)],
)
def test_probabilities_are_rounded_by_more_than_their_errors(clients: int, marked: int, drawn: int, limit: int) -> None:
    """Guarantees: logarithms of probabilities are rounded against us, by more than all their rounding errors."""
    exact = tail(clients, marked, drawn, limit)
    logarithm = math.log(exact.numerator) - math.log(exact.denominator)
    assert abs(graph._log_tail(clients, marked, drawn, limit) - logarithm) < graph._ROUNDING / 10
    # A bound that the probability meets to the last digit is not met; one that it keeps by the margin is.
    assert graph._quantile(clients, marked, drawn, logarithm, limit) == limit + 1
    assert graph._quantile(clients, marked, drawn, logarithm + 2 * graph._ROUNDING, limit) == limit


@pytest.mark.parametrize(("clients", "bad", "degree"), [(50, 20, 10), (1000, 100, 52), (10_000, 4000, 778)])
def test_the_chance_of_a_split_is_rounded_up(clients: int, bad: int, degree: int) -> None:
    exact = math.log(math.comb(bad, degree)) - math.log(math.comb(clients, degree))
    exact += math.log(clients) + math.log(clients - degree - 1) - math.log(2)
    assert 0 < graph._log_of_a_split(clients, bad, degree) - exact < 2 * graph._ROUNDING


def test_impossible_outcomes_have_no_probability() -> None:
    assert graph._log_tail(10, 3, 5, 3) == -math.inf
    assert graph._log_tail(10, 0, 5, 0) == -math.inf
    assert graph._log_tail(10, 8, 5, 2) == pytest.approx(0, abs=1e-12)  # three are marked at least
    assert graph._log_of_a_split(100, 9, 10) == -math.inf


SHARES = (0.0, 0.1, 0.2, 0.33)


@pytest.mark.parametrize("clients", [2, 3, 5, 10, 99, 100, 150, 1000])
def test_no_secret_is_opened_by_two_stories(clients: int) -> None:
    """Guarantees: 2 threshold > holders + corrupt holders if the server may be active, so no secret can be opened by
    telling two halves different stories; in a graph that is not complete, but for a probability of 2^-security_bits.
    """
    for corrupt, lost in itertools.product(SHARES, (0.0, 0.1)):
        if found := complete(clients, corrupt, lost, active=True):
            assert 2 * found.threshold > clients + at_most(corrupt, clients)
            assert 2 * (found.threshold - 1) <= clients + at_most(corrupt, clients)  # and no more than needed
        if found := regular(clients, corrupt, lost, active=True, bits=(40, 20)):
            # 2 t <= k + X is what it takes, X being the corrupt ones among k neighbours of one of n clients.
            chance = tail(clients, at_most(corrupt, clients), found.degree, 2 * found.threshold - found.degree - 1)
            assert chance * clients <= Fraction(1, 2**41)


@pytest.mark.parametrize("clients", [2, 3, 5, 10, 99, 100, 150, 1000])
def test_enough_holders_are_left(clients: int) -> None:
    """Guarantees: enough holders are left if no more clients than the dropout share are lost; in a graph that is not
    complete, but for a probability of 2^-correctness_bits.
    """
    for corrupt, lost, active in itertools.product((0.0, 0.1), SHARES, (ACTIVE, CURIOUS)):
        gone = at_most(lost, clients)
        if found := complete(clients, corrupt, lost, active=active):
            assert clients - gone >= found.threshold >= 2
        if found := regular(clients, corrupt, lost, active=active, bits=(40, 20)):
            assert found.threshold >= 2
            assert tail(clients, gone, found.degree, found.degree - found.threshold) * clients <= Fraction(1, 2**20)


def test_more_corrupt_clients_than_stated_are_not_withstood() -> None:
    """Trust: these numbers hold against at most the stated share of corrupt clients, together with the server."""
    clients, corrupt = 10, 2
    threshold = neighbourhood(clients, 0.2, 0.1).threshold

    def succeeds(bad: int) -> bool:
        # The server tells each honest client one of two stories; the corrupt ones answer to both.
        honest = clients - bad
        return any(half + bad >= threshold and honest - half + bad >= threshold for half in range(honest + 1))

    assert not any(succeeds(bad) for bad in range(corrupt + 1))
    assert succeeds(corrupt + 2)


@pytest.mark.parametrize(
    ("clients", "corrupt", "lost", "active", "expected"),
    [
        (100, 0.33, 0.3, ACTIVE, (99, 67)),
        (100, 0.33, 0.3, CURIOUS, (99, 34)),
        (5, 0.0, 0.2, ACTIVE, (4, 3)),
        (5, 0.2, 0.2, ACTIVE, (4, 4)),
        (2, 0.0, 0.0, ACTIVE, (1, 2)),
        (3, 0.0, 0.34, CURIOUS, (2, 2)),
        (100, 0.29, 0.0, CURIOUS, (99, 30)),  # 29 are corrupt, which 0.29 * 100 in floating point is not
        (1000, 0.333, 0.333, ACTIVE, (999, 667)),  # no sparse graph will do
        (110, 0.33, 0.32, ACTIVE, (109, 74)),
    ],
)
def test_a_complete_graph_where_it_is_small_or_nothing_else_will_do(
    clients: int, corrupt: float, lost: float, active: bool, expected: tuple[int, int]
) -> None:
    assert neighbourhood(clients, corrupt, lost, active=active) == expected


def test_a_hundred_clients_are_complete_and_one_more_need_not_be() -> None:
    assert neighbourhood(100, 0.05, 0.05).degree == 99
    sparse = neighbourhood(101, 0.05, 0.05)
    assert sparse == regular(101, 0.05, 0.05, active=True, bits=(60, 20))
    assert sparse.degree < 100


@pytest.mark.parametrize(
    ("clients", "corrupt", "lost", "active", "numbers"),
    [
        (10, 0.4, 0.4, ACTIVE, "10 clients of which 4 may be corrupt and 4 may drop out"),
        (3, 0.0, 0.67, CURIOUS, "3 clients of which 0 may be corrupt and 2 may drop out"),
        (1000, 0.5, 0.5, ACTIVE, "an active server cannot abuse"),
        (1000, 0.6, 0.5, CURIOUS, "a curious server cannot abuse"),
        (10_000, 0.33, 0.33, ACTIVE, r"lower corrupt_share \(0.33\) or dropout_share \(0.33\)"),
    ],
)
def test_what_no_threshold_can_serve_is_refused_with_the_numbers(
    clients: int, corrupt: float, lost: float, active: bool, numbers: str
) -> None:
    with pytest.raises(ConfigError, match=numbers):
        neighbourhood(clients, corrupt, lost, active=active)


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"clients": 1}, "clients must be >= 2"),
        ({"clients": 10**6 + 1}, "clients must be"),
        ({"clients": True}, "clients must be a whole number"),
        ({"corrupt_share": 1.0}, "corrupt_share must be >= 0 and < 1, got 1.0"),
        ({"corrupt_share": math.nan}, "corrupt_share must be"),
        ({"dropout_share": -0.1}, "dropout_share must be >= 0 and < 1, got -0.1"),
        ({"security_bits": 19}, "security_bits must be >= 20"),
        ({"correctness_bits": 0}, "correctness_bits must be >= 1"),
    ],
)
def test_arguments_out_of_range_are_refused(given_: dict[str, float], message: str) -> None:
    arguments = {"clients": 10, "corrupt_share": 0.1, "dropout_share": 0.1, **given_}
    with pytest.raises(ConfigError, match=message):
        neighbourhood(**arguments)  # type: ignore[arg-type]  # wrong types are among what is refused


@pytest.mark.parametrize(("clients", "degree"), [(3, 2), (4, 3), (2, 1), (5, 2), (7, 4), (50, 10), (51, 48), (8, 6)])
def test_neighbours_are_neighbours_of_each_other(clients: int, degree: int) -> None:
    """Guarantees: who is my neighbour has me as its neighbour; nobody is its own neighbour, or another's twice."""
    table = neighbours(clients, degree, KEY)
    assert table.shape == (clients, degree)
    edges = {(one, int(other)) for one in range(clients) for other in table[one]}
    assert len(edges) == clients * degree
    assert edges == {(other, one) for one, other in edges}
    assert all(one != other and 0 <= other < clients for one, other in edges)
    assert np.all(np.diff(table, axis=1) > 0)  # ascending: a neighbour's rank is its point


def shuffled_in_integers(count: int, key: bytes, limit: int) -> list[int]:
    """Return the shuffle word by word: a first word for each place, then one more for each that was too large."""
    stream = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()
    waiting, drawn = list(range(count - 1, 0, -1)), dict[int, int]()
    while waiting:
        words = [(last, int.from_bytes(stream.update(bytes(4)), "little")) for last in waiting]
        drawn.update((last, word % (last + 1)) for last, word in words if word < limit - limit % (last + 1))
        waiting = [last for last in waiting if last not in drawn]
    order = list(range(count))
    for last in range(count - 1, 0, -1):
        order[last], order[drawn[last]] = order[drawn[last]], order[last]
    return order


@pytest.mark.parametrize("limit", [2**32, 2**30 + 12345])
@pytest.mark.parametrize("count", [2, 3, 10, 400])
def test_the_shuffle_is_fisher_and_yates_with_rejection(
    count: int, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "_WORD", np.uint64(limit))  # the lower one turns three of four words down
    assert graph._shuffled(count, KEY) == shuffled_in_integers(count, KEY, limit)


def test_a_word_that_would_favour_some_numbers_is_replaced() -> None:
    # 2^32 is 1 modulo 3 and 5, and 4 modulo 6: so many of the highest words are one too many for a whole turn.
    top = 2**32 - 1
    words = iter([[top, top, top - 3, top - 4, top], [7, top, top], [top - 1, 9]])

    def source(size: int) -> NDArray[np.uint64]:
        drawn = np.array(next(words), np.uint64)
        assert len(drawn) == size
        return drawn

    drawn = graph._below(np.array([3, 5, 6, 6, 4], np.uint64), source)
    assert drawn.tolist() == [7 % 3, (top - 1) % 5, 9 % 6, (top - 4) % 6, top % 4]


def test_a_graph_is_drawn_evenly_and_is_the_same_for_everybody() -> None:
    """Guarantees: the order on the ring is uniform over all orders for a random key, and is the same for all who
    compute it.
    """
    counts = dict.fromkeys(itertools.permutations(range(4)), 0)
    for number in range(4800):
        counts[tuple(graph._shuffled(4, number.to_bytes(32, "big")))] += 1
    # Chi-square with 23 degrees of freedom: a fair shuffle exceeds this for one choice of keys in a thousand.
    assert sum((count - 200) ** 2 / 200 for count in counts.values()) < 49.7
    assert neighbours(7, 2, KEY).tolist() == RING_OF_SEVEN
    assert np.array_equal(neighbours(500, 20, KEY), neighbours(500, 20, bytes(range(32))))
    assert not np.array_equal(neighbours(500, 20, KEY), neighbours(500, 20, bytes(32)))


RING_OF_SEVEN = [[3, 4], [3, 5], [5, 6], [0, 1], [0, 6], [1, 2], [2, 4]]


@pytest.mark.parametrize("degree", [0, 1, 3, 5, 8, 10, -2])
def test_a_degree_that_no_ring_has_is_refused(degree: int) -> None:
    with pytest.raises(SecureAggregationError, match=f"needs an even degree from 2 up to 6, or 7, got {degree}"):
        neighbours(8, degree, KEY)


def test_a_key_of_another_size_is_refused() -> None:
    with pytest.raises(SecureAggregationError, match="a graph's key must have 32 bytes, got 16"):
        neighbours(8, 4, bytes(16))


def reached(table: NDArray[np.int64], survivors: set[int]) -> set[int]:
    waiting = [min(survivors)]
    seen = set(waiting)
    while waiting:
        beside = {int(other) for other in table[waiting.pop()]} & survivors - seen
        seen |= beside
        waiting += beside
    return seen


@given(st.sampled_from([(12, 2), (13, 4), (20, 6), (9, 8)]), st.sets(st.integers(0, 19), min_size=1))
def test_survivors_are_connected_if_and_only_if_a_search_reaches_them(
    shape: tuple[int, int], survivors: set[int]
) -> None:
    """Guarantees: true only if every survivor can be reached from every other without passing one who is lost."""
    table = neighbours(*shape, KEY)
    survivors = {place for place in survivors if place < shape[0]} or {0}
    assert connected(table, sorted(survivors)) == (reached(table, survivors) == survivors)


def test_a_cut_through_a_ring_is_seen() -> None:
    table = neighbours(40, 4, KEY)
    ring = graph._shuffled(40, KEY)
    assert connected(table, ring)
    assert connected(table, ring[2:])  # one gap leaves a chain
    assert not connected(table, ring[2:20] + ring[22:])  # two gaps of half the degree cut it
    assert connected(table, ring[2:20] + ring[21:])
    assert connected(table, [3])
    assert not connected(table, [])


@pytest.mark.parametrize("survivors", [[0, 0], [-1], [8], [1, 2, 1]])
def test_survivors_that_cannot_be_are_refused(survivors: list[int]) -> None:
    with pytest.raises(SecureAggregationError, match="survivors must be different places from 0 to 7"):
        connected(neighbours(8, 4, KEY), survivors)
