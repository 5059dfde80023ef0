"""Packed clients visit exactly the examples that each would visit alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedml_core.data import Examples
from fedml_core.minibatches import training_order
from fedml_core.training import Training
from simulations.packing import Packed, visits

PURPOSE = (3, "client", 2)


def part(first: int, count: int) -> Examples:
    values = torch.arange(first, first + count)
    return Examples.of(values[:, None].float(), values)


@pytest.mark.parametrize("length", [{}, {"epochs": 3}, {"steps": 7}], ids=str)
@pytest.mark.parametrize("skip_single", [False, True])
def test_visits_are_those_of_each_client_alone(length: dict[str, Any], skip_single: bool) -> None:
    training = Training(batch_size=4, **length)
    counts, numbers = [1, 9, 4, 3, 17, 5], [40, 2, 7, 8, 1, 30]
    parts = [part(100 * place, count) for place, count in enumerate(counts)]
    packed = Packed.of(parts)
    made = visits(packed, training, PURPOSE, numbers, skip_single=skip_single)
    assert made.active == sorted(made.active, reverse=True)
    for row, place in enumerate(made.order):
        key = (*PURPOSE, numbers[place])
        orders = training_order(training, key, counts[place], skip_single=skip_single)
        alone = [parts[place].targets[rows].tolist() for order in orders for rows in torch.split(order, 4)]
        together = [
            packed.examples.targets[made.rows[row, step, :count]].tolist()
            for step, count in enumerate(made.counts[row].tolist())
            if count
        ]
        assert together == alone
        assert bool((packed.examples.targets[made.rows[row]] // 100 == place).all())


def test_taking_clients_keeps_their_examples() -> None:
    packed = Packed.of([part(0, 3), part(100, 2), part(200, 4)])
    taken = packed.take(np.array([2, 0]))
    assert taken.counts.tolist() == [4, 3]
    assert taken.examples.targets.tolist() == [200, 201, 202, 203, 0, 1, 2]


def test_weights_count_one_where_a_part_has_none() -> None:
    weighted = Examples.of(torch.zeros(2, 1), torch.zeros(2), weights=torch.tensor([2.0, 0.5]))
    packed = Packed.of([part(0, 1), weighted])
    assert packed.examples.weights is not None and packed.examples.weights.tolist() == [1.0, 2.0, 0.5]
