"""Partitioners: the laws that all keep, what each promises beyond them, and the errors of bad input."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike
from torch import nn

from fedml_core.data import Examples
from fedml_core.errors import ConfigError
from fedml_core.task import Task
from simulations import partition_contract, partition_sizes
from simulations.partition import (
    BalancedDirichlet,
    ByKey,
    DataOutline,
    Dirichlet,
    Explicit,
    Iid,
    LabelLimited,
    Partitioner,
    QuantitySkew,
    Shards,
    label_counts,
)
from simulations.population import partition as pooled
from simulations.population import site_share

ALPHAS = [5e-324, 1e-9, 0.1, 1.0, 100.0, 1e308]
DRAWN: list[Partitioner] = [
    Iid(),
    Shards(),
    LabelLimited(2),
    *(kind(alpha) for kind in (Dirichlet, BalancedDirichlet, QuantitySkew) for alpha in ALPHAS),
]
laws = settings(derandomize=True, database=None, deadline=None, max_examples=25)


@dataclass(frozen=True)
class Given(Partitioner):
    """A user's own partitioner that returns whatever it was told to."""

    parts: Any

    def deal(self, examples: DataOutline, clients: int, rng: np.random.Generator) -> Sequence[ArrayLike]:
        given: Sequence[ArrayLike] = self.parts
        return given


class Bare(Partitioner):
    """Not a dataclass, so nothing says what its table may hold."""

    def deal(self, examples: DataOutline, clients: int, rng: np.random.Generator) -> Sequence[ArrayLike]:
        return [range(examples.count)]


@dataclass(frozen=True)
class Halfway(Partitioner):
    """Leaves `deal` to its subclasses."""


@dataclass(frozen=True)
class Unread(Bare):
    """Its annotation names something that nobody imported."""

    extra: Nonsuch | None = None  # type: ignore[name-defined]  # noqa: F821 - the point of the test


@dataclass(frozen=True)
class Wrapping(Bare):
    """Holds named objects of its own."""

    inner: Partitioner
    more: tuple[Partitioner, ...] = ()
    other: Partitioner | int | None = None


def digits(count: int, classes: int = 10) -> DataOutline:
    return DataOutline.of(np.arange(count) % classes)


def shares(examples: DataOutline, parts: list[np.ndarray]) -> np.ndarray:
    assert examples.labels is not None
    counts = label_counts(examples.labels, parts)
    return np.asarray(counts / counts.sum(axis=1, keepdims=True))


def same(left: list[np.ndarray], right: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("how", DRAWN, ids=str)
@laws
@given(data=st.data())
def test_every_example_is_in_exactly_one_rising_int64_part_and_no_part_is_empty(
    how: Partitioner, data: st.DataObject
) -> None:
    clients = data.draw(st.integers(2, 12))
    labels = data.draw(st.lists(st.integers(-3, 3), min_size=5 * clients, max_size=90))
    # Two whole rounds of four classes, so that two classes for each client can be had.
    labels = [*labels, *[0, 1, 2, 3] * clients]
    parts = how.split(DataOutline.of(labels), max(clients, 4), data.draw(st.integers()))
    assert len(parts) == max(clients, 4)
    assert all(part.dtype == np.int64 and len(part) and (np.diff(part) > 0).all() for part in parts)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels)))


@pytest.mark.parametrize("how", DRAWN, ids=str)
def test_equal_seeds_give_equal_parts_and_other_seeds_other_parts(how: Partitioner) -> None:
    examples = digits(500)
    first = how.split(examples, 20, seed=1)
    assert same(first, how.split(examples, 20, seed=1))
    assert not all(np.array_equal(a, b) for a, b in zip(first, how.split(examples, 20, seed=2), strict=True))


@pytest.mark.parametrize("how", [*DRAWN, ByKey(merge=True), Explicit([[1], [0]])], ids=str)
def test_partitioners_compare_and_pickle(how: Partitioner) -> None:
    assert pickle.loads(pickle.dumps(how)) == how
    assert hash(pickle.loads(pickle.dumps(how))) == hash(how)


