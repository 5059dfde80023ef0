"""Whatever the user's code raises is one line that names the piece and the round, with its cause chained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedml_core.data import Data, Examples
from fedml_core.errors import SpecMismatchError, TaskError
from fedml_core.task import Task
from fedml_core.training import Training
from tests.clients.trainer_cases import KEY, classification, drawn, labelled, trained, trainer_of


def raising(*arguments: Any) -> Tensor:
    raise ValueError("three\nlines\nof text")


class Unwell(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("inside")


class Torn(torch.utils.data.Dataset[tuple[Tensor, int]]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        raise OSError("the disk is gone")


class Endless:
    def __len__(self) -> int:
        raise RuntimeError("nobody knows")

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.zeros(5), 0


class OffByOne(Torn):
    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.zeros(5), index


CASES: list[tuple[dict[str, Any], Data, str, type[Exception] | None]] = [
    ({"loss": raising}, labelled(), r"the task's loss failed {}: ValueError: three lines of text", ValueError),
    ({"metrics": {"odd": raising}}, labelled(), r"the task's metric odd failed {}: ValueError: three", ValueError),
    ({"model": lambda: Unwell(5, 3)}, labelled(), r"the task's model failed {}: KeyError: 'inside'", KeyError),
    ({}, Torn(), r"the task's data failed {}: OSError: the disk is gone", OSError),
    ({}, Endless(), r"the task's data failed {}: RuntimeError: nobody knows", RuntimeError),
    (
        {},
        Examples.of(drawn(4, 6), torch.zeros(4, dtype=torch.long)),
        r"model failed {}: RuntimeError: mat1",
        RuntimeError,
    ),
    ({}, Examples.of(drawn(4, 5).double(), torch.zeros(4, dtype=torch.long)), r"inputs of its own dtype", RuntimeError),
    ({}, Examples.of(drawn(0, 5), torch.zeros(0, dtype=torch.long)), r"the client's data: no examples", None),
    ({}, Examples.of(drawn(4, 5), torch.tensor([0, 1, 3, 2])), r"the client's data: label 3 of example 2 is out", None),
    (
        {},
        OffByOne(),
        r"a batch of the client's data: label 3 of example \d is out of range; labels must be 0 to 2",
        None,
    ),
    ({}, labelled(4, weights=torch.zeros(4)), r"the client's data: every example weighs 0", None),
    ({"loss": lambda outputs, targets: 1.0}, labelled(), r"must return shape \(4,\), .* or \(\); got float", None),
    ({"loss": lambda outputs, targets: outputs}, labelled(), r"shape \(4,\), .*; got \(4, 3\) of torch.float32", None),
    ({"loss": lambda outputs, targets: targets}, labelled(), r"shape \(4,\), .*; got \(4,\) of torch.int64", None),
    ({"metrics": {"m": lambda outputs, targets: outputs.mean()}}, labelled(), r"metric m must .* got \(\)", None),
    ({"metrics": {"m": lambda outputs, targets: 0}}, labelled(), r"metric m must return shape \(4,\), got int", None),
]


@pytest.mark.parametrize(("changes", "data", "message", "cause"), CASES)
@pytest.mark.parametrize("work", ["train", "evaluate"])
def test_a_task_at_fault_is_one_clear_line(
    work: str, changes: dict[str, Any], data: Data, message: str, cause: type[Exception] | None
) -> None:
    trainer = trainer_of(classification(**changes))
    call: Callable[[], Any] = lambda: trainer.evaluate(trainer.initial(), data, 4)  # noqa: E731  # one of two
    if work == "train":
        call = lambda: trained(trainer, data, round_number=3)  # noqa: E731  # the other
    with pytest.raises(TaskError, match=message.format("at round 3" if work == "train" else "in evaluation")) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert cause is None or isinstance(caught.value.__cause__, cause)


def test_a_loss_that_forgets_the_model_is_a_task_error() -> None:
    task = classification(loss=lambda outputs, targets: outputs.detach().sum(dim=1))
    with pytest.raises(TaskError, match=r"the backward pass failed at round 1: .*the loss must depend on the model's"):
        trained(trainer_of(task), labelled())


def test_a_trainer_works_on_after_a_failure() -> None:
    trainer, data = trainer_of(classification()), labelled()
    expected = trained(trainer, data)
    with pytest.raises(TaskError):
        trained(trainer, OffByOne(), Training(batch_size=1))
    assert torch.equal(trained(trainer, data).values, expected.values)


def test_a_vector_of_another_model_is_refused() -> None:
    trainer = trainer_of(classification())
    for work in (
        lambda: trainer.train(torch.zeros(74), labelled(), Training(), round_number=1, key=KEY),
        lambda: trainer.evaluate(torch.zeros(74), labelled()),
    ):
        with pytest.raises(SpecMismatchError, match=r"a vector of shape \(75,\) fits this model, got \(74,\)"):
            work()


@pytest.mark.parametrize("name", ["examples", "loss"])
def test_a_metric_may_not_take_a_reports_own_name(name: str) -> None:
    task = Task(model=lambda: nn.Linear(5, 3), loss=raising, metrics={name: raising})
    with pytest.raises(TaskError, match=f"a metric may not be called {name}"):
        trainer_of(task)
