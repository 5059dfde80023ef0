"""Evaluation gives sums: over any split of the data they add up to the whole, and averages are exact."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedml_core.data import Examples
from fedml_core.errors import ConfigError
from fedml_core.task import Task
from fedml_core.training import Training
from tests.clients.trainer_cases import classification, drawn, labelled, perceptron, trained, trainer_of

DOUBLE = trainer_of(classification(lambda: perceptron().double()))


def doubled(count: int, weighted: bool) -> Examples:
    data = labelled(count, weights=drawn(count, seed=2).abs() + 0.1 if weighted else None)
    return Examples((data.inputs[0].double(),), data.targets, data.weights)


@given(st.integers(2, 60), st.data(), st.integers(1, 20), st.booleans())
def test_sums_of_two_parts_are_the_sums_of_the_whole(
    count: int, data: st.DataObject, batch_size: int, weighted: bool
) -> None:
    examples = doubled(count, weighted)
    cut = data.draw(st.integers(1, count - 1))
    whole = DOUBLE.evaluate(DOUBLE.initial(), examples, batch_size)
    parts = [DOUBLE.evaluate(DOUBLE.initial(), examples.take(rows)) for rows in (range(cut), range(cut, count))]
    for name, value in whole.items():
        assert sum(part[name] for part in parts) == pytest.approx(value, rel=1e-9)


def test_evaluation_equals_one_pass_over_everything() -> None:
    data = doubled(23, weighted=True)
    assert data.weights is not None
    module = classification(lambda: perceptron().double()).build(0).eval()
    DOUBLE.spec.load(DOUBLE.initial(), module)
    outputs = module(data.inputs[0])
    losses = F.cross_entropy(outputs, data.targets, reduction="none")
    hits = (outputs.argmax(1) == data.targets).double()
    weights = data.weights.double()
    expected = {"examples": weights.sum(), "loss": (losses * weights).sum(), "accuracy": (hits * weights).sum()}
    found = DOUBLE.evaluate(DOUBLE.initial(), data, batch_size=4)
    assert list(found) == ["examples", "loss", "accuracy"]
    for name, value in expected.items():
        assert found[name] == pytest.approx(value.item(), rel=1e-12)


def test_float32_losses_are_added_in_float64() -> None:
    # In float32, 2^24 + 1 is 2^24: 100 more ones would be lost.
    task = Task(model=lambda: nn.Linear(1, 1), loss=lambda outputs, targets: targets + 0 * outputs.squeeze(1))
    data = Examples.of(torch.zeros(101, 1), torch.cat([torch.tensor([2.0**24]), torch.ones(100)]))
    trainer = trainer_of(task)
    for batch_size in (1, 7, 101):
        assert trainer.evaluate(trainer.initial(), data, batch_size)["loss"] == 2.0**24 + 100


def test_evaluation_is_in_eval_mode_and_training_in_training_mode() -> None:
    task = classification(lambda: nn.Sequential(nn.BatchNorm1d(5), nn.Dropout(0.9), nn.Linear(5, 3)))
    trainer = trainer_of(task)
    by_ones, whole = (trainer.evaluate(trainer.initial(), labelled(), size) for size in (1, 64))
    assert by_ones == pytest.approx(whole, rel=1e-5)
    before = trained(trainer, labelled(), Training(batch_size=8))
    trainer.evaluate(trainer.initial(), labelled())
    assert torch.equal(trained(trainer, labelled(), Training(batch_size=8)).values, before.values)
    assert before.values[-10:].abs().min() > 0  # the running statistics moved: it was in training mode


def test_evaluation_changes_no_model() -> None:
    trainer = trainer_of(classification())
    trainer.evaluate(trainer.initial() + 1, labelled())
    assert torch.equal(trainer.initial(), trainer_of(classification()).initial())
    assert trainer.evaluate(trainer.initial(), labelled()) == trainer_of(classification()).evaluate(
        trainer.initial(), labelled()
    )


def test_a_batch_size_below_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="batch_size must be >= 1, got 0"):
        DOUBLE.evaluate(DOUBLE.initial(), doubled(3, weighted=False), 0)