@pytest.mark.parametrize(
    "how", [Iid(), *(d for d in DRAWN if "Dirichlet" in repr(d) or "Quantity" in repr(d))], ids=str
)
def test_as_many_clients_as_examples_get_one_each(how: Partitioner) -> None:
    parts = how.split(digits(37), 37, seed=0)
    assert [len(part) for part in parts] == [1] * 37


def test_labels_and_groups_are_not_mutated() -> None:
    labels, groups = np.arange(40) % 4, np.arange(40) % 5
    before = labels.copy(), groups.copy()
    for how in (*DRAWN, ByKey()):
        how.split(DataOutline.of(labels, groups), 5, seed=0)
    assert np.array_equal(labels, before[0])
    assert np.array_equal(groups, before[1])


def test_a_split_into_very_many_clients_covers_everything() -> None:
    examples = digits(60_000)
    for how in (Iid(), Dirichlet(0.05), BalancedDirichlet(0.05), Shards(), QuantitySkew(0.1), LabelLimited(3)):
        assert sum(len(part) for part in how.split(examples, 6_000, seed=3)) == 60_000


@pytest.mark.parametrize("how", [Iid(), BalancedDirichlet(0.1)], ids=str)
def test_sizes_differ_by_at_most_one(how: Partitioner) -> None:
    sizes = [len(part) for part in how.split(digits(1_003), 10, seed=0)]
    assert sorted(sizes) == [100] * 7 + [101] * 3


def test_iid_mixes_labels_like_a_draw_without_replacement() -> None:
    examples = digits(40_000, classes=4)
    counts = label_counts(examples.labels if examples.labels is not None else [], Iid().split(examples, 40, seed=0))
    # Hypergeometric: 1,000 of 40,000, a quarter in each class, so variance 1000 * 1/4 * 3/4 * 39000/39999.
    assert counts.var() == pytest.approx(182.8, rel=0.3)
    assert counts.mean() == 250


def test_dirichlet_has_the_second_moment_of_its_alpha() -> None:
    # A class's shares over K clients have E[sum p^2] = (alpha + 1) / (K alpha + 1); 300 classes average the noise away.
    clients, classes, per_class = 10, 300, 400
    examples = digits(classes * per_class, classes)
    assert examples.labels is not None
    for alpha in (0.1, 0.5, 2.0):
        counts = label_counts(examples.labels, Dirichlet(alpha).split(examples, clients, seed=0))
        moment = ((counts * (counts - 1)).sum(axis=0) / (per_class * (per_class - 1))).mean()
        expected = {a: (a + 1) / (clients * a + 1) for a in (alpha, alpha / 1.5, alpha * 1.5)}
        assert moment == pytest.approx(expected[alpha], rel=0.06)
        assert moment != pytest.approx(expected[alpha / 1.5], rel=0.06)
        assert moment != pytest.approx(expected[alpha * 1.5], rel=0.06)


def test_quantity_skew_has_the_second_moment_of_its_alpha() -> None:
    clients, count = 20, 20_000
    for alpha in (0.2, 1.0):
        moments = []
        for seed in range(150):
            sizes = np.array([len(part) for part in QuantitySkew(alpha).split(DataOutline(count), clients, seed)])
            moments.append((sizes * (sizes - 1)).sum() / (count * (count - 1)))
        assert np.mean(moments) == pytest.approx((alpha + 1) / (clients * alpha + 1), rel=0.06)


def test_quantity_skew_leaves_labels_alike() -> None:
    examples = digits(100_000, classes=2)
    parts = QuantitySkew(1.0).split(examples, 10, seed=0)
    large = shares(examples, [part for part in parts if len(part) > 1_000])
    assert np.abs(large - 0.5).max() < 4 * np.sqrt(0.25 / 1_000)


