"""Examples hold together, batches hold all of them once, and data of another form is refused with its form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedml_core.data import ClientData, Examples, MapDataset, batch_of, batches, targets_of
from fedml_core.errors import TaskError


class Listed(torch.utils.data.Dataset[Any]):
    def __init__(self, *items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


def numbered(count: int, weighted: bool = False) -> Examples:
    numbers = torch.arange(count)
    return Examples.of(numbers.float().unsqueeze(1), numbers * 10, numbers, weights=numbers + 0.5 if weighted else None)


@given(st.integers(1, 30), st.integers(1, 12), st.booleans())
def test_batches_hold_every_example_once_in_order(count: int, batch_size: int, weighted: bool) -> None:
    parts = list(batches(numbered(count, weighted), batch_size))
    assert [len(part) for part in parts[:-1]] == [batch_size] * (len(parts) - 1)
    assert 1 <= len(parts[-1]) <= batch_size
    assert torch.cat([part.targets for part in parts]).tolist() == list(range(count))
    assert torch.cat([part.inputs[1] for part in parts]).tolist() == [10 * i for i in range(count)]
    weights = [part.weights for part in parts if part.weights is not None]
    assert (torch.cat(weights).tolist() == [i + 0.5 for i in range(count)]) if weighted else not weights


def test_take_follows_the_index_and_copies() -> None:
    data = numbered(5, weighted=True)
    taken = data.take([3, 0, 3])
    assert taken.targets.tolist() == [3, 0, 3]
    assert [tensor.flatten().tolist() for tensor in taken.inputs] == [[3.0, 0.0, 3.0], [30, 0, 30]]
    assert taken.weights is not None
    assert taken.weights.tolist() == [3.5, 0.5, 3.5]
    taken.inputs[0].zero_()
    assert data.inputs[0].sum() == 10


def test_to_moves_every_part() -> None:
    moved = numbered(2).to(torch.device("meta"))
    assert [tensor.device.type for tensor in (*moved.inputs, moved.targets)] == ["meta"] * 3
    weighted = numbered(2, weighted=True).to(torch.device("cpu"))
    assert weighted.weights is not None
    assert weighted.weights.tolist() == [0.5, 1.5]


def test_examples_show_no_values() -> None:
    assert repr(numbered(3, weighted=True)) == "Examples()"


@pytest.mark.parametrize(
    ("inputs", "targets", "weights", "message"),
    [
        ((torch.zeros(2),), torch.zeros(3), None, r"input 0 has 2 examples and the targets have 3; they must agree"),
        ((torch.zeros(3), torch.zeros(4)), torch.zeros(3), None, r"input 1 has 4 examples and the targets have 3"),
        ((torch.zeros(3),), torch.tensor(1), None, r"the targets must be a tensor of shape \(n, ...\), got a single"),
        ((torch.tensor(1.0),), torch.zeros(3), None, r"input 0 must be a tensor of shape \(n, ...\), got a single"),
        (([1, 2, 3],), torch.zeros(3), None, r"input 0 must be a tensor of shape \(n, ...\), got list"),
        ((torch.zeros(3),), [1, 2, 3], None, r"the targets must be a tensor of shape \(n, ...\), got list"),
        ((), torch.zeros(3), torch.zeros(2), r"example weights must have shape \(3,\), got \(2,\)"),
        ((), torch.zeros(3), torch.zeros(3, 1), r"example weights must have shape \(3,\), got \(3, 1\)"),
        ((), torch.zeros(2), torch.tensor([1.0, -0.1]), r"example weights must be finite and >= 0"),
        ((), torch.zeros(2), torch.tensor([1.0, float("nan")]), r"example weights must be finite and >= 0"),
        ((), torch.zeros(2), torch.tensor([1.0, float("inf")]), r"example weights must be finite and >= 0"),
        ((), torch.zeros(2), [1.0, 1.0], r"the weights must be a tensor of shape \(n, ...\), got list"),
    ],
)
def test_examples_that_do_not_hold_together_are_refused(inputs: Any, targets: Any, weights: Any, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        Examples(inputs, targets, weights)


# Map-style data sets.


def test_a_map_style_data_set_is_collated() -> None:
    data = Listed((torch.zeros(2), 1.0, 5), (torch.ones(2), 2.0, 6), [torch.ones(2), 3.0, 7])
    assert isinstance(data, MapDataset)
    batch = batch_of(data, torch.tensor([1, 0]))
    assert batch.inputs[0].tolist() == [[1.0, 1.0], [0.0, 0.0]]
    assert batch.inputs[1].tolist() == [2.0, 1.0]
    assert batch.targets.tolist() == [6, 5]
    assert [len(part) for part in batches(data, 2)] == [2, 1]
    assert targets_of(data).tolist() == [5, 6, 7]


def test_targets_of_examples_are_theirs() -> None:
    assert targets_of(numbered(3)) is not None
    assert targets_of(numbered(3)).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("item", "shown"),
    [
        # A tensor would be taken apart along its first dimension, a dict into its keys.
        (torch.zeros(3), "Tensor"),
        ({"input": torch.zeros(3), "target": 1}, "dict"),
        ((torch.zeros(3),), "tuple of 1"),
        ("text", "str"),
    ],
)
@pytest.mark.parametrize("count", [1, 3])
def test_an_item_that_is_not_input_and_target_is_refused(item: Any, shown: str, count: int) -> None:
    with pytest.raises(TaskError, match=rf"item must be \(input, ..., target\), got {shown}; return at least two"):
        batch_of(Listed(*[item] * count), torch.arange(count))


def test_an_input_that_is_no_tensor_is_refused() -> None:
    nested: tuple[dict[str, Tensor], int] = ({"a": torch.zeros(2)}, 1)
    with pytest.raises(TaskError, match=r"input 0 must be a tensor of shape \(n, ...\), got dict"):
        batch_of(Listed(nested, nested), torch.arange(2))


def test_a_client_may_keep_nothing_aside() -> None:
    assert ClientData(numbered(2)).test is None
