"""Which assistants hold which roots, and how many must agree: counted, for every size."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from fedml_core.errors import SecureAggregationError, ThresholdError
from fedml_core.secagg.assistance import MOST_ASSISTANTS, Assistance, assign
from fedml_core.secagg.parameters import Parameters

SIZES = [
    (count, threshold, lying)
    for count in range(2, MOST_ASSISTANTS + 1)
    for threshold in range(1, count)
    for lying in range(threshold + 1)
]


def assistance(count: int, threshold: int, lying: int = 0) -> Assistance:
    return Assistance(tuple(range(10, 10 + count)), threshold, lying)


@pytest.mark.parametrize(("count", "threshold"), sorted({size[:2] for size in SIZES}))
def test_any_threshold_of_assistants_miss_a_root(count: int, threshold: int) -> None:
    # whatever `threshold` assistants put together, at least one root of every client is missing.
    # what assistants hold is private as long as at most `threshold` of them show it to the server.
    table = assistance(count, threshold)
    every = set(range(len(table.subsets)))
    for size in range(threshold + 2):
        for together in itertools.combinations(table.assistants, size):
            known = {place for one in together for place in table.held_by(one)}
            missing = {table.subsets[place] for place in every - known}
            assert missing == {subset for subset in table.subsets if set(together) <= set(subset)}
            assert bool(missing) == (size <= threshold)


@pytest.mark.parametrize(("count", "threshold"), sorted({size[:2] for size in SIZES}))
def test_more_than_threshold_assistants_hold_every_root(count: int, threshold: int) -> None:
    # as long as more than `threshold` assistants are left, every root has a holder among them.
    table = assistance(count, threshold)
    for left in itertools.combinations(table.assistants, threshold + 1):
        shared = assign(table, range(len(table.subsets)), dict.fromkeys(left, ()))
        assert sorted(place for places in shared.values() for place in places) == list(range(len(table.subsets)))
        assert all(one in table.holders(place) for (one,), places in shared.items() for place in places)


@pytest.mark.parametrize(("count", "threshold", "lying"), SIZES)
def test_two_sets_have_no_quorum_each_and_no_smaller_quorum_would_do(count: int, threshold: int, lying: int) -> None:
    # in active mode, no two sets of contributors have a quorum each, unless more than `lying` sign both.
    quorum = assistance(count, threshold, lying).quorum(active=True)
    honest = count - lying

    def splits(needed: int) -> bool:
        return any(first + lying >= needed and honest - first + lying >= needed for first in range(honest + 1))

    assert not splits(quorum)
    assert splits(quorum - 1) or quorum == threshold + 1
    assert threshold < quorum <= count
    assert assistance(count, threshold, lying).spare(active=True) == count - quorum


def test_all_but_threshold_and_one_may_be_lost_where_two_thresholds_and_one_assist() -> None:
    for threshold in (1, 2, 3):
        count = 2 * threshold + 1
        assert assistance(count, threshold).quorum(active=True) == count - threshold
        assert assistance(count, threshold).spare(active=True) == count - threshold - 1
    assert assistance(7, 2).spare(active=False) == 7 - 2 - 1
    assert assistance(5, 2, 2).spare(active=True) == 1


def test_everybody_is_assigned_about_as_many() -> None:
    table = assistance(7, 3)
    shared = assign(table, range(35), dict.fromkeys(table.assistants, ()))
    assert {len(places) for places in shared.values()} == {5}
    compared = assign(table, range(35), dict.fromkeys(table.assistants, ()), each=2)
    load = {one: sum(len(places) for group, places in compared.items() if one in group) for one in table.assistants}
    assert set(load.values()) == {10}


def test_nobody_is_asked_twice_and_a_root_without_a_holder_is_an_error() -> None:
    table = assistance(3, 1)
    assert assign(table, [0], {11: (), 12: ()}) == {(11,): (0,)}
    assert assign(table, [0], {11: (0,), 12: ()}) == {(12,): (0,)}
    with pytest.raises(ThresholdError, match="no assistant is left that holds the roots which assistant 10 must not"):
        assign(table, [0], {10: (), 11: (0,)})


@pytest.mark.parametrize(
    ("numbers", "threshold", "lying", "said"),
    [
        ((1,), 1, 0, "2 to 7 assistants"),
        (tuple(range(8)), 1, 0, "2 to 7 assistants"),
        ((2, 1), 1, 0, "ascending order"),
        ((1, 1), 1, 0, "each once"),
        ([1, 2], 1, 0, "numbers of a roster"),
        ((1, 2.0), 1, 0, "numbers of a roster"),
        ((True, 2), 1, 0, "numbers of a roster"),
        ((-1, 2), 1, 0, "from 0"),
        ((1, 2, 3), 0, 0, "must be from 1 to 2, got 0"),
        ((1, 2, 3), 3, 0, "must be from 1 to 2, got 3"),
        ((1, 2, 3), 1.0, 0, "got 1.0"),
        ((1, 2, 3), 1, 2, "from 0 to the threshold of 1, got 2"),
        ((1, 2, 3), 1, -1, "got -1"),
    ],
)
def test_an_assistance_that_cannot_be_is_refused(
    numbers: tuple[int, ...], threshold: int, lying: int, said: str
) -> None:
    with pytest.raises(SecureAggregationError, match=said):
        Assistance(numbers, threshold, lying)


def test_parameters_carry_it_and_bind_it() -> None:
    table = assistance(4, 2, 1)
    plain = Parameters(
        run="r",
        round=0,
        attempt=0,
        length=1,
        bits=32,
        encoding={"clip": 1.0},
        minimum=2,
        corrupt_share=0,
        dropout_share=0,
    )
    made = replace(plain, encoding=table.within(plain.encoding))
    assert Assistance.of(Parameters.from_text(made.to_text())) == table
    contexts = {plain.context, made.context}
    for other in (replace(table, lying=0), replace(table, threshold=3), replace(table, assistants=(10, 11, 12, 14))):
        contexts.add(replace(plain, encoding=other.within(plain.encoding)).context)
    assert len(contexts) == 5
    for broken in ({}, {"assisted": 3}, {"assisted": {"assistants": [1, 2], "threshold": 1}}):
        with pytest.raises(SecureAggregationError, match="name no assistants"):
            Assistance.of(replace(plain, encoding=broken))
    with pytest.raises(SecureAggregationError, match="got 'one'"):
        Assistance.of(replace(plain, encoding={"assisted": {"assistants": [1, 2], "threshold": "one", "lying": 0}}))