def test_balanced_dirichlet_has_the_second_moment_of_its_total_concentration() -> None:
    # A mix of C equal classes has E[sum q^2] = (alpha / C + 1) / (alpha + 1). The late clients' leftovers add
    # up to a tenth; alpha per class instead of in all would take a third or more away.
    examples = digits(100_000)
    assert examples.labels is not None
    for alpha in (5.0, 20.0):
        counts = label_counts(examples.labels, BalancedDirichlet(alpha).split(examples, 500, seed=0))
        moment = ((counts * (counts - 1)).sum(axis=1) / (200 * 199)).mean()
        assert moment == pytest.approx((alpha / 10 + 1) / (alpha + 1), rel=0.1)


@pytest.mark.parametrize("kind", [Dirichlet, BalancedDirichlet])
def test_smaller_alpha_is_more_skewed(kind: type[Dirichlet] | type[BalancedDirichlet]) -> None:
    examples = digits(20_000)
    largest = [
        shares(examples, kind(a).split(examples, 50, seed=0)).max(axis=1).mean() for a in (0.05, 0.5, 5.0, 500.0)
    ]
    assert largest == sorted(largest, reverse=True)
    assert largest[0] > 0.75
    assert largest[-1] < 0.2


def test_dirichlet_at_a_vanishing_alpha_gives_each_class_to_one_client_but_for_the_top_up() -> None:
    examples = digits(1_000)
    assert examples.labels is not None
    counts = label_counts(examples.labels, Dirichlet(1e-12).split(examples, 30, seed=0))
    sizes = np.sort(counts.sum(axis=1))
    assert sizes.min() == 1
    assert (sizes > 1).sum() <= 10  # nobody but the at most 10 owners of a class has more


def test_minimum_is_kept_by_taking_from_the_largest() -> None:
    parts = Dirichlet(1e-12, minimum=7).split(DataOutline.of([0] * 100), 5, seed=0)
    assert sorted(len(part) for part in parts) == [7, 7, 7, 7, 72]


def test_topping_up_takes_one_by_one_from_whoever_has_most() -> None:
    owners = np.repeat([0, 1, 2, 3], [10, 8, 2, 1])
    result = partition_sizes.topped_up(owners, 6, 2, np.random.default_rng(0))
    # Clients 3, 4 and 5 lack 1, 2 and 2: five steps down from 10 and 8 end at 6 and 7, in whichever order.
    sizes = np.bincount(result).tolist()
    assert sorted(sizes[:2]) == [6, 7]
    assert sizes[2:] == [2, 2, 2, 2]
    assert (result != owners).sum() == 5


@laws
@given(sizes=st.lists(st.integers(0, 30), min_size=1, max_size=8), minimum=st.integers(1, 3))
def test_topping_up_ends_where_moving_single_examples_does(sizes: list[int], minimum: int) -> None:
    sizes[0] += minimum * len(sizes)
    owners = np.repeat(np.arange(len(sizes)), sizes)
    result = partition_sizes.topped_up(owners, len(sizes), minimum, np.random.default_rng(0))
    slow = list(sizes)
    for client in range(len(slow)):
        while slow[client] < minimum:
            slow[int(np.argmax(slow))] -= 1
            slow[client] += 1
    assert sorted(np.bincount(result, minlength=len(sizes)).tolist()) == sorted(slow)


def test_shards_hold_few_labels_and_equal_sizes() -> None:
    examples = digits(6_000)
    assert examples.labels is not None
    parts = Shards(per_client=2).split(examples, 100, seed=0)
    counts = label_counts(examples.labels, parts)
    assert (counts.sum(axis=1) == 60).all()
    assert ((counts > 0).sum(axis=1) <= 2).all()
    assert ((counts > 0).sum(axis=1) == 2).sum() > 70  # two shards of one class happen to one client in ten
    assert len(np.unique(counts, axis=0)) > 25  # of 55 pairs of classes; dealt in order there would be 5


