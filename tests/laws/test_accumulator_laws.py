"""Every accumulator keeps the laws that the contract in `fedml_core.accumulate` states."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedml_core.accumulate import Accumulator, Collect, PlainSum
from fedml_core.errors import ReplyError, StrategyError
from fedml_core.ring import RingSum
from fedml_core.update import Total, Update

SIZE = 3
MAX_WEIGHT = 100.0


def weighted_sum(rows: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted sum of the rows, which is exact for integers."""
    return (rows * weights[:, None].float()).sum(dim=0)


MAKERS: dict[str, Callable[[], Accumulator]] = {
    "PlainSum": lambda: PlainSum(SIZE, MAX_WEIGHT),
    "Collect": lambda: Collect(weighted_sum, SIZE, MAX_WEIGHT),
}
EVERY_KIND = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)

whole = st.integers(-1000, 1000)
updates = st.builds(
    lambda values, weight, loss: Update.of(
        torch.tensor(values, dtype=torch.float32), weight, examples=weight, loss=loss
    ),
    st.lists(whole, min_size=SIZE, max_size=SIZE),
    st.integers(1, 100),
    whole,
)


def same(a: Total, b: Total) -> bool:
    """Say whether totals of integers are equal, exactly."""
    return torch.equal(a.values, b.values) and (a.weight, a.count, a.sums) == (b.weight, b.count, b.sums)


def taken(make: Callable[[], Accumulator], items: list[Update]) -> Accumulator:
    accumulator = make()
    for update in items:
        accumulator.add(update)
    return accumulator


def batch_of(items: list[Update]) -> Update:
    return Update(
        torch.stack([u.values for u in items]),
        torch.stack([u.weight for u in items]),
        {name: torch.stack([u.sums[name] for u in items]) for name in items[0].sums},
    )


def test_every_accumulator_has_a_row_here() -> None:
    ours = {kind.__name__ for kind in Accumulator.__subclasses__() if kind.__module__.startswith("fedml_core.")}
    # A ring sum rounds each client's values by the client's own key: tests/fedml_core/test_ring.py holds it to them.
    assert ours == {*MAKERS, RingSum.__name__}, "add a row to tests/laws/test_accumulator_laws.py"


@EVERY_KIND
@settings(max_examples=30)
@given(data=st.data(), items=st.lists(updates, min_size=1, max_size=8), workers=st.integers(1, 4))
def test_any_split_over_workers_in_any_order_gives_the_same_total(
    make: Callable[[], Accumulator], data: st.DataObject, items: list[Update], workers: int
) -> None:
    expected = taken(make, items).total()
    shuffled = data.draw(st.permutations(items))
    parts = [taken(make, shuffled[worker::workers]) for worker in range(workers)]
    merged = make()
    for part in data.draw(st.permutations(parts)):
        merged.merge(part)
    assert same(merged.total(), expected)


@EVERY_KIND
@settings(max_examples=15)
@given(items=st.lists(updates, min_size=1, max_size=5))
def test_a_batch_counts_as_its_clients_one_by_one(make: Callable[[], Accumulator], items: list[Update]) -> None:
    assert same(taken(make, [batch_of(items)]).total(), taken(make, items).total())


@EVERY_KIND
def test_a_batch_of_batches_counts_every_client(make: Callable[[], Accumulator]) -> None:
    grid = Update(torch.ones(2, 4, SIZE), torch.ones(2, 4, dtype=torch.float64))
    total = taken(make, [grid]).total()
    assert total.values.tolist() == [8.0] * SIZE
    assert (total.count, total.weight) == (8, 8.0)


@EVERY_KIND
def test_the_total_of_nothing_is_zero(make: Callable[[], Accumulator]) -> None:
    total = make().total()
    assert same(total, Total(torch.zeros(SIZE), 0.0, 0, {}))
    empty = Update(torch.zeros(0, SIZE), torch.zeros(0, dtype=torch.float64))
    assert same(taken(make, [empty]).total(), total)


