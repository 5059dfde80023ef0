"""Every form of loss, metric, weight and data set means what the task says it means."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedml_core.data import Examples
from fedml_core.errors import TaskError
from fedml_core.task import Task
from fedml_core.training import Training
from tests.clients.trainer_cases import batches_of, classification, drawn, flat, labelled, trained, trainer_of

SGD = partial(torch.optim.SGD, lr=0.1)


# Losses.


def test_outputs_may_be_any_structure() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return self.layer(x), {"size": x.square().sum(dim=1)}

    def loss(outputs: Any, targets: Tensor) -> Tensor:
        logits: Tensor = outputs[0]
        return F.cross_entropy(logits, targets, reduction="none") + 0.0 * size(outputs, targets)

    def size(outputs: Any, targets: Tensor) -> Tensor:
        result: Tensor = outputs[1]["size"]
        return result

    data = labelled(8)
    task = Task(model=Two, loss=loss, metrics={"size": size})
    update = trained(trainer_of(task), data)
    plain = trained(trainer_of(Task.classification(model=Two, classes=3, loss=loss, metrics={"accuracy": size})), data)
    assert torch.equal(update.values, plain.values)
    assert update.sums["size"].item() == pytest.approx(data.inputs[0].square().sum().item(), rel=1e-6)


def test_a_scalar_loss_is_the_batchs_mean() -> None:
    each, scalar = classification(metrics={}), classification(loss=F.cross_entropy)
    data, training = labelled(10), Training(epochs=2, batch_size=4)
    one, other = trained(trainer_of(each), data, training), trained(trainer_of(scalar), data, training)
    assert torch.equal(one.values, other.values)
    assert other.sums["loss"].item() == pytest.approx(one.sums["loss"].item(), rel=1e-6)
    trainer = trainer_of(scalar)
    evaluated = trainer.evaluate(trainer.initial(), data, batch_size=4)
    assert evaluated["loss"] == pytest.approx(trainer_of(each).evaluate(trainer.initial(), data)["loss"], rel=1e-6)


def test_a_scalar_loss_refuses_weighted_examples() -> None:
    trainer = trainer_of(classification(loss=F.cross_entropy))
    data = labelled(6, weights=torch.ones(6))
    for work in (lambda: trained(trainer, data), lambda: trainer.evaluate(trainer.initial(), data)):
        with pytest.raises(TaskError, match="a scalar loss cannot weigh its examples; return one loss an example"):
            work()


def test_a_loss_that_diverges_is_passed_on_as_numbers() -> None:
    data = Examples.of(torch.full((8, 5), 1e30), torch.arange(8).remainder(3))
    update = trained(trainer_of(classification()), data, Training(batch_size=4, learning_rate=1e30))
    assert not torch.isfinite(update.values).all()
    assert update.facts["steps"].item() == 2


# Weights.


def test_weighted_examples_train_on_the_weighted_mean() -> None:
    weights = drawn(12, seed=8).abs()
    task, data = classification(), labelled(12, weights=weights)
    update = trained(trainer_of(task), data, Training(batch_size=4))
    module, start = task.build(0), flat(task.build(0))
    optimizer, total = SGD(module.parameters()), 0.0
    for rows in batches_of(data, 4):
        losses = F.cross_entropy(module(data.inputs[0][rows]), data.targets[rows], reduction="none")
        total += (losses * weights[rows]).sum().item()
        optimizer.zero_grad()
        ((losses * weights[rows]).sum() / weights[rows].sum()).backward()
        optimizer.step()
    assert torch.allclose(update.values, flat(module) - start, atol=1e-7)
    assert update.sums["examples"].item() == pytest.approx(weights.sum().item(), rel=1e-6)
    assert update.sums["loss"].item() == pytest.approx(total, rel=1e-5)


def test_an_example_of_weight_zero_counts_nowhere() -> None:
    trainer, data = trainer_of(classification()), labelled(8)
    half = Examples(data.inputs, data.targets, torch.tensor([1.0] * 4 + [0.0] * 4))
    first = data.take(range(4))
    ours, theirs = trainer.evaluate(trainer.initial(), half), trainer.evaluate(trainer.initial(), first)
    assert ours == pytest.approx(theirs, rel=1e-6)
    whole = Training(batch_size=8)
    assert torch.allclose(trained(trainer, half, whole).values, trained(trainer, first, whole).values, atol=1e-7)


def test_a_batch_without_weight_takes_a_step_of_zero() -> None:
    weights = torch.zeros(8)
    weights[batches_of(labelled(8), 4)[1][0]] = 2.0
    data = labelled(8, weights=weights)
    trainer = trainer_of(classification())
    first = trained(trainer, data, Training(steps=1, batch_size=4))
    assert torch.equal(first.values, torch.zeros(75))
    assert (first.sums["examples"].item(), first.sums["loss"].item()) == (2.0, 0.0)
    both = trained(trainer, data, Training(steps=2, batch_size=4))
    assert torch.isfinite(both.values).all()
    assert both.values.abs().max() > 0


# Map-style data sets.


class Mapped(torch.utils.data.Dataset[tuple[Tensor, int]]):
    def __init__(self, examples: Examples) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.examples.inputs[0][index], int(self.examples.targets[index])


def test_a_map_style_data_set_trains_and_evaluates_as_the_same_examples() -> None:
    trainer, data = trainer_of(classification()), labelled(10)
    training = Training(epochs=2, batch_size=4)
    ours, theirs = trained(trainer, Mapped(data), training), trained(trainer, data, training)
    assert torch.equal(ours.values, theirs.values)
    assert ours.sums == theirs.sums
    whole = trainer.evaluate(trainer.initial(), data, batch_size=4)
    assert trainer.evaluate(trainer.initial(), Mapped(data), batch_size=4) == whole


def test_a_data_set_that_augments_draws_from_the_key() -> None:
    class Noisy(Mapped):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            x, y = super().__getitem__(index)
            return x + torch.randn(5), y

    one, two = (trained(trainer_of(classification()), Noisy(labelled(8))) for _ in range(2))
    assert torch.equal(one.values, two.values)
