"""Every kind of module trains, and what does not travel starts each client as it was built."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from fedml_core.data import Examples
from fedml_core.errors import TaskError
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
    perceptron,
    trained,
    trainer_of,
)

SGD = partial(torch.optim.SGD, lr=0.1)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(5, 3), nn.Linear(2, 3)
        self.nothing = nn.Identity()

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.nothing(self.left(left) * self.right(right))  # type: ignore[no-any-return]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.outer.weight = self.inner.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.outer(torch.tanh(self.inner(x)))))  # type: ignore[no-any-return]


class Adapted(nn.Module):
    """A frozen layer with a trainable low-rank adapter and a trainable 0-d scale."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(5, 3)
        self.base.requires_grad_(False)
        self.down, self.up = nn.Linear(5, 2, bias=False), nn.Linear(2, 3, bias=False)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * self.up(self.down(x))  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRU(1, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        outputs, _ = self.cell(x.unsqueeze(2))
        return self.head(outputs[:, -1])  # type: ignore[no-any-return]


class Normed(nn.Module):
    def __init__(self, momentum: float | None = 0.1) -> None:
        super().__init__()
        self.inner, self.norm, self.head = nn.Linear(5, 4), nn.BatchNorm1d(4, momentum=momentum), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.inner(x)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("model", [TwoInputs, Tied, Adapted, Recurrent])
def test_a_module_trains_as_in_the_plain_loop(model: type[nn.Module]) -> None:
    data = labelled(18)
    if model is TwoInputs:
        data = Examples.of(data.inputs[0], drawn(18, 2, seed=9), data.targets)
    task = classification(model)
    update = trained(trainer_of(task), data, Training(epochs=2, batch_size=4))
    module = task.build(0)
    start = task.build(0)
    by_hand(module, data, batches_of(data, 4, epochs=2), SGD)
    names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    before, after = dict(start.named_parameters()), dict(module.named_parameters())
    expected = torch.cat([(after[name] - before[name]).detach().reshape(-1) for name in names])
    assert torch.equal(update.values, expected)
    assert update.values.abs().max() > 0.001


def test_batch_norm_statistics_travel_and_its_counter_stays() -> None:
    task, data = classification(Normed), labelled(16)
    trainer = trainer_of(task)
    update = trained(trainer, data, Training(epochs=2, batch_size=4))
    module, start = task.build(0), task.build(0)
    by_hand(module, data, batches_of(data, 4, epochs=2), SGD)
    moved = trainer.spec.flatten(module) - trainer.spec.flatten(start)
    assert torch.equal(update.values, moved)
    assert [tensor.name for tensor in trainer.spec.buffers] == ["norm.running_mean", "norm.running_var"]
    assert moved[-8:].abs().min() > 0


def test_a_batch_counter_starts_anew_for_each_client() -> None:
    # With momentum=None the statistics are a mean over the counted batches: a counter left over would shift them.
    task = classification(partial(Normed, None))
    trainer = trainer_of(task)
    alone = trained(trainer_of(task), labelled(8))
    trained(trainer, labelled(20, seed=3), Training(epochs=5, batch_size=4))
    assert torch.equal(trained(trainer, labelled(8)).values, alone.values)


class Restless(nn.Module):
    """Changes everything that does not travel, in every way that a forward pass can."""

    calls: Tensor
    window: Tensor
    swapped: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)
        self.teacher = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("swapped", torch.tensor(0))
        self.register_buffer("window", torch.ones(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "late"):
            self.register_buffer("late", torch.tensor(1 + float(x.mean())), persistent=False)
        self.calls += 1
        self.swapped = self.swapped + 1
        self.window = torch.cat([self.window, x.detach().mean().reshape(1)])
        self.teacher.data = self.teacher.data * 0.5 + float(x.sum())
        factor = 1 + self.calls + self.swapped + self.window.sum() + self.get_buffer("late")
        return self.layer(x) * factor / 10 + self.teacher  # type: ignore[no-any-return]


@pytest.mark.parametrize("before", ["train", "evaluate"])
def test_whatever_does_not_travel_is_put_back_for_each_client(before: str) -> None:
    task, training = classification(Restless), Training(batch_size=4, learning_rate=0.001)
    alone = trained(trainer_of(task), labelled(8), training)
    trainer = trainer_of(task)
    if before == "train":
        trained(trainer, labelled(11, seed=5), training)
    else:
        trainer.evaluate(trainer.initial() + 1, labelled(11, seed=5))
    assert torch.equal(trained(trainer, labelled(8), training).values, alone.values)


def test_a_module_that_cannot_be_put_back_is_a_clear_error() -> None:
    class Growing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.weight.data = torch.cat([self.weight.data, self.weight.data])
            return x[:, :3] * self.bias

    trainer = trainer_of(classification(lambda: Growing(5, 3)))
    with pytest.raises(TaskError, match=r"reading the task's model failed at round 1: RuntimeError"):
        trained(trainer, labelled(4))
    with pytest.raises(TaskError, match=r"loading the task's model failed at round 1: RuntimeError"):
        trained(trainer, labelled(4))


def test_a_bfloat16_module_starts_from_what_it_really_holds() -> None:
    class Half(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.bfloat16()).float()

    task, data = classification(lambda: Half(5, 3, dtype=torch.bfloat16)), labelled(12)
    trainer = trainer_of(task)
    parameters = trainer.initial() * 1.001
    update = trainer.train(parameters, data, Training(batch_size=4), round_number=1, key=KEY)
    module = task.build(0)
    trainer.spec.load(parameters, module)
    start = flat(module).float()
    assert not torch.equal(start, parameters)
    by_hand(module, data, batches_of(data, 4), SGD)
    assert torch.equal(update.values, flat(module).float() - start)


def test_a_float64_module_trains_in_float64() -> None:
    data = Examples.of(labelled().inputs[0].double(), labelled().targets)
    task = classification(lambda: perceptron().double())
    update = trained(trainer_of(task), data)
    module, start = task.build(0), flat(task.build(0)).float()
    module.load_state_dict({name: value.float().double() for name, value in module.state_dict().items()})
    by_hand(module, data, batches_of(data, 4), SGD)
    assert torch.equal(update.values, flat(module).float() - start)


def test_sparse_gradients_train_with_and_without_clipping() -> None:
    tokens = torch.arange(12).remainder(7)
    data = Examples.of(tokens, tokens.remainder(3))
    updates = []
    for sparse in (True, False):
        task = classification(partial(nn.Embedding, 7, 3, sparse=sparse))
        for norm in (None, 0.1):
            training = Training(batch_size=4, max_gradient_norm=norm)
            updates.append(trained(trainer_of(task), data, training).values)
    assert torch.allclose(updates[0], updates[2], atol=1e-7)
    assert torch.allclose(updates[1], updates[3], atol=1e-7)
    assert not torch.allclose(updates[0], updates[1], atol=1e-3)


def test_a_model_without_inputs_trains() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.level = nn.Parameter(torch.zeros(()))

        def forward(self) -> Tensor:
            return self.level

    task = Task(model=Constant, loss=lambda level, targets: (level - targets) ** 2)
    update = trained(trainer_of(task), Examples.of(torch.ones(6)), Training(batch_size=6, learning_rate=0.25))
    assert update.values.item() == pytest.approx(0.5)


def test_a_batch_norm_model_skips_a_last_batch_of_one() -> None:
    trainer, plain = trainer_of(classification(Normed)), trainer_of(classification())
    nine = Training(epochs=2, batch_size=4)
    assert trained(trainer, labelled(9), nine).facts["steps"].item() == 4
    assert trained(trainer, labelled(9), nine).sums["examples"].item() == 9
    assert trained(plain, labelled(9), nine).facts["steps"].item() == 6


@pytest.mark.parametrize(("count", "batch_size"), [(1, 4), (3, 1)])
def test_batch_norm_on_single_examples_says_what_to_do(count: int, batch_size: int) -> None:
    with pytest.raises(TaskError, match=r"model failed at round 1: ValueError.*give the client at least 2 and a batch"):
        trained(trainer_of(classification(Normed)), labelled(count), Training(batch_size=batch_size))