@EVERY_KIND
def test_the_sum_of_weights_facts_and_counts_is_exact(make: Callable[[], Accumulator]) -> None:
    items = [Update.of(torch.ones(SIZE), w, examples=w) for w in (0.1, 0.2, 0.25)]
    total = taken(make, items).total()
    assert (total.count, total.weight) == (3, 0.1 + 0.2 + 0.25)
    assert total.sums == {"examples": 0.1 + 0.2 + 0.25}


def weighing(weight: float) -> Update:
    return Update.of(torch.ones(SIZE), weight)


REFUSED: dict[str, tuple[Update, str]] = {
    "too long": (Update.of(torch.ones(SIZE + 1)), "shape"),
    "broadcastable": (Update.of(torch.ones(1)), "shape"),
    "a scalar": (Update.of(torch.tensor(1.0)), "shape"),
    "float64": (Update.of(torch.ones(SIZE, dtype=torch.float64)), "dtype"),
    "integers": (Update.of(torch.ones(SIZE, dtype=torch.int32)), "dtype"),
    "NaN": (Update.of(torch.tensor([1.0, math.nan, 1.0])), "non-finite"),
    "infinity": (Update.of(torch.tensor([1.0, math.inf, 1.0])), "non-finite"),
    "both infinities": (Update.of(torch.tensor([-math.inf, math.inf, 1.0])), "non-finite"),
    "NaN fact": (Update.of(torch.ones(SIZE), 1.0, loss=math.nan), "non-finite"),
    "weight 0": (weighing(0.0), "weight"),
    "negative weight": (weighing(-1.0), "weight"),
    "weight above the limit": (weighing(MAX_WEIGHT + 1), "weight"),
    "NaN weight": (weighing(math.nan), "weight"),
    "one bad row": (
        Update(torch.tensor([[1.0] * SIZE, [math.nan] * SIZE]), torch.ones(2, dtype=torch.float64)),
        "non-finite",
    ),
    "one bad weight": (Update(torch.ones(2, SIZE), torch.tensor([1.0, -1.0], dtype=torch.float64)), "weight"),
    "one weight for two": (Update(torch.ones(2, SIZE), torch.tensor(1.0, dtype=torch.float64)), "shape"),
    "one fact for two": (
        Update(torch.ones(2, SIZE), torch.ones(2, dtype=torch.float64), {"loss": torch.tensor(1.0)}),
        "shape",
    ),
}


@EVERY_KIND
@pytest.mark.parametrize(("bad", "rule"), REFUSED.values(), ids=REFUSED)
def test_a_refused_update_changes_nothing(make: Callable[[], Accumulator], bad: Update, rule: str) -> None:
    good = Update.of(torch.tensor([1.0, 2.0, 3.0]), 4.0, examples=4.0)
    accumulator = taken(make, [good])
    with pytest.raises(ReplyError) as refused:
        accumulator.add(bad)
    assert refused.value.rule == rule
    assert same(accumulator.total(), taken(make, [good]).total())


@pytest.mark.parametrize(
    "make", [lambda: PlainSum(SIZE), lambda: Collect(weighted_sum, SIZE)], ids=["PlainSum", "Collect"]
)
def test_without_a_limit_an_infinite_weight_is_still_refused(make: Callable[[], Accumulator]) -> None:
    taken(make, [weighing(1e300)])
    with pytest.raises(ReplyError, match="a weight must be > 0"):
        make().add(weighing(math.inf))


@EVERY_KIND
def test_updates_and_totals_share_no_memory_with_the_accumulator(make: Callable[[], Accumulator]) -> None:
    update = Update.of(torch.tensor([1.0, 2.0, 3.0]), 1.0)
    batch = Update(torch.ones(2, SIZE), torch.ones(2, dtype=torch.float64))
    accumulator = taken(make, [update, batch])
    assert update.values.tolist() == [1.0, 2.0, 3.0]
    expected = accumulator.total()
    update.values.zero_()
    batch.values.zero_()
    accumulator.total().values.fill_(7.0)
    assert accumulator.total().values.tolist() == expected.values.tolist() == [3.0, 4.0, 5.0]


