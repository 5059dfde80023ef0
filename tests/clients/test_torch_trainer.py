"""The trainer does what a tutorial's loop does, bit for bit, and nothing of one client reaches the next."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedml_core import minibatches
from fedml_core.data import Examples
from fedml_core.errors import TaskError
from fedml_core.minibatches import epoch_order, training_order
from fedml_core.model import ModelSpec
from fedml_core.task import Task
from fedml_core.training import Training
from tests.clients.trainer_cases import (
    KEY,
    batches_of,
    by_hand,
    classification,
    drawn,
    flat,
    labelled,
    orders_of,
    perceptron,
    trained,
    trainer_of,
)

OPTIMIZERS: list[tuple[str, dict[str, Any], Callable[..., torch.optim.Optimizer]]] = [
    ("sgd", {}, torch.optim.SGD),
    ("SGD", {"momentum": 0.9, "weight_decay": 0.01, "nesterov": True}, torch.optim.SGD),
    ("Adam", {"betas": [0.8, 0.9]}, torch.optim.Adam),
    ("adamw", {"weight_decay": 0.1}, torch.optim.AdamW),
]


@pytest.mark.parametrize(("name", "arguments", "kind"), OPTIMIZERS)
def test_training_equals_the_plain_loop_bit_for_bit(
    name: str, arguments: dict[str, Any], kind: Callable[..., torch.optim.Optimizer]
) -> None:
    task, data = classification(), labelled()
    training = Training(epochs=3, batch_size=4, optimizer=name, learning_rate=0.05, optimizer_arguments=arguments)
    update = trained(trainer_of(task), data, training)
    module = task.build(0)
    start = flat(module).clone()
    by_hand(module, data, batches_of(data, 4, epochs=3), partial(kind, lr=0.05, **arguments))
    assert torch.equal(update.values, flat(module) - start)
    assert update.values.abs().max() > 0.01


def test_sgd_equals_numpy_on_linear_regression() -> None:
    x, y = drawn(10, 3), drawn(10, seed=1)
    task = Task.regression(model=lambda: nn.Linear(3, 1))
    trainer = trainer_of(task)
    update = trained(trainer, Examples.of(x, y), Training(epochs=2, batch_size=4, learning_rate=0.1))
    theta = trainer.initial().double().numpy()
    start, losses = theta.copy(), []
    for order in orders_of(10, 2):
        for rows in np.split(order.numpy(), [4, 8]):
            inputs, targets = x.double().numpy()[rows], y.double().numpy()[rows]
            residual = inputs @ theta[:3] + theta[3] - targets
            losses.extend(residual**2)
            gradient = np.append(2 * inputs.T @ residual, 2 * residual.sum()) / len(rows)
            theta = theta - 0.1 * gradient
    assert np.allclose(update.values.numpy(), theta - start, rtol=0, atol=1e-6)
    assert update.sums["loss"].item() == pytest.approx(10 * np.mean(losses), rel=1e-5)


def test_an_update_says_what_was_done() -> None:
    update = trained(trainer_of(classification()), labelled(23), Training(epochs=2, batch_size=4, learning_rate=0.5))
    assert (update.values.shape, update.values.dtype, update.values.device.type) == ((75,), torch.float32, "cpu")
    assert set(update.sums) == {"examples", "loss", "accuracy"}
    assert update.weight.item() == 1.0
    assert update.sums["examples"].item() == 23.0
    assert {name: value.item() for name, value in update.facts.items()} == {"steps": 12.0, "step_size": 6.0}
    scalars = [update.weight, *update.sums.values(), *update.facts.values()]
    assert all(value.dtype == torch.float64 and value.shape == () for value in scalars)


def test_training_sums_are_means_over_everything_processed_times_the_examples() -> None:
    task, data = classification(), labelled(10)
    update = trained(trainer_of(task), data, Training(epochs=2, batch_size=4))
    module = task.build(0)
    losses: list[Tensor] = []
    hits: list[Tensor] = []
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for rows in batches_of(data, 4, epochs=2):
        outputs = module(data.inputs[0][rows])
        each = F.cross_entropy(outputs, data.targets[rows], reduction="none")
        losses.append(each.detach())
        hits.append(outputs.argmax(1) == data.targets[rows])
        optimizer.zero_grad()
        each.mean().backward()
        optimizer.step()
    assert update.sums["loss"].item() == pytest.approx(torch.cat(losses).double().mean().item() * 10, rel=1e-6)
    assert update.sums["accuracy"].item() == pytest.approx(torch.cat(hits).double().mean().item() * 10, rel=1e-12)


def test_a_long_training_adds_up_as_a_short_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, data, training = trainer_of(classification()), labelled(23), Training(epochs=3, batch_size=2)
    at_the_end = trained(trainer, data, training)
    monkeypatch.setattr("fedml_core.forward._WAITING", 3)
    in_between = trained(trainer, data, training)
    for name, value in at_the_end.sums.items():
        assert in_between.sums[name].item() == pytest.approx(value.item(), rel=1e-12)


def test_a_metric_that_is_a_view_of_a_weight_is_read_before_the_step() -> None:
    class Guess(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.guess = nn.Parameter(torch.tensor(0.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.guess.expand(len(x))

    task = Task.regression(model=Guess, metrics={"guess": lambda outputs, targets: outputs})
    data = Examples.of(torch.zeros(4, 1), torch.ones(4))
    update = trained(trainer_of(task), data, Training(steps=2, batch_size=4, learning_rate=0.25))
    # 0, then 0 - 0.25 * 2 * (0 - 1) = 0.5: the mean of both, four examples.
    assert update.sums["guess"].item() == pytest.approx(4 * 0.25)


def test_an_update_of_zero_learning_progress_is_exactly_zero() -> None:
    task = Task(model=lambda: perceptron().bfloat16(), loss=lambda outputs, targets: 0.0 * outputs.float().sum(dim=1))
    trainer = trainer_of(task)
    parameters = trainer.initial() + 1e-4  # not a bfloat16 number, so loading rounds it
    data = Examples.of(drawn(6, 5).bfloat16(), torch.zeros(6))
    update = trainer.train(parameters, data, Training(), round_number=1, key=KEY)
    assert torch.equal(update.values, torch.zeros(75))


def test_the_arguments_are_left_as_they_were() -> None:
    trainer, data = trainer_of(classification()), labelled()
    parameters, inputs = trainer.initial(), data.inputs[0].clone()
    trainer.train(parameters, data, Training(), round_number=1, key=KEY)
    trainer.evaluate(parameters, data)
    assert torch.equal(parameters, trainer.initial())
    assert torch.equal(data.inputs[0], inputs)


def test_initial_is_the_built_model_and_a_copy() -> None:
    task = classification()
    trainer = trainer_of(task, seed=3)
    trained(trainer, labelled())
    trainer.initial().zero_()
    assert torch.equal(trainer.initial(), flat(task.build(3)))
    assert trainer.spec == ModelSpec.of(task.build(3))


# Randomness.


def noisy() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 3))


def test_same_key_same_result_whatever_ran_before() -> None:
    training = Training(epochs=2, batch_size=4, optimizer="adam", learning_rate=0.01)
    once = trained(trainer_of(classification(noisy)), labelled(), training)
    trainer = trainer_of(classification(noisy))
    other = trainer.train(trainer.initial() + 1, labelled(9, seed=5), Training(), round_number=9, key=(5,))
    trainer.evaluate(trainer.initial() - 1, labelled(9, seed=5))
    torch.rand(3)
    again = trained(trainer, labelled(), training)
    assert torch.equal(once.values, again.values)
    assert once.sums == again.sums
    assert not torch.equal(once.values, other.values)


def test_another_key_shuffles_otherwise() -> None:
    trainer = trainer_of(classification())
    one, two = (trained(trainer, labelled(), key=(0, client)) for client in (1, 2))
    assert not torch.allclose(one.values, two.values, atol=1e-4)


def test_another_key_drops_out_otherwise() -> None:
    trainer = trainer_of(classification(lambda: nn.Sequential(nn.Linear(5, 64), nn.Dropout(0.5), nn.Linear(64, 3))))
    # One example leaves nothing to shuffle.
    one, two = (trained(trainer, labelled(1), key=(0, client)) for client in (1, 2))
    assert not torch.allclose(one.values, two.values, atol=1e-4)


def test_global_generators_do_not_move(untouched_generators: None) -> None:
    trainer = trainer_of(classification(noisy))
    trained(trainer, labelled())
    trainer.evaluate(trainer.initial(), labelled())
    with pytest.raises(TaskError):
        trained(trainer, Examples.of(drawn(4, 6), torch.zeros(4, dtype=torch.long)))


def test_evaluation_that_draws_is_reproducible() -> None:
    class Sampling(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.randn(len(x), 3)

    trainer = trainer_of(classification(lambda: Sampling(5, 3)))
    first = trainer.evaluate(trainer.initial(), labelled())
    torch.rand(5)
    assert trainer.evaluate(trainer.initial(), labelled()) == first


# Length: epochs, steps, batches.


def test_steps_go_on_through_the_epochs_shuffles() -> None:
    task, data = classification(), labelled(10)
    update = trained(trainer_of(task), data, Training(steps=7, batch_size=4))
    module = task.build(0)
    start = flat(module).clone()
    by_hand(module, data, batches_of(data, 4, epochs=3)[:7], partial(torch.optim.SGD, lr=0.1))
    assert torch.equal(update.values, flat(module) - start)
    assert update.facts["steps"].item() == 7
    assert update.sums["examples"].item() == 10


def test_as_many_steps_as_epochs_have_are_the_same_training() -> None:
    trainer, data = trainer_of(classification(noisy)), labelled(22)
    by_steps = trained(trainer, data, Training(steps=12, batch_size=4))
    by_epochs = trained(trainer, data, Training(epochs=2, batch_size=4))
    assert torch.equal(by_steps.values, by_epochs.values)
    assert by_steps.sums == by_epochs.sums


@pytest.mark.parametrize(
    ("asked", "skip", "sizes"),
    [
        ({"epochs": 2}, False, [9, 9]),
        ({"epochs": 2}, True, [8, 8]),
        ({"steps": 1}, False, [4]),
        ({"steps": 3}, False, [9]),
        ({"steps": 4}, False, [9, 4]),
        ({"steps": 4}, True, [8, 8]),
        ({"steps": 8}, False, [9, 9, 8]),
    ],
)
def test_an_order_is_as_long_as_the_steps_ask(asked: dict[str, Any], skip: bool, sizes: list[int]) -> None:
    orders = list(training_order(Training(batch_size=4, **asked), KEY, 9, skip_single=skip))
    assert [len(order) for order in orders] == sizes
    for epoch, order in enumerate(orders):
        assert torch.equal(order, epoch_order(KEY, epoch, 9)[: len(order)])


def test_only_a_smaller_last_batch_is_skipped() -> None:
    ones = training_order(Training(batch_size=1), KEY, 3, skip_single=True)
    alone = training_order(Training(batch_size=4), KEY, 1, skip_single=True)
    assert [len(order) for order in (*ones, *alone)] == [3, 1]


def test_small_gathers_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, data = trainer_of(classification()), labelled(weights=drawn(23, seed=4).abs())
    whole = trained(trainer, data, Training(epochs=2, batch_size=4))
    monkeypatch.setattr(minibatches, "_GATHERED_BYTES", 1)
    parts = trained(trainer, data, Training(epochs=2, batch_size=4))
    assert torch.equal(whole.values, parts.values)


def test_the_rate_decays_from_round_to_round() -> None:
    training = Training(batch_size=64, learning_rate=0.4, learning_rate_decay=0.5)
    trainer = trainer_of(classification())
    first, third = (trained(trainer, labelled(), training, round_number=number) for number in (1, 3))
    assert torch.allclose(third.values, first.values / 4, atol=1e-7)
    assert [update.facts["step_size"].item() for update in (first, third)] == [0.4, 0.1]