def test_shards_that_do_not_divide_the_examples_differ_by_one() -> None:
    sizes = {len(part) for part in Shards(per_client=1).split(digits(1_003), 100, seed=0)}
    assert sizes == {10, 11}


def test_shards_sort_regression_targets_as_they_are() -> None:
    targets = np.random.default_rng(0).normal(size=1_000)
    spans = [np.ptp(targets[part]) for part in Shards(per_client=1).split(DataOutline.of(targets), 50, seed=0)]
    ordered = np.sort(targets)
    assert sorted(spans) == pytest.approx(sorted(np.ptp(ordered[i : i + 20]) for i in range(0, 1_000, 20)))


@laws
@given(
    sizes=st.lists(st.integers(1, 40), min_size=2, max_size=8),
    clients=st.integers(1, 15),
    wanted=st.integers(1, 4),
    seed=st.integers(0, 9),
)
def test_label_limited_gives_exactly_k_classes_whenever_that_is_possible(
    sizes: list[int], clients: int, wanted: int, seed: int
) -> None:
    examples = DataOutline.of(np.repeat(np.arange(len(sizes)), sizes))
    assert examples.labels is not None
    seats = sum(min(size, clients) for size in sizes)
    if clients <= sum(sizes) and len(sizes) <= clients * wanted <= seats:
        counts = label_counts(examples.labels, LabelLimited(wanted).split(examples, clients, seed))
        assert ((counts > 0).sum(axis=1) == wanted).all()
    else:
        with pytest.raises(ConfigError):
            LabelLimited(wanted).split(examples, clients, seed)


def test_label_limited_deals_a_class_evenly_and_large_classes_to_more_clients() -> None:
    examples = DataOutline.of(np.repeat([0, 1], [900, 100]))
    assert examples.labels is not None
    counts = label_counts(examples.labels, LabelLimited(1).split(examples, 10, seed=0))
    assert sorted(map(tuple, counts.tolist())) == [(0, 100)] + [(100, 0)] * 9


def test_by_key_gives_the_sorted_keys_to_the_clients_in_turn() -> None:
    examples = DataOutline(6, groups=np.array(["b", "a", "c", "a", "b", "c"]))
    assert [part.tolist() for part in ByKey().split(examples, 3, seed=0)] == [[1, 3], [0, 4], [2, 5]]
    assert [part.tolist() for part in ByKey(merge=True).split(examples, 2, seed=0)] == [[1, 2, 3, 5], [0, 4]]


def test_explicit_takes_lists_and_arrays() -> None:
    kinds: list[Any] = [
        [[3, 0], [2, 1]],
        [np.array([3, 0]), np.array([2, 1], dtype=np.uint8)],
        np.array([[3, 0], [2, 1]]),
    ]
    for indices in kinds:
        assert [p.tolist() for p in Explicit(indices).split(DataOutline(4), 2, seed=0)] == [[0, 3], [1, 2]]


def test_float_targets_are_cut_into_ten_classes_of_equal_count() -> None:
    targets = np.random.default_rng(0).exponential(size=1_000).astype(np.float32)
    codes = partition_contract.class_codes(targets)
    assert np.bincount(codes).tolist() == [100] * 10
    assert targets[codes == 0].max() < targets[codes == 1].min()


def test_float_targets_with_few_distinct_values_are_classes() -> None:
    assert partition_contract.class_codes([0.5, 2.0, 0.5, -1.0]).tolist() == [1, 2, 1, 0]


def test_float_targets_that_are_mostly_one_value_make_fewer_classes_without_gaps() -> None:
    codes = partition_contract.class_codes(np.concatenate([np.zeros(900), np.arange(1.0, 101.0)]))
    assert np.array_equal(np.unique(codes), np.arange(codes.max() + 1))
    assert codes.max() >= 1


