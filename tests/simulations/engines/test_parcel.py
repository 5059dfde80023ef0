"""Messages between processes: what comes out of a pipe is what went in."""

from __future__ import annotations

import multiprocessing
import pickle
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
import torch.multiprocessing

from fedml_core.accumulate import PlainSum
from fedml_core.update import Update
from simulations.engines import parcel


def through_a_pipe(message: object) -> Any:
    ours, theirs = multiprocessing.Pipe()
    with ours, theirs:
        ours.send_bytes(parcel.packed(message))
        return theirs.recv()


def a_shelf(numbers: int) -> parcel.Shelf:
    shelf = parcel.Shelf.of(4 * numbers)
    assert shelf is not None
    return shelf


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


MANY = 100_000  # float32 numbers that are worth a shelf


def test_large_tensors_lie_on_the_shelf_and_not_in_the_message() -> None:
    shelf, sent = a_shelf(MANY), torch.randn(MANY)
    message = parcel.packed({"large": sent, "small": torch.arange(3), "view": torch.arange(6).view(2, 3).t()}, shelf)
    assert len(message) < 2_000
    found = parcel.unpacked(message, shelf)
    assert torch.equal(found["large"], sent) and found["small"].tolist() == [0, 1, 2]
    assert found["view"].tolist() == [[0, 3], [1, 4], [2, 5]]


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.int64])
def test_a_large_tensor_of_any_shape_and_kind_comes_off_the_shelf_equal(kind: torch.dtype) -> None:
    shelf, sent = a_shelf(3 * MANY), torch.randn(50, MANY // 50).t().to(kind)
    found = parcel.unpacked(parcel.packed([sent], shelf), shelf)[0]
    assert found.dtype == kind and torch.equal(found, sent)


def test_what_came_off_a_shelf_stays_as_it_is_when_the_next_message_lies_there() -> None:
    shelf = a_shelf(MANY)
    first = parcel.unpacked(parcel.packed(torch.ones(MANY), shelf), shelf)
    second = parcel.unpacked(parcel.packed(torch.zeros(MANY), shelf), shelf)
    assert first.sum() == MANY and second.sum() == 0
    first.add_(1)
    assert parcel.unpacked(parcel.packed(torch.zeros(MANY), shelf), shelf).sum() == 0


def test_what_finds_no_room_on_the_shelf_goes_through_the_pipe() -> None:
    shelf, sent = a_shelf(MANY), [torch.full((MANY,), float(number)) for number in range(3)]
    message = parcel.packed(sent, shelf)
    assert 8 * MANY < len(message) < 9 * MANY
    assert all(torch.equal(one, other) for one, other in zip(parcel.unpacked(message, shelf), sent, strict=True))


def test_small_models_have_no_shelf_and_a_shelf_that_is_missing_is_noticed() -> None:
    assert parcel.Shelf.of(4 * 610) is None
    message = parcel.packed(torch.ones(MANY), a_shelf(MANY))
    with pytest.raises(RuntimeError, match="without it; this is a bug"):
        parcel.unpacked(message)


def echo(connection: Connection, down: parcel.Shelf, up: parcel.Shelf) -> None:
    connection.send_bytes(parcel.packed(parcel.unpacked(connection.recv_bytes(), down) + 1, up))


# Nobody uses "forkserver" here, and its server would outlive the test.
@pytest.mark.parametrize("method", set(torch.multiprocessing.get_all_start_methods()) - {"forkserver"})
def test_a_shelf_is_seen_by_processes_however_they_are_started(method: str) -> None:
    context: Any = torch.multiprocessing.get_context(method)
    down, up, sent = a_shelf(MANY), a_shelf(MANY), torch.randn(MANY)
    ours, theirs = context.Pipe()
    process = context.Process(target=echo, args=(theirs, down, up), daemon=True)
    process.start()
    ours.send_bytes(parcel.packed(sent, down))
    assert ours.poll(60)
    found = parcel.unpacked(ours.recv_bytes(), up)
    process.join(60)
    assert process.exitcode == 0 and torch.equal(found, sent + 1)