@EVERY_KIND
def test_merging_leaves_the_other_as_it_was(make: Callable[[], Accumulator]) -> None:
    one, other = taken(make, [weighing(1.0)]), taken(make, [weighing(2.0)])
    before = other.total()
    one.merge(other)
    one.add(weighing(3.0))
    assert same(other.total(), before)
    empty = make()
    empty.merge(other)
    empty.add(weighing(3.0))
    assert same(other.total(), before)


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        (PlainSum(2), PlainSum(3), r"cannot merge PlainSum\(3\) into PlainSum\(2\)"),
        (PlainSum(2), Collect(weighted_sum, 2), r"cannot merge Collect\(2\) into PlainSum\(2\)"),
    ],
)
def test_accumulators_of_different_kinds_or_sizes_do_not_merge(one: Any, other: Any, message: str) -> None:
    with pytest.raises(StrategyError, match=message):
        one.merge(other)


@EVERY_KIND
def test_an_accumulator_travels_between_processes(make: Callable[[], Accumulator]) -> None:
    accumulator = taken(make, [weighing(1.0), weighing(2.0)])
    arrived = pickle.loads(pickle.dumps(accumulator))
    arrived.add(weighing(3.0))
    accumulator.add(weighing(3.0))
    assert same(arrived.total(), accumulator.total())


def test_a_plain_sum_holds_one_vector_whatever_the_cohort() -> None:
    accumulator = PlainSum(1000)
    sizes = []
    for _ in range(20):
        accumulator.add(Update.of(torch.ones(1000)))
        sizes.append(len(pickle.dumps(accumulator)))
    assert max(sizes) - min(sizes) < 100
    assert sizes[0] < 2 * 4000


def reports_of(items: list[Update]) -> Update:
    """Return what K updates report, without their values."""
    together = batch_of(items)
    return together.replace(values=torch.empty(len(items), 0))


@given(st.lists(updates, min_size=1, max_size=5))
def test_a_total_of_updates_counts_as_each_of_them(items: list[Update]) -> None:
    added, alone = PlainSum(SIZE, MAX_WEIGHT), taken(MAKERS["PlainSum"], items)
    added.add_total(torch.stack([update.values for update in items]).sum(dim=0), reports_of(items))
    assert same(added.total(), alone.total())


@pytest.mark.parametrize(
    ("values", "weights", "rule"),
    [
        ([1.0, math.nan, 1.0], [1.0, 2.0], "non-finite"),
        ([1.0, math.inf, 1.0], [1.0, 2.0], "non-finite"),
        ([1.0, 1.0], [1.0, 2.0], "shape"),
        ([1.0, 1.0, 1.0], [1.0, 0.0], "weight"),
        ([1.0, 1.0, 1.0], [1.0, MAX_WEIGHT + 1], "weight"),
        ([1.0, 1.0, 1.0], [1.0, math.nan], "weight"),
    ],
)
def test_a_total_that_must_not_reach_a_sum_changes_nothing(
    values: list[float], weights: list[float], rule: str
) -> None:
    accumulator = PlainSum(SIZE, MAX_WEIGHT)
    reports = Update(torch.empty(2, 0), torch.tensor(weights, dtype=torch.float64))
    with pytest.raises(ReplyError) as caught:
        accumulator.add_total(torch.tensor(values), reports)
    assert caught.value.rule == rule
    assert (accumulator.count, accumulator.weight, accumulator.total().values.tolist()) == (0, 0.0, [0.0] * SIZE)


def test_only_a_plain_sum_takes_totals() -> None:
    class Watched(PlainSum):
        """A sum that does more with each update than add it."""

    for accumulator in (MAKERS["Collect"](), Watched(SIZE)):
        assert not accumulator.takes_totals
        with pytest.raises(StrategyError, match="needs every update by itself; add them one by one"):
            accumulator.add_total(torch.ones(SIZE), reports_of([Update.of(torch.ones(SIZE))]))
    assert PlainSum(SIZE).takes_totals
