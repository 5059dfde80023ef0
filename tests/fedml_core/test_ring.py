"""Ring sums keep the laws of accumulators, exactly, and an encoding survives the trip to the other side."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedml_core.errors import ReplyError, SecureAggregationError, StrategyError
from fedml_core.ring import RingSum, encoding_from_table, encoding_to_table, ring_rows, total_of
from fedml_core.secagg.encoding import RingEncoding
from fedml_core.secagg.scalars import Count, Measure
from fedml_core.update import Update

SIZE, CLIENTS = 5, 12
ENCODING = RingEncoding(4.0, CLIENTS, max_weight=20.0, scalars=(Count("examples", 100), Measure("loss", 1000.0)))


def update(seed: int, **changes: float) -> Update:
    values = torch.randn(SIZE, generator=torch.Generator().manual_seed(seed))
    weight = float(1 + seed % 7)
    return Update.of(values * weight, weight, **{"examples": weight, "loss": 0.5 * seed, **changes})


def batch(seeds: list[int]) -> Update:
    ones = [update(seed) for seed in seeds]
    return Update(
        torch.stack([one.values for one in ones]),
        torch.stack([one.weight for one in ones]),
        {name: torch.stack([one.sums[name] for one in ones]) for name in ones[0].sums},
    )


def ring_sum() -> RingSum:
    return RingSum(ENCODING, SIZE, (7, "rounding", 1))


def taken(seeds: list[int]) -> RingSum:
    made = ring_sum()
    for seed in seeds:
        made.add(update(seed), (seed,))
    return made


@settings(max_examples=20, deadline=None)
@given(seeds=st.lists(st.integers(0, 50), min_size=1, max_size=CLIENTS, unique=True), data=st.data())
def test_any_split_and_order_gives_the_same_ring_bit_for_bit(seeds: list[int], data: st.DataObject) -> None:
    expected = taken(seeds)
    workers = data.draw(st.integers(1, 3))
    shuffled = data.draw(st.permutations(seeds))
    merged = ring_sum()
    for worker in range(workers):
        merged.merge(taken(shuffled[worker::workers]))
    together = ring_sum()
    together.add(batch(seeds), seeds)
    assert np.array_equal(merged.ring, expected.ring) and np.array_equal(together.ring, expected.ring)
    assert merged.count == together.count == len(seeds)


def test_the_total_is_the_weighted_sum_within_the_rounding_of_each_client() -> None:
    seeds = list(range(CLIENTS))
    total = taken(seeds).total()
    exact = sum((update(seed).values for seed in seeds), torch.zeros(SIZE))
    step = ENCODING.clip * 20.0 / ENCODING.steps
    torch.testing.assert_close(total.values, exact, rtol=1e-6, atol=CLIENTS * step)
    assert total.count == CLIENTS and total.weight == pytest.approx(sum(1 + seed % 7 for seed in seeds))
    assert total.sums["examples"] == sum(1 + seed % 7 for seed in seeds)
    assert total.sums["loss"] == pytest.approx(sum(0.5 * seed for seed in seeds), rel=1e-12)
    assert total.facts == {"clipped": 0.0}


def test_nothing_is_the_total_of_nobody() -> None:
    empty = ring_sum().total()
    assert empty.count == 0 and torch.equal(empty.values, torch.zeros(SIZE))


def test_a_bad_update_changes_nothing() -> None:
    made = taken([1, 2])
    before = made.ring.copy()
    bad: list[tuple[Update, tuple[int, ...]]] = [
        (update(3).replace(values=torch.full((SIZE,), math.nan)), (3,)),
        (Update.of(torch.zeros(SIZE), 21.0, examples=1.0, loss=0.0), (3,)),
        (update(3, examples=101.0), (3,)),
        (update(3), ()),
        (update(3).replace(sums={}), (3,)),
    ]
    for one, clients in bad:
        with pytest.raises((ReplyError, SecureAggregationError, StrategyError)):
            made.add(one, clients)
    assert np.array_equal(made.ring, before) and made.count == 2


def test_ring_sums_of_different_encodings_do_not_merge() -> None:
    other = RingSum(RingEncoding(2.0, CLIENTS, max_weight=20.0), SIZE, (7,))
    with pytest.raises(StrategyError, match="different encodings"):
        ring_sum().merge(other)


def test_a_metric_beyond_its_range_counts_as_its_end_and_a_nan_is_refused() -> None:
    key = bytes(32)
    rows = ring_rows(ENCODING, update(1, loss=1e9), [key])
    assert total_of(ENCODING.decode(rows[0], 1)).sums["loss"] == pytest.approx(1000.0)
    with pytest.raises(SecureAggregationError, match="'loss'"):
        ring_rows(ENCODING, update(1, loss=math.nan), [key])


def test_an_encoding_comes_back_from_what_was_sent() -> None:
    table = json.loads(json.dumps(encoding_to_table(ENCODING)))
    assert encoding_from_table(table, 32) == ENCODING


@pytest.mark.parametrize(
    "change",
    [
        {"clip": 0.0},
        {"clip": "wide"},
        {"clients": 10**9},
        {"scalars": [["count", "examples"]]},
        {"scalars": [["guess", "examples", 3]]},
        {"scalars": 3},
        {"more": 1},
    ],
)
def test_what_is_no_encoding_is_an_error_of_the_protocol(change: dict[str, Any]) -> None:
    with pytest.raises(SecureAggregationError):
        encoding_from_table({**encoding_to_table(ENCODING), **change}, 32)
