"""Messages between processes: what comes out of a pipe is what went in."""

from __future__ import annotations

import multiprocessing
import pickle
from typing import Any

import pytest
import torch

from fedml_core.accumulate import PlainSum
from fedml_core.update import Update
from simulations.engines import parcel


def through_a_pipe(message: object) -> Any:
    ours, theirs = multiprocessing.Pipe()
    with ours, theirs:
        ours.send_bytes(parcel.packed(message))
        return theirs.recv()


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.int64, torch.bool, torch.bfloat16])
def test_tensors_of_any_kind_come_out_equal(kind: torch.dtype) -> None:
    sent = {"vector": torch.arange(6).to(kind), "view": torch.arange(12).view(3, 4).t()[1:].to(kind)}
    found = through_a_pipe(sent)
    for name, tensor in sent.items():
        assert found[name].dtype == kind and torch.equal(found[name], tensor)


def test_what_came_out_can_be_changed_and_leaves_what_went_in_alone() -> None:
    sent = torch.zeros(3)
    found = through_a_pipe(sent)
    found.add_(1)
    assert sent.tolist() == [0, 0, 0] and found.tolist() == [1, 1, 1]


def test_an_accumulator_travels_with_its_sum() -> None:
    accumulator = PlainSum(3)
    accumulator.add(Update.of(torch.tensor([1.0, 2.0, 3.0]), 4, examples=4))
    found = through_a_pipe(accumulator).total()
    assert (found.values.tolist(), found.weight, found.count, found.sums) == ([1, 2, 3], 4.0, 1, {"examples": 4.0})


def test_tensors_of_usual_size_are_plain_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = torch.arange(1000.0)
    assert sent.numpy().tobytes() in parcel.packed(sent)
    monkeypatch.setattr(parcel, "_MOST_BYTES", 3999)
    assert sent.numpy().tobytes() not in parcel.packed(sent)


def test_a_subclass_keeps_its_type() -> None:
    assert type(through_a_pipe(torch.nn.Parameter(torch.ones(2), requires_grad=False))) is torch.nn.Parameter


def test_what_cannot_be_sent_is_an_error() -> None:
    with pytest.raises((AttributeError, pickle.PicklingError)):
        parcel.packed(lambda: None)