@pytest.mark.parametrize("labels", [["cat", "dog", "cat"], [False, True, False], torch.tensor([1, 7, 1])], ids=str)
def test_classes_may_be_strings_booleans_or_a_tensor(labels: Any) -> None:
    assert label_counts(labels, [[0, 2], [1]]).tolist() == [[2, 0], [0, 1]]


def test_label_counts_are_those_of_a_plain_count() -> None:
    labels = np.array([5, 5, 9, 7, 9, 9])
    counts = label_counts(labels, [[0, 2, 4], [1, 3, 5], []])
    assert counts.tolist() == [[1, 0, 2], [1, 1, 1], [0, 0, 0]]
    assert counts.dtype == np.int64
    assert label_counts(labels, []).shape == (0, 3)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([[0, 1], [2]], "Given loses 2 and repeats 0 of 5 examples; give each index to one client"),
        ([[0, 1, 2, 3, 4], [4, 3, 3]], "Given loses 0 and repeats 2 of 5 examples; give each index to one client"),
        ([[0, 1, 2, 3, 5], [-1]], "Given names 2 indices outside 0 to 4, such as 5; use row numbers"),
        ([[0, 1, 2, 3, 4], []], "Given leaves 1 of 2 clients without examples, such as client 1; use fewer"),
        ([[0, 1, 2, 3, 4]], "Given must give one index array for each of 2 clients, got 1"),
        (None, "Given must give one index array for each of 2 clients, got a NoneType"),
        ([[0.0, 1.0, 2.0], [3.0, 4.0]], "Given must give each client a flat array of integers, got float64"),
        ([[[0, 1]], [[2, 3]]], "Given must give each client a flat array of integers, got int64 of shape (1, 2)"),
        ([[[0], [1, 2]], [3, 4]], "Given gave client 0 something that is not an array of integers"),
        ([True, False], "Given must give each client a flat array of integers, got bool"),
    ],
    ids=str,
)
def test_a_users_partitioner_that_breaks_the_promise_is_told_how(parts: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        Given(parts).split(DataOutline(5), 2, seed=0)
    assert str(error.value).startswith(message)


def test_a_users_partitioner_may_return_unsorted_parts_of_any_integer_type() -> None:
    parts = Given((np.array([4, 0], dtype=np.uint8), [3, 1, 2])).split(DataOutline(5), 2, seed=0)
    assert [part.tolist() for part in parts] == [[0, 4], [1, 2, 3]]


@pytest.mark.parametrize(
    ("how", "examples", "clients", "message"),
    [
        (Iid(), DataOutline(3), 4, "4 clients cannot share 3 examples; use at most 3 clients"),
        (Iid(), DataOutline(3), 0, "clients must be an integer >= 1, got 0"),
        (Iid(), DataOutline(3), 2.0, "clients must be an integer >= 1, got 2.0"),
        (Iid(), DataOutline(3), True, "clients must be an integer >= 1, got True"),
        (Iid(), np.arange(3), 2, "split takes a DataOutline, got a ndarray; use DataOutline.of(labels)"),
        (Dirichlet(1.0), DataOutline(3), 2, "this partitioner needs one label per example, got none; give labels"),
        (Shards(), DataOutline(3), 2, "this partitioner needs one label per example, got none; give labels"),
        (ByKey(), digits(3), 2, "this partitioner needs one natural key per example, got none; give groups"),
        (
            Dirichlet(1.0, minimum=4),
            digits(11),
            3,
            "3 clients with at least 4 examples each need 12 examples, got 11; lower clients or minimum",
        ),
        (
            QuantitySkew(1.0, minimum=10**30),
            DataOutline(5),
            1,
            "1 clients with at least 1000000000000000000000000000000",
        ),
        (Shards(3), digits(11), 4, "4 clients with 3 shards each need 12 examples, got 11; lower clients"),
        (
            LabelLimited(2),
            digits(100),
            4,
            "4 clients with 2 classes each cannot hold all 10 classes; raise clients or classes_per_client",
        ),
        (
            LabelLimited(11),
            digits(100),
            4,
            "4 clients cannot each see 11 of 10 classes in 100 examples; lower clients or classes_per_client",
        ),
        (
            ByKey(),
            DataOutline(4, groups=np.array([7, 8, 9, 9])),
            2,
            "groups hold 3 distinct keys, got 2 clients; use 3 clients or merge = true",
        ),
        (
            ByKey(merge=True),
            DataOutline(4, groups=np.array([7, 8, 9, 9])),
            4,
            "groups hold 3 distinct keys, got 4 clients; use 3 clients or fewer",
        ),
        (Explicit([[0], [1]]), DataOutline(3), 3, "Explicit must give one index array for each of 3 clients, got 2"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_split_that_cannot_be_is_refused_with_its_numbers(
    how: Partitioner, examples: Any, clients: Any, message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        how.split(examples, clients, seed=0)
    assert str(error.value).startswith(message)


def test_a_seed_that_is_not_an_integer_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^seed must be an integer, got 'x'$"):
        Iid().split(DataOutline(3), 2, "x")  # type: ignore[arg-type]


@pytest.mark.parametrize("alpha", [0, -1.0, float("nan"), float("inf"), "0.3", None, True, 10**400])
@pytest.mark.parametrize("kind", [Dirichlet, BalancedDirichlet, QuantitySkew])
def test_alpha_must_be_finite_and_positive(kind: type[Dirichlet], alpha: Any) -> None:
    with pytest.raises(ConfigError, match=r"^alpha must be a finite number > 0, got "):
        kind(alpha)


@pytest.mark.parametrize("make", [Shards, LabelLimited, lambda value: Dirichlet(1.0, minimum=value)])
@pytest.mark.parametrize("value", [0, -2, 1.5, "2", False])
def test_counts_must_be_positive_integers(make: Any, value: Any) -> None:
    with pytest.raises(ConfigError, match=r"must be an integer >= 1, got "):
        make(value)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([], "labels has 0 values for at least 1 examples"),
        ([[0, 1], [1, 0]], "labels must be one value per example, got shape (2, 2)"),
        ([[0], [1, 2]], "labels cannot be read as an array"),
        ([0.5, float("nan"), float("inf")], "labels holds 2 values that are NaN or infinite"),
        ([1, "1"], "labels must be all integers, floats or strings, got object values"),
        ([1j], "labels must be all integers, floats or strings, got complex128 values"),
        ([None, 1], "labels must be all integers, floats or strings, got object values"),
        (range(10_001), "labels hold 10001 classes, more than 10000; give regression targets as floats"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_unusable_labels_are_refused(labels: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        label_counts(labels, [])
    assert str(error.value).startswith(message)


def test_columns_must_match_the_count() -> None:
    with pytest.raises(ConfigError, match=r"^labels has 2 values for 3 examples; give one for each$"):
        DataOutline(3, labels=np.array([0, 1]))
    with pytest.raises(ConfigError, match=r"^groups has 1 values for 2 examples; give one for each$"):
        DataOutline.of([0, 1], groups=["a"])
    with pytest.raises(ConfigError, match=r"^groups must be all integers or strings, got float64 values"):
        DataOutline(2, groups=np.array([0.5, 1.5]))


def test_label_counts_refuse_an_index_without_a_label() -> None:
    with pytest.raises(ConfigError, match=r"^client 1 holds an index outside 0 to 2; pass the labels of all$"):
        label_counts([0, 1, 1], [[0], [3]])


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ("iid", Iid()),
        ("Quantity_Skew", None),
        ({"name": "dirichlet", "alpha": 0.3}, Dirichlet(0.3)),
        ({"name": "Dirichlet", "alpha": 0.3}, Dirichlet(0.3)),
        ({"name": "balanced-dirichlet", "alpha": 1}, BalancedDirichlet(1.0)),
        ({"name": "label-limited", "classes_per_client": 2}, LabelLimited(2)),
        ({"name": "shards"}, Shards(2)),
        ({"name": "quantity_skew", "alpha": 0.5, "minimum": 3}, QuantitySkew(0.5, minimum=3)),
        ({"name": "by-key", "merge": True}, ByKey(merge=True)),
        ({"name": "explicit", "indices": [[0], [1]]}, Explicit([[0], [1]])),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_table_or_a_bare_name_names_a_partitioner(table: Any, expected: Partitioner | None) -> None:
    if expected is None:
        with pytest.raises(ConfigError, match="^QuantitySkew needs alpha; add it$"):
            Partitioner.from_config(table)
    else:
        assert Partitioner.from_config(table) == expected


ARRAYS: Any = [np.array([1, 0]), [2, 3]]


@pytest.mark.parametrize("how", [*DRAWN, ByKey(merge=True), Explicit([[2, 0], [1]]), Explicit(ARRAYS)], ids=str)
def test_a_partitioner_survives_as_json(how: Partitioner) -> None:
    again = Partitioner.from_config(json.loads(json.dumps(how.to_config())))
    assert again == how
    assert hash(again) == hash(how)


def test_those_that_come_with_fedveil_are_the_modules_own() -> None:
    ours = {kind for kind in Partitioner.members.values() if kind.__module__.startswith("simulations.")}
    assert ours == {BalancedDirichlet, ByKey, Dirichlet, Explicit, Iid, LabelLimited, QuantitySkew, Shards}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"name": "dirichelt"}, "unknown partitioner 'dirichelt'; did you mean 'dirichlet' or "),
        ({"name": "Dirichelt"}, "unknown partitioner 'Dirichelt'; did you mean 'Dirichlet' or "),
        ("quantity-skw", "unknown partitioner 'quantity-skw'; did you mean 'quantity-skew'?"),
        ("quantity_skw", "unknown partitioner 'quantity_skw'; did you mean 'quantity_skew'?"),
        ({"name": "xyz"}, "unknown partitioner 'xyz'; known: BalancedDirichlet, "),
        ({"name": "x" * 999}, "unknown partitioner '" + "x" * 79 + "...; known: "),
        ({"name": "dirichlet", "alhpa": 1}, "Dirichlet has no argument 'alhpa'; did you mean 'alpha'?"),
        ({"name": "label-limited", "classes-per-client": 1}, "LabelLimited has no argument 'classes-per-client'; did"),
        ({"name": "iid", "alpha": 1}, "Iid has no argument 'alpha'; it takes none"),
        ({"name": "iid", 3: 1}, "Iid has no argument 3; it takes none"),
        ({"name": "dirichlet"}, "Dirichlet needs alpha; add it"),
        ({"name": "dirichlet", "alpha": -1}, "alpha must be a finite number > 0, got -1"),
        ({"name": "by-key", "merge": 1}, "merge must be true or false, got 1"),
        ({"name": "explicit", "indices": "abc"}, "indices must be one list of integers for each client, got a str"),
        ({"name": "explicit", "indices": [["a"]]}, "Explicit must give each client a flat array of integers"),
        ({}, "the partitioner needs a name, got None; known: BalancedDirichlet, "),
        ({"name": ["iid"]}, "the partitioner needs a name, got ['iid']; known: BalancedDirichlet, "),
        (3, 'the partitioner must be a name, or a table with one such as {name = "..."}, got 3'),
        (["iid"], "the partitioner must be a name, or a table with one such as {name = \"...\"}, got ['iid']"),
        ("Bare", "Bare must be a frozen dataclass to be named in a file or a message"),
        ("Unread", "Unread: an annotation cannot be read (name 'Nonsuch' is not defined); import what it names"),
        ({"name": "Halfway"}, "unknown partitioner 'Halfway'; known: BalancedDirichlet, "),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_table_that_is_wrong_is_answered_with_the_nearest_right_one(table: Any, message: str) -> None:
    for where, prefix in (("", ""), ("[data] partition", "[data] partition: ")):
        with pytest.raises(ConfigError) as error:
            Partitioner.from_config(table, where)
        assert str(error.value).startswith(prefix + message)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"inner": 3}, "Wrapping.inner must name a partitioner, got 3"),
        ({"inner": ["iid"]}, "Wrapping.inner must name a partitioner, got ['iid']"),
        ({"inner": {"name": "iidd"}}, "Wrapping.inner: unknown partitioner 'iidd'; did you mean 'iid'?"),
        ({"inner": {"name": "shards", "per_client": 0}}, "Wrapping.inner: per_client must be an integer >= 1, got 0"),
        ({"inner": "iid", "more": "iid"}, "Wrapping.more must be a list of partitioners, got 'iid'"),
        ({"inner": "iid", "more": ["iid", None]}, "Wrapping.more[1] must name a partitioner, got None"),
        ({"inner": "iid", "other": "2"}, "Wrapping.other: unknown partitioner '2'; known: "),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_value_that_must_name_another_object_and_does_not_is_told_where(table: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        Partitioner.from_config({"name": "Wrapping", **table})
    assert str(error.value).startswith(message)


def test_a_value_may_be_whatever_else_its_annotation_admits() -> None:
    table = {"name": "Wrapping", "inner": {"name": "shards"}, "more": ["iid", Iid()], "other": 2}
    assert Partitioner.from_config(table) == Wrapping(Shards(), more=(Iid(), Iid()), other=2)
    assert Partitioner.from_config({**table, "other": None}) == Wrapping(Shards(), more=(Iid(), Iid()))
    assert Partitioner.from_config({**table, "other": "iid"}) == Wrapping(Shards(), more=(Iid(), Iid()), other=Iid())


def labelled(count: int) -> Examples:
    return Examples.of(torch.arange(float(count)).reshape(-1, 1), torch.arange(count) % 2)


POOLED = Task.classification(model=lambda: nn.Linear(1, 2), classes=2, train_data=lambda: labelled(20))


def test_a_site_holds_what_the_simulated_client_of_its_number_does() -> None:
    table = {"name": "dirichlet", "alpha": 0.5}
    simulated = pooled(POOLED, Dirichlet(0.5), 4, seed=3, holdout=0.25)
    for client in range(4):
        settings = {"client": client, "clients": 4, "partition": table, "seed": 3, "holdout": 0.25}
        site, expected = site_share(POOLED, settings), simulated.load(client)
        assert isinstance(site.train, Examples)
        assert isinstance(expected.train, Examples)
        assert torch.equal(site.train.inputs[0], expected.train.inputs[0])
    assert len(site_share(POOLED, {}).train) == 20


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"client": "0"}, "[data] client must be an integer >= 0, got '0'"),
        ({"client": 4, "clients": 4}, "[data] client must be 0 to 3 for clients = 4, got 4"),
        ({"clients": 0}, "[data] clients must be an integer >= 1, got 0"),
        ({"clients": 21}, "21 clients cannot share 20 examples; use at most 20 clients"),
        ({"seed": 1.5}, "[data] seed must be an integer, got 1.5"),
        ({"holdout": "half"}, "[data] holdout must be a number, got 'half'"),
        ({"holdout": 1}, "[data] holdout must be >= 0 and < 1, got 1"),
        ({"partition": 3}, "[data] partition: the partitioner must be a name, or a table with one such as "),
        ({"partition": "dirichlet"}, "[data] partition: Dirichlet needs alpha; add it"),
        ({"partition": {"name": "dirichlet", "alpha": -1}}, "[data] partition: alpha must be a finite number > 0, got"),
        ({"partitoin": "iid"}, "[data] has no key 'partitoin'; did you mean 'partition'?"),
    ],
    ids=str,
)
def test_a_site_with_wrong_settings_is_told_which(settings_: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        site_share(POOLED, settings_)
    assert str(error.value).startswith(message)
